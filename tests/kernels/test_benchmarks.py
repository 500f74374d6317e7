"""The benchmark runs: on a CPU with a clock that is made up, so that it does not break unseen between GPU runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import linear

    yield linear
    for name in ("linear", "timing", "random_weights"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", [{}, {"weight_bits": 4, "statistics": "direct", "group_size": 64}], ids=["bilevel", "direct"])
def test_measure_and_table(benchmark, kind):
    calls = []

    def timer(functions):
        for function in functions:
            calls.append(function())
        return 10.0 * len(calls)

    rows = [benchmark.measure((64, 128), batch, share, timer, "cpu", **kind) for batch in (1, 3) for share in (0.0, 0.01)]
    assert all(row["error"] < 1e-3 for row in rows)
    assert rows[0]["ratio"] == pytest.approx(rows[0]["fp16_us"] / rows[0]["ours_us"])
    printed = benchmark.table(rows, 4.3e12)
    assert printed.count("| 64 x 128 |") == 4
    assert "4.30 TB/s" in printed

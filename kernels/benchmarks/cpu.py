"""Time of y = x W^T on the CPU: ours beside torch's dense bf16 product, on all of torch's threads, in turns.

    PYTHONPATH=.:kernels python kernels/benchmarks/cpu.py [--quick] [--json results.json]

Prints one Markdown table. Weights are random and rotate over more than 200 MB, so that none is found in the last-level cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_weights import random_tensors
from torch.nn.functional import linear as dense_linear

from spqr_format.layout import Layout
from spqr_kernels import linear, reference

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
BATCHES = [1, 8, 64]
SHARES = [0.0, 0.01]
COLD_BYTES = 200e6

Timer = Callable[[Sequence[Callable[[int], object]]], list[float]]


def milliseconds(calls: Sequence[Callable[[int], object]], repeats: int = 31) -> list[float]:
    """Median milliseconds of each call. They take turns, so that what else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 2):  # two to warm up: the kernels compile
        for taken, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call(i)
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken[2:]) for taken in times]


def measure(shape: tuple[int, int], batch: int, share: float, timer: Timer = milliseconds, **kind: Any) -> dict[str, Any]:
    """Milliseconds of ours and of the dense bf16 product, their ratio, and ours' error against float64."""
    layout = Layout(*shape, **kind)
    ours = [random_tensors(layout, share, seed, "cpu") for seed in range(_copies(layout.stored_bytes()))]
    dense = [torch.randn(*shape).bfloat16() for _ in range(_copies(2 * shape[0] * shape[1]))]
    x = torch.randn(batch, shape[1]).bfloat16()
    bf16, spqr = timer(
        [lambda i: dense_linear(x, dense[i % len(dense)]), lambda i: linear(x, *ours[i % len(ours)])],
    )
    tensors, stored = ours[0]
    exact = x[:4].double() @ reference.dequantize(tensors, stored).double().T
    error = ((linear(x, tensors, stored)[:4].double() - exact).norm() / exact.norm()).item()
    return {
        "shape": shape, "batch": batch, "outliers": share, **kind, "bf16_ms": bf16, "ours_ms": spqr, "ratio": spqr / bf16,
        "error": error,
    }  # fmt: skip


def _copies(size: int) -> int:
    return min(64, int(COLD_BYTES // size) + 2)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each shape, batch and share of outliers."""
    lines = ["| out x in | batch | outliers % | dense bf16 ms | ours ms | ours / dense |", "|---|" + "---:|" * 5]
    for row in results:
        lines.append(
            f"| {row['shape'][0]} x {row['shape'][1]} | {row['batch']} | {100 * row['outliers']:.0f} | {row['bf16_ms']:.2f} "
            f"| {row['ours_ms']:.2f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, threads and versions of this run."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(": ")[2] if models else name
    versions = {package: importlib.metadata.version(package) for package in ("torch", "numba")}
    return {"cpu": name, "threads": torch.get_num_threads(), **versions}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 1 without outliers only")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    batches, shares = ([1], [0.0]) if arguments.quick else (BATCHES, SHARES)
    results = [measure(shape, batch, share) for shape in SHAPES for batch in batches for share in shares]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

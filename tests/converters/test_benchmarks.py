"""The benchmarks of the converters run; what they print is measured elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "converters" / "benchmarks"


def script(name: str) -> ModuleType:
    """A benchmark as a module: its folder is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("how", [[], ["--calibrated", "--tokens", "256"]], ids=["without data", "calibrated"])
def test_quantize(how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("quantize")
    solve = module.datafree.solve
    module.main(
        ["--layers", "1", "--hidden", "32", "--mlp", "48", "--heads", "2", "--device", "cpu", "--folder", str(tmp_path), *how]
    )
    assert module.datafree.solve is solve  # the clocks are taken off again
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    clock = float(rows.pop("by the clock"))
    del rows["part"]
    assert {"read", "solve", "pack", "hash and write"} <= set(rows)
    assert 0 < clock < 60
    if how:  # one thread: the parts are the whole
        assert sum(map(float, rows.values())) == pytest.approx(clock, abs=0.05)
    assert not list(tmp_path.iterdir())


def test_experts(shared: Path, calibration_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With few tokens the usual damping makes calibration worse than none, and the one for few tokens does not."""
    module = script("experts")
    module.RATIOS = (0.5, 4)
    module.SOLVER = module.SolverOptions(rounds=1, sweeps=0)
    few = ["--calibration", str(calibration_text), "--tokens", "8192", "--held-out", "2048", "--every", "8"]
    module.main([str(shared / "models" / "tiny-moe"), *few])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    half, four = ([float(figure) for figure in row[2:]] for row in rows)
    assert half[0] > 1 > half[2] > four[2]


@pytest.mark.slow
def test_techniques(calibration_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("techniques")
    feedback = module.statistics.feedback
    module.SWITCHED_OFF = {
        name: (parts, {"rounds": 1, "sweeps": 0}, options) for name, (parts, _, options) in module.SWITCHED_OFF.items()
    }
    few = ["--tokens", "512", "--measured", "1024", "--calibration", str(calibration_text)]
    module.main([*few, "--only", "error feedback and", "--only", "search"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["3.625", "3.625"]
    assert all(0 < float(row[2].split()[0]) < 1 for row in rows)
    assert module.statistics.feedback is feedback

"""Time of y = x W^T: ours beside its peers, in one process, L2 cold, CUDA graphs, median of many.

    PYTHONPATH=.:kernels python kernels/benchmarks/linear.py [--quick | --full] [--shapes 70b 4096x4096] [--batches 1 16]
        [--shares 0 0.01] [--bits 3] [--statistics bilevel] [--groups 16 32] [--peers ours fp16] [--minutes 4] [--out FOLDER]

Writes results.json, table.md and roofline.svg (`report.py` makes the last two, and needs no GPU) and prints the table.
Weights are random and rotate over more than 600 MB, so that none is found in L2. Every result is compared with float64.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import report
import torch
from peers import PEERS, Case, Matrix, Product, gemlite_load, state
from timing import microseconds, read_bandwidth
from torch import Tensor

MODELS = {
    "7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "13b": [(5120, 5120), (13824, 5120), (5120, 13824)],
    "70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
    "qwen": [  # Qwen2.5-7B, then Qwen3-32B
        (3584, 3584), (18944, 3584), (3584, 18944), (8192, 5120), (5120, 8192), (25600, 5120), (5120, 25600),
    ],
    "mixtral": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}  # fmt: skip
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]
BATCHES = [1, 4, 8, 16, 32, 64, 512, 2048]
SHARES = [0.0, 0.005, 0.01]
GROUPS = {"bilevel": 16, "direct": 128}
FULL = {
    "shapes": list(dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes)),
    "batches": [2**i for i in range(13)], "shares": [0.0, 0.005, 0.01, 0.02], "bits": [2, 3, 4],
    "statistics": ["bilevel", "direct"], "peers": list(PEERS),
}  # fmt: skip
QUICK = {"shapes": SHAPES[3:], "batches": [1, 8], "peers": ["ours", "fp16"]}
DEFAULT = {
    "shapes": SHAPES, "batches": BATCHES, "shares": SHARES, "bits": [3], "statistics": ["bilevel"],
    "peers": ["ours", "fp16", "spqr_quant", "csr", "gemlite"],
}  # fmt: skip
COLD_BYTES = 600e6
WRONG = 0.05  # relative error from which a result is no rounding; gemlite adds up to 500 partial sums in fp16
CHECKED_ROWS = 32

Clock = Callable[[list[Callable[[], object]]], tuple[float, str]]


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]


def relative_error(product: Product, x: Tensor, exact: Tensor) -> float:
    """Of some rows of x, the first and the last among them: norm of the error over norm of the float64 product.

    A launch that failed in silence shows when the result is read; nan is an error of 100 %.
    """
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], CHECKED_ROWS), device=x.device).round().long()
    expected = x[rows].double() @ exact.T
    y = product(x)
    try:
        error = ((y[rows].double() - expected).norm() / expected.norm()).item()
    except RuntimeError:
        return 1.0
    return error if error == error else 1.0


def row(matrix: Matrix, copies: list[Product], exact: Tensor, batch: int, clock: Clock) -> dict[str, Any]:
    """What was measured of one product at one batch size. `us` is absent unless `status` is ok."""
    x = torch.randn(batch, exact.shape[1], device=exact.device).to(matrix.dtype)
    found: dict[str, Any] = {"batch": batch, "bytes": matrix.nbytes}
    try:
        found["error"] = relative_error(copies[0], x, exact)
        if found["error"] > WRONG:
            return {**found, "status": "wrong"}
        us, kind = clock([lambda p=p: p(x) for p in copies])  # type: ignore[misc]
    except Exception as error:
        return {**found, "status": _failed(error)}
    return {**found, "status": "ok", "us": us, "clock": kind, "bytes_per_s": matrix.nbytes / us * 1e6}


def cold_count(nbytes: int, device: str) -> int:
    """Copies of a matrix of so many bytes over which products rotate, so that none is found in L2."""
    return 1 if device == "cpu" else int(COLD_BYTES // nbytes) + 2


def products_of(matrix: Matrix, device: str) -> list[Product]:
    """Those of `cold_count` copies, the first one of the matrix itself."""
    count = cold_count(matrix.nbytes, device)
    return [matrix.bind(matrix.tensors if i == 0 else [t.clone() for t in matrix.tensors]) for i in range(count)]


def measure(
    peer: str, case: Case, batches: Iterable[int], clock: Clock = microseconds, device: str = "cuda", deadline: float = 1e99
) -> list[dict[str, Any]]:
    """One row a batch size, of one peer and one matrix; those that would start after the deadline are left out."""
    kind = PEERS[peer]
    about = {"peer": peer} | {name: getattr(case, name) if name in kind.fields else None for name in Case.__dataclass_fields__}
    try:
        matrix = kind.make(case, device)
        exact = matrix.exact()
        copies = products_of(matrix, device)
    except Exception as error:
        return [{**about, "batch": batch, "status": _failed(error)} for batch in batches]
    return [{**about, **row(matrix, copies, exact, b, clock)} for b in batches if time.monotonic() < deadline]


def jobs(peers: list[str], cases: list[Case]) -> list[tuple[str, Case]]:
    """What to measure, by shape, so that a ratio is of times taken close together; peers that tune themselves come last."""
    found: dict[tuple[Any, ...], tuple[str, Case]] = {}
    for case in cases:
        for peer in peers:
            if PEERS[peer].fits(case):
                found.setdefault((peer, *PEERS[peer].key(case)), (peer, case))
    return sorted(found.values(), key=lambda job: PEERS[job[0]].late)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(peers: list[str], commit: str | None) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
        "commit": commit or _output("git", "describe", "--always", "--dirty"),
        "peers": {name: state(PEERS[name]) for name in peers if PEERS[name].module},
        "read_bytes_per_s": read_bandwidth(),
    }  # fmt: skip


def shapes_of(words: list[str]) -> list[tuple[int, int]]:
    """Out and in of each, by the name of a model or as out x in."""
    found: list[tuple[int, int]] = []
    for word in words:
        if word in MODELS:
            found += MODELS[word]
        else:
            out, _, inn = word.partition("x")
            found.append((int(out), int(inn)))
    return list(dict.fromkeys(found))


def options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is not named comes from --quick, --full or the default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="ours and fp16, three shapes, batch 1 and 8")
    chosen.add_argument("--full", action="store_true", help="everything: an hour; choose --shapes and --minutes with it")
    parser.add_argument("--shapes", nargs="+", help=f"{', '.join(MODELS)}, or out x in as in 4096x11008")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--shares", nargs="+", type=float, help="of outliers, 0.01 for 1 %%")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4))
    parser.add_argument("--statistics", nargs="+", choices=tuple(GROUPS))
    parser.add_argument("--groups", nargs="+", type=int, help="columns of a group; 16 if bilevel, 128 if direct")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS))
    parser.add_argument("--minutes", type=float, default=4, help="rows that would start later are left out (%(default)g)")
    parser.add_argument("--commit", help="of this repository, where git cannot tell")
    parser.add_argument("--gemlite-config", type=Path, help="gemlite's tuning instead of the one in results/")
    parser.add_argument("--out", type=Path, help="folder for what is written")
    found = parser.parse_args(words)
    preset: dict[str, Any] = {**DEFAULT, **(FULL if found.full else QUICK if found.quick else {})}
    found.shapes = shapes_of(found.shapes) if found.shapes else preset["shapes"]
    for name in ("batches", "shares", "bits", "statistics", "peers"):
        setattr(found, name, getattr(found, name) or preset[name])
    return found


def main(words: list[str] | None = None, clock: Clock = microseconds, device: str = "cuda") -> None:
    """Measure, write, print."""
    asked = options(words)
    start = time.monotonic()
    about = machine(asked.peers, asked.commit)
    folder = asked.out or Path(__file__).parent / "results" / f"{about['gpu'].lower().replace(' ', '-')}-{about['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(shape, share, bits, statistics, group)
        for shape in asked.shapes for bits in asked.bits for statistics in asked.statistics
        for group in asked.groups or [GROUPS[statistics]] for share in asked.shares
    ]  # fmt: skip
    there = [name for name in asked.peers if not about["peers"].get(name, "").startswith(("absent", "failed"))]
    if "gemlite" in there:
        gemlite_load(device, asked.gemlite_config)
    deadline = start + 60 * asked.minutes
    results: dict[str, Any] = {"machine": about, "left_out": 0, "results": []}
    for peer, case in jobs(there, cases):
        batches = [batch for batch in asked.batches if batch <= PEERS[peer].largest_batch]
        found = measure(peer, case, batches, clock, device, deadline) if time.monotonic() < deadline else []
        results["left_out"] += len(batches) - len(found)
        results["results"] += found
        torch.cuda.empty_cache()
        results["seconds"] = round(time.monotonic() - start, 1)
        part = folder / "results.json.part"
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, folder / "results.json")  # what is measured stays, whatever ends the run
        try:
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            raise SystemExit(f"the GPU is in error after {peer} {case}: {error}") from None
    print(report.write(folder / "results.json"))
    print(f"\n{results.get('seconds')} s; written to {folder}")


if __name__ == "__main__":
    main()

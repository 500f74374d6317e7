"""Time of y = x W^T: ours beside fp16 cuBLAS, in one process, L2 cold, CUDA graphs, median of many.

    PYTHONPATH=.:kernels python kernels/benchmarks/linear.py [--quick] [--json results.json]

Prints one Markdown table a batch size. Weights are random and rotate over more than 600 MB, so that none is found in L2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import random_tensors
from timing import graph_microseconds, read_bandwidth

from spqr_format.layout import Layout
from spqr_kernels import linear, reference

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 512, 2048]
SHARES = [0.0, 0.0045, 0.01]
COLD_BYTES = 600e6

Timer = Callable[[list[Callable[[], object]]], float]


def measure(
    shape: tuple[int, int], batch: int, share: float, timer: Timer = graph_microseconds, device: str = "cuda", **kind: Any
) -> dict[str, Any]:
    """Microseconds of ours and of the fp16 product, their ratio, bytes a second of ours, and ours' error against float64."""
    layout = Layout(*shape, **kind)
    copies = int(COLD_BYTES // layout.stored_bytes()) + 2 if device == "cuda" else 1
    sets = [random_tensors(layout, share, seed, device) for seed in range(copies)]
    count = int(COLD_BYTES // (2 * shape[0] * shape[1])) + 2 if device == "cuda" else 1
    dense = [torch.randn(*shape, device=device).half() for _ in range(count)]
    x = torch.randn(batch, shape[1], device=device).half()
    ours = timer([lambda s=s: linear(x, s[0], s[1]) for s in sets])  # type: ignore[misc]
    fp16 = timer([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])  # type: ignore[misc]
    tensors, stored = sets[0]
    exact = x[:4].double() @ reference.dequantize(tensors, stored).double().T
    error = ((linear(x, tensors, stored)[:4].double() - exact).norm() / exact.norm()).item()
    return {
        "shape": shape, "batch": batch, "outliers": share, **kind, "fp16_us": fp16, "ours_us": ours, "ratio": fp16 / ours,
        "bytes_per_s": stored.stored_bytes() / ours * 1e6, "error": error,
    }  # fmt: skip


def table(results: list[dict[str, Any]], ceiling: float) -> str:
    """Markdown: a row for each shape and share, one table a batch size."""
    lines = [f"Read bandwidth of a plain sum in this run: {ceiling / 1e12:.2f} TB/s."]
    for batch in sorted({row["batch"] for row in results}):
        lines += [
            "",
            f"Batch {batch}:",
            "",
            "| out x in | outliers % | fp16 us | ours us | ratio | TB/s | error |",
            "|---|" + "---:|" * 6,
        ]
        for row in results:
            if row["batch"] == batch:
                lines.append(
                    f"| {row['shape'][0]} x {row['shape'][1]} | {100 * row['outliers']:.2f} | {row['fp16_us']:.1f} "
                    f"| {row['ours_us']:.1f} | {row['ratio']:.2f} | {row['bytes_per_s'] / 1e12:.2f} | {row['error']:.1e} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 1 and 8, three shapes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    shapes, batches = (SHAPES[3:], [1, 8]) if arguments.quick else (SHAPES, BATCHES)
    ceiling = read_bandwidth()
    results = []
    for shape in shapes:
        for batch in batches:
            for share in SHARES:
                results.append(measure(shape, batch, share))
                torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(table(results, ceiling))
    if arguments.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "read_bytes_per_s": ceiling}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

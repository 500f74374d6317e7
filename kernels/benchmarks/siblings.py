"""Time of products of one x with several matrices: one by one, and in one launch (`spqr::linears`).

    PYTHONPATH=.:kernels:kernels/benchmarks python kernels/benchmarks/siblings.py [--batches 1 8 64] [--shares 0 0.0045 0.01]

Prints a table. Clock and weights are those of linear.py; fp16 is one cuBLAS product with the rows of all.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from random_weights import random_tensors
from timing import graph_microseconds
from torch import Tensor

from spqr_format.layout import Layout
from spqr_kernels import joined, ops

FAMILIES = [  # rows of each matrix, columns
    ((4096, 4096, 4096), 4096), ((4096, 1024, 1024), 4096), ((11008, 11008), 4096), ((8192, 1024, 1024), 8192),
    ((28672, 28672), 8192),
]  # fmt: skip
COLD_BYTES = 400e6


def family(rows: tuple[int, ...], columns: int, share: float, seed: int) -> tuple[list[Tensor], list[int]]:
    """The joined tensor of each matrix, and the geometry of all."""
    wholes, geometry = [], []
    for index, out in enumerate(rows):
        tensors, layout = random_tensors(Layout(out, columns), share, 100 * seed + index)
        wholes.append(joined.join(tensors, layout))
        geometry += [int(number) for number in ops.geometry(layout)]
    return wholes, geometry


def measure(rows: tuple[int, ...], columns: int, share: float, batch: int) -> tuple[float, float, float]:
    """Microseconds one by one, together, and of fp16, for so many rows of x."""
    count = max(3, int(COLD_BYTES // (sum(rows) * columns * 0.46)))
    families = [family(rows, columns, share, seed) for seed in range(count)]
    xs = [torch.randn(batch, columns, device="cuda").half() for _ in range(count)]

    def one_by_one(k: int) -> None:
        wholes, geometry = families[k]
        for index, whole in enumerate(wholes):
            torch.ops.spqr.linears(xs[k], [], [whole], geometry[7 * index : 7 * index + 7])

    def together(k: int) -> None:
        wholes, geometry = families[k]
        torch.ops.spqr.linears(xs[k], [], wholes, geometry)

    dense = [torch.randn(sum(rows), columns, device="cuda").half() for _ in range(3)]
    return (
        graph_microseconds([lambda k=k: one_by_one(k) for k in range(count)]),  # type: ignore[misc]
        graph_microseconds([lambda k=k: together(k) for k in range(count)]),  # type: ignore[misc]
        graph_microseconds([lambda k=k: torch.nn.functional.linear(xs[k], dense[k]) for k in range(3)]),  # type: ignore[misc]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="rows of x")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.0045, 0.01], help="of outliers")
    arguments = parser.parse_args()
    print("| rows x columns | batch | outliers % | one by one, us | together, us | fp16, us | fp16 / together |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with torch.no_grad():
        for (rows, columns), batch, share in itertools.product(FAMILIES, arguments.batches, arguments.shares):
            single, together, dense = measure(rows, columns, share, batch)
            shape, percent = " + ".join(map(str, rows)) + f" x {columns}", f"{100 * share:g}"
            ratio = f"{dense / together:.2f}"
            print(f"| {shape} | {batch} | {percent} | {single:.1f} | {together:.1f} | {dense:.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()

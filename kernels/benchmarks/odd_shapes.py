"""Small odd shapes through every kernel of an NVIDIA GPU, for compute-sanitizer to watch: `scripts/test-gpu --sanitizer`.

Prints the largest relative error against float64, and fails above 1e-3. With caching off (PYTORCH_NO_CUDA_MEMORY_CACHING=1)
each tensor is an allocation of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from random_weights import random_tensors
from torch import Tensor

from spqr_format.layout import Layout
from spqr_kernels import dequantize, expert_blocks, experts, joined, ops, reference

MATRICES = [  # tiles that are not full, chunks odd and even, a share of outliers
    (Layout(33, 768), 0.01), (Layout(80, 512, weight_bits=2), 0.02), (Layout(17, 1280), 0.0),
    (Layout(48, 512, weight_bits=4, statistics="direct", group_size=128), 0.01), (Layout(40, 768, group_size=32), 0.01),
    (Layout(150, 4096), 0.01),  # programs in clusters of 4 and 8
]  # fmt: skip
Stored = dict[str, Tensor]


def _rows(batch: int) -> Callable[[Stored, Layout, Tensor], Iterator[tuple[Tensor, Tensor]]]:
    def run(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x = torch.randn(batch, layout.in_features, device=weight.device).half()
        whole = joined.join(tensors, layout)  # as a layer has it, and as products overlap
        yield torch.ops.spqr.linear_forward(x, None, [whole], *ops.geometry(layout)), x.double() @ weight.T

    return run


def _narrowest(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The kernel of many rows with as few as large matrices give it: for small ones another is faster."""
    from spqr_kernels import gemm

    x = torch.randn(20, layout.in_features, device=weight.device).half()
    matrix = joined.Joined(joined.join(tensors, layout), layout)
    yield gemm.linear(x, matrix, layout, None), x.double() @ weight.T


def _older(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    from spqr_kernels import decode

    for batch in (3, 20):
        x = torch.randn(batch, layout.in_features, device=weight.device).half()
        yield decode.linear(x, tensors, layout, None), x.double() @ weight.T


def _dense(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield dequantize(tensors, layout, torch.float16), weight


def _siblings(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    whole, numbers = joined.join(tensors, layout), [int(number) for number in ops.geometry(layout)]
    for batch in (1, 5, 16, 18, 65, 130):
        x = torch.randn(batch, layout.in_features, device=weight.device).half()
        for y in torch.ops.spqr.linears(x, [], [whole] * 3, numbers * 3):
            yield y, x.double() @ weight.T


def _experts(tensors: Stored, layout: Layout, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x = torch.randn(3, layout.in_features, device=weight.device).half()
    layouts = [[layout, layout]] * 2  # gate and up of two experts
    begins, _ = experts.arrange(layouts)
    tables = [table.begins.to(weight.device) for table in experts.tables(layouts, begins)]
    ids = torch.tensor([0, 1, 1, 0, 1, 0], device=weight.device)
    stored, numbers = joined.join(tensors, layout).repeat(4), [int(number) for number in ops.geometry(layout)]
    y = torch.ops.spqr.experts(x, ids, stored, tables, numbers)
    yield y, (x.double() @ weight.T).repeat_interleave(2, 0).repeat(1, 2)
    for width in expert_blocks.WIDTHS:  # one block that is full, one that is not, and an empty one
        ids = torch.tensor([0] * (width + 3) + [1] * 2, device=weight.device)
        x = torch.randn(len(ids), layout.in_features, device=weight.device).half()
        rows, blocks, places = expert_blocks.in_blocks(ids, len(ids), 2, width)
        y = torch.ops.spqr.experts_in_blocks(x[rows], blocks, stored, tables, numbers)[places]
        yield y, (x.double() @ weight.T).repeat(1, 2)


RUNS = {
    "one-row": [_rows(1)], "batches": [*(_rows(batch) for batch in (2, 9, 17, 33, 65, 300)), _narrowest],
    "older-gpus": [_older], "dense": [_dense], "siblings": [_siblings], "experts": [_experts],
}  # fmt: skip


def main() -> None:
    """Run one kind of kernel over all matrices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", choices=RUNS)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    worst = 0.0
    for seed, (shape, share) in enumerate(MATRICES):
        tensors, layout = random_tensors(shape, share, seed, arguments.device)
        weight = reference.dequantize(tensors, layout).double()
        for run in RUNS[arguments.kernels]:
            for y, expected in run(tensors, layout, weight):
                worst = max(worst, ((y.double() - expected).norm() / expected.norm()).item())
    print(f"{arguments.kernels}: relative error up to {worst:.1e}")
    sys.exit(not worst < 1e-3)


if __name__ == "__main__":
    main()

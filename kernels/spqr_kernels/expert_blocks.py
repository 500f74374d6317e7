"""Rows of x brought together by the expert that they go to, in blocks: a matrix is read once for a block, not for each row.

All is counted on the device, in tensors whose shapes the host knows: blocks have room for as many rows as a kernel multiplies
with, each block is one expert's, and there are as many as the worst choice of experts needs; those left over are empty."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a block, by the rows of x that an expert has on average: up to so many. A block of 8, 16, .. rows takes about 1.3,
# 1.6, 2.5, 2.7, 3.8 and 5.9 times as long as a row alone (28672 x 8192 with 1 % of outliers, kernels/benchmarks/README.md; the
# last is half of 512 rows), and an expert has one block that is half empty. Other widths for a number were not timed.
WIDTHS = {8: 5, 16: 13, 32: 22, 64: 52, 128: 160, 256: 1024}
MOST = 1024  # rows an expert on average, beyond which a layer's rows are taken in turns: their copies need memory
_LEAST = 2  # from which blocks are faster than rows alone: by 5 to 10 % there, twice as fast with four


class Blocks(NamedTuple):
    """What `in_blocks` makes of the experts of each row."""

    rows: Tensor  # int64 [blocks * width]: which row of x stands there; 0 where none does
    table: Tensor  # int32 [blocks, 2]: the block's expert and how many rows it has; -1 and 0 for an empty block
    places: Tensor  # int64 [pairs]: where a row's pair with an expert stands


def width_for(pairs: int, experts: int) -> int | None:
    """Rows of a block for so many pairs of a row and an expert; None where rows alone are better."""
    if pairs < _LEAST * experts:
        return None
    return next((width for width, most in WIDTHS.items() if pairs <= most * experts), max(WIDTHS))


def most_blocks(pairs: int, experts: int, width: int) -> int:
    """How many blocks there are at most: each expert that has any pair has one that is not full."""
    return (pairs + min(experts, pairs) * (width - 1)) // width


def in_blocks(ids: Tensor, rows: int, experts: int, width: int) -> Blocks:
    """ids: int64 [pairs], the experts of row 0, then of row 1, ..., as many for each of `rows`, all of 0 .. experts - 1."""
    pairs = ids.numel()
    blocks = most_blocks(pairs, experts, width)
    # By a sort, which takes the same time for few and for many experts; 16 bits are a quarter of the passes of 64.
    chosen, order = ids.to(torch.int16 if experts <= 2**15 else torch.int64).sort(stable=True)
    chosen = chosen.long()
    edges = torch.searchsorted(chosen, torch.arange(experts + 1, device=ids.device))
    first = edges[:-1]  # of each expert's pairs, in order
    count = edges[1:] - first
    needed = (count + (width - 1)) // width
    end = needed.cumsum(0)  # of its blocks
    begin = end - needed
    place = (begin * width - first)[chosen] + torch.arange(pairs, device=ids.device)
    places = torch.empty_like(ids).scatter_(0, order, place)
    standing = torch.zeros(blocks * width, dtype=torch.int64, device=ids.device)
    standing.scatter_(0, place, order // (pairs // rows))
    block = torch.arange(blocks, device=ids.device)
    expert = torch.searchsorted(end, block, right=True)
    there = expert < experts
    expert = expert.clamp(max=experts - 1)
    left = (count[expert] - (block - begin[expert]) * width).clamp(max=width)
    table = torch.stack([torch.where(there, expert, -1), torch.where(there, left, 0)], 1).to(torch.int32)
    return Blocks(standing, table, places)

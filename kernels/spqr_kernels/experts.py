"""Experts: many matrices of one shape, of which each row of x is multiplied with a few that the device knows.

All lie in one tensor, their outliers too, and a table says where each begins: so one launch reaches whichever the router
chose, without asking the host. Bits and statistics may differ from expert to expert; then there is a launch for each kind,
whose programs leave the others' pairs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout

from .joined import Joined, length


@dataclass(frozen=True)
class Table:
    """Where the matrices of one kind are: `begins` int64 [experts, parts, 2], the first word of an expert's part and how many
    outliers it has; -1 and 0 where that is of another kind. `layout`: of the kind, with the most outliers of any. Matrices
    without outliers are a kind of their own."""

    layout: Layout
    begins: Tensor


def arrange(layouts: Sequence[Sequence[Layout]]) -> tuple[list[list[int]], int]:
    """The first word of each expert's parts, one behind the other, and the word behind the last."""
    begins: list[list[int]] = []
    begin = 0
    for parts in layouts:
        begins.append([])
        for layout in parts:
            begins[-1].append(begin)
            begin += length(layout)
    return begins, begin


def tables(layouts: Sequence[Sequence[Layout]], begins: Sequence[Sequence[int]]) -> list[Table]:
    """One for each kind of matrix among the parts of all experts, on the CPU."""
    kinds: dict[Layout, list[tuple[int, int]]] = {}
    for expert, parts in enumerate(layouts):
        for part, layout in enumerate(parts):
            kinds.setdefault(layout.with_outliers(min(layout.outliers, 1)), []).append((expert, part))
    found = []
    for kind, places in kinds.items():
        table = torch.zeros(len(layouts), len(layouts[0]), 2, dtype=torch.int64)
        table[:, :, 0] = -1
        for expert, part in places:
            table[expert, part, 0] = begins[expert][part]
            table[expert, part, 1] = layouts[expert][part].outliers
        found.append(Table(kind.with_outliers(int(table[:, :, 1].max())), table))
    return found


def one_by_one(x: Tensor, ids: Tensor, stored: Tensor, found: Sequence[Table]) -> Tensor:
    """As `grouped.experts`, expert by expert, on any device: waits for the device to know them. Raises SpqrError E509 for one
    that is not there, where a launch for all gives NaN."""
    from .dispatch import linear  # here, because that module imports this one

    parts, out_features = found[0].begins.shape[1], found[0].layout.out_features
    y = x.new_empty(ids.numel(), parts, out_features)
    row = torch.arange(ids.numel(), device=x.device) // (ids.numel() // x.shape[0])
    for expert in ids.unique().tolist():
        _check_expert(expert, found, "spqr::experts.ids")
        pairs = torch.where(ids == expert)[0]
        for part, (layout, tensors) in enumerate(_matrices(expert, stored, found)):
            y[pairs, part] = linear(x[row[pairs]], tensors, layout, None)
    return y.view(ids.numel(), parts * out_features)


def block_by_block(x: Tensor, blocks: Tensor, stored: Tensor, found: Sequence[Table]) -> Tensor:
    """As `expert_batches.experts_in_blocks`, on any device: waits for the device to know the blocks. Rows that no block has are
    0. Raises SpqrError E509 for an expert that is not there."""
    from .dispatch import linear

    parts, out_features = found[0].begins.shape[1], found[0].layout.out_features
    y = x.new_zeros(len(blocks), len(x) // len(blocks), parts, out_features)
    for block, (expert, rows) in enumerate(blocks.tolist()):
        if rows == 0:
            continue
        _check_expert(expert, found, "spqr::experts_in_blocks.blocks")
        its = x.view(len(blocks), -1, x.shape[1])[block, :rows]
        for part, (layout, tensors) in enumerate(_matrices(expert, stored, found)):
            y[block, :rows, part] = linear(its, tensors, layout, None)
    return y.view(len(x), parts * out_features)


def _check_expert(expert: int, found: Sequence[Table], where: str) -> None:
    if not 0 <= expert < len(found[0].begins):
        raise SpqrError("E509", where, f"expert {expert} of {len(found[0].begins)}")


def _matrices(expert: int, stored: Tensor, found: Sequence[Table]) -> Iterator[tuple[Layout, Joined]]:
    """Of each part of an expert, whose tables are read from the device."""
    entries = [(table.layout, table.begins[expert].tolist()) for table in found]
    for part in range(found[0].begins.shape[1]):
        kind, begin, outliers = next((kind, *its[part]) for kind, its in entries if its[part][0] >= 0)
        layout = kind.with_outliers(outliers)
        yield layout, Joined(stored[begin : begin + length(layout)], layout)

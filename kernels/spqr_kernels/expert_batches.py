"""Experts with several rows of x each, in one launch: blocks of rows (`expert_blocks`) times the matrices of their experts.

A program does whole pieces of Y, as in `small` and `gemm`, of one block; those of an empty block, or of an expert of another
kind, have nothing to do. Blocks of one expert run side by side, so that its matrix may come from L2 for all but the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div

from . import gemm, overlap, small
from .checks import aligned
from .experts import Table
from .joined_words import leaves_in, words_of
from .launch import REMEMBERED, Launch
from .overlap import await_previous
from .prepare import prepare_launch, prepared
from .siblings import alike

_FEW = 16  # rows of a block that `small` multiplies: there are as many matrices as fill a GPU
_CHUNKS = 16  # of a program, about: so many that its begin does not count


@gluon.jit
def _of_program(Blocks, Table, Y, programs, experts, out_features, BATCH, PARTS: gl.constexpr, DEPENDENT: gl.constexpr):
    """Of a program: the first row of its block, where its part of Y begins, its own number, how many rows the block has, and
    the word at which its matrix begins; -1 where there is nothing to multiply. Y of an expert that is not there becomes NaN."""
    block = gl.program_id(0)
    part = gl.program_id(1) // programs
    program = gl.program_id(1) % programs
    blocks_at = Blocks + block * 2
    if DEPENDENT:  # the router's choice comes from a kernel before
        blocks_at = await_previous(blocks_at)
    expert = gl.load(blocks_at)
    rows = gl.load(blocks_at + 1)
    known = (expert >= 0) & (expert < experts)
    begin = gl.load(Table + (expert.to(gl.int64) * PARTS + part) * 2, mask=known, other=-1)
    first = block.to(gl.int64) * BATCH
    y = Y + (first * PARTS + part) * out_features
    if (expert >= experts) & (program == 0):
        column = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        nothing = gl.full([128], float("nan"), gl.float32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        row_at = y
        for _ in range(0, gl.minimum(rows, BATCH)):
            for at in range(0, out_features, 128):
                gl.store(row_at + at + column, nothing.to(Y.dtype.element_ty), mask=at + column < out_features)
            row_at += PARTS * out_features
    return first, y, program, rows, begin


_INTEGERS = ("programs", "experts", "chunks", "groups", "reciprocal", "out_features", "base")


@gluon.jit(do_not_specialize=_INTEGERS)
def few_rows_kernel(
    X, Scale, Blocks, Table, Stored, Y,
    programs, experts, chunks, groups, reciprocal, out_features, base, at_scales, at_zeros, at_pointers, at_outliers,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, SCALED: gl.constexpr, BATCH: gl.constexpr,
    WARPS: gl.constexpr, TALL: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, SETS: gl.constexpr, ROOM: gl.constexpr,
    DEPENDENT: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Y[block, n, part, o] = sum_i W[expert of block, part][o, i] X[block, n, i] for the rows n that the block has.

    X fp16 [blocks, BATCH, chunks * 256], times Scale fp32 [blocks, BATCH] where SCALED; Y [blocks, BATCH, PARTS, out]. Blocks
    int32 [blocks, 2] as in `expert_blocks.Blocks`; Table int64 [experts, PARTS, 2] as in `experts.Table`. A part is done by
    so many `programs`, each of `base` positions, which are whole pieces."""
    first, y, program, rows, begin = _of_program(Blocks, Table, Y, programs, experts, out_features, BATCH, PARTS, DEPENDENT)
    if begin >= 0:
        leaves = leaves_in(Stored + gl.multiple_of(begin, 32), (at_scales, at_zeros, at_pointers, at_outliers))
        nothing = Y.to(gl.pointer_type(gl.float32))  # no piece is shared
        small.share_of_product(
            program, X + first * (chunks * 256), Scale + first, *leaves, y, y, nothing, nothing.to(gl.pointer_type(gl.int64)),
            rows, out_features, gl.cdiv(out_features, 16), chunks, groups, reciprocal, base, 0, BITS, BILEVEL, BLOCKS_A_GROUP,
            False, SCALED, BATCH, WARPS, TALL, STAGES, KEPT, SETS, ROOM, DEPENDENT, PARTS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def many_rows_kernel(
    X, Scale, Blocks, Table, Stored, Y,
    programs, experts, chunks, groups, out_features, base, at_scales, at_zeros, at_pointers, at_outliers,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr, SCALED: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """The same with `gemm`'s way of a product. X fp16 as `prepare.py` makes it, a block in each of its slots."""
    first, y, program, rows, begin = _of_program(Blocks, Table, Y, programs, experts, out_features, BATCH, PARTS, DEPENDENT)
    if begin >= 0:
        leaves = leaves_in(Stored + gl.multiple_of(begin, 32), (at_scales, at_zeros, at_pointers, at_outliers))
        nothing = Y.to(gl.pointer_type(gl.float32))  # no piece is shared
        gemm.share_of_product(
            program, X + first * (chunks * 256), Scale + first, *leaves, y, y, nothing, nothing.to(gl.pointer_type(gl.int64)),
            rows, out_features, gl.cdiv(out_features, 16), chunks, groups, 1, base, 0, BITS, BILEVEL, BLOCKS_A_GROUP, OUTLIERS,
            False, SCALED, BATCH, WARPS, ROOM, ENTRIES, DEPENDENT, PARTS,
        )  # fmt: skip


def pieces_of_a_program(pieces: int, chunks: int) -> int:
    """A divisor of `pieces`: the largest for which a program has no more than about _CHUNKS chunks, or 1."""
    most = max(1, _CHUNKS // chunks)
    return next(count for count in range(min(most, pieces), 0, -1) if pieces % count == 0)


@lru_cache(REMEMBERED)
def _launches(
    layout: Layout, kept: int, entries: int, experts: int, parts: int, blocks: int, width: int, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch | None, Launch]:  # fmt: skip
    """What makes x anew where need be, and the product. layout, kept and entries: as `siblings.alike` has
    them."""
    chunks = layout.blocks // CHUNK
    few, scaled = width <= _FEW, dtype == torch.bfloat16
    if few:
        all_chunks = layout.tile_rows * chunks * parts * min(experts, blocks)
        large = small.is_large(width, all_chunks, kept > 0)
        how = small.choice_for(width, layout.statistics == "bilevel", large)
        constants, tiles = small.constants_for(layout, kept, width, how), how.warps * how.tall
    else:
        constants, tiles = gemm.constants_for(layout, entries, width), gemm.CHOICES[width].warps
    overlaps = overlap.options(device)
    constants |= overlaps | {"SCALED": scaled, "PARTS": parts}
    prepare = None
    if not few or scaled or layout.blocks * TILE != layout.in_features:
        prepare = prepare_launch(layout, blocks * width, dtype, device, 0 if few else width, overlaps)
    pieces = ceil_div(layout.tile_rows, tiles)
    together = pieces_of_a_program(pieces, chunks)
    sizes = [pieces // together, experts, chunks, layout.groups, *([(2**31 - 1) // chunks] if few else [])]
    integers = (*sizes, layout.out_features, together * chunks, *words_of(layout))
    dtypes = (torch.float16, torch.float32, torch.int32, torch.int64, torch.int32, dtype)
    grid = (blocks, pieces // together * parts)
    return prepare, Launch(few_rows_kernel if few else many_rows_kernel, grid, device, dtypes, integers, constants)


def experts_in_blocks(x: Tensor, blocks: Tensor, stored: Tensor, tables: Sequence[Table]) -> Tensor:
    """Products of the rows of each block with the parts of its expert's matrix, side by side.

    x: fp16 or bf16 [blocks * width, in], contiguous, width one of `expert_blocks.WIDTHS`. blocks: int32 [blocks, 2], as
    `expert_blocks.in_blocks` has it. stored: int32, all matrices. tables: one for each kind, of whole chunks, not permuted.
    Returns [blocks * width, parts * out] in x's dtype; what no block has a row for is not written; NaN for an expert that
    is not there.
    """
    parts, out_features = tables[0].begins.shape[1], tables[0].layout.out_features
    width = len(x) // len(blocks)
    y = torch.empty(len(x), parts * out_features, dtype=x.dtype, device=x.device)
    x = aligned(x)
    made, scale = x, y  # where the kernels are told not to look
    for table in tables:
        (shape,), kept, entries = alike((table.layout,))
        prepare, product = _launches(shape, kept, entries, len(table.begins), parts, len(blocks), width, x.dtype, x.device)
        if prepare is not None and made is x:  # the same for all kinds
            made, scale = prepared(prepare, x, shape, len(x))
        product(
            made.data_ptr(), scale.data_ptr(), blocks.data_ptr(), table.begins.data_ptr(), stored.data_ptr(), y.data_ptr()
        )  # fmt: skip
    return y

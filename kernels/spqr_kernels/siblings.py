"""Matrices that share x, as q, k and v or gate and up do, in one launch: for one row of x, few rows, and many.

The programs of one launch keep the GPU full where those of a small matrix would not, a launch costs its start and its end once,
and x is made ready once. A program has to do with one matrix only, as in a launch of that alone, with what suits the tiles of
all: sums may be added in another order than in a launch of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout

from . import gemm, matvec, outliers, overlap, pair_outliers, small
from .checks import aligned
from .dispatch import TOGETHER
from .joined_words import leaves_in, words_of
from .launch import REMEMBERED, Launch
from .prepare import prepared
from .shares import Share


@gluon.jit
def _of(program, first1, first2, three):
    """That of three which belongs to a program: the second from program first1 on, the third from first2 on."""
    return gl.where(program >= first2, three[2], gl.where(program >= first1, three[1], three[0]))


@gluon.jit
def _first(program, first1, first2):
    """The first program of a program's matrix."""
    return gl.where(program >= first2, first2, gl.where(program >= first1, first1, 0))


@gluon.jit
def _leaves(program, first1, first2, joined, words0, words1, words2):
    """`leaves_in` of a program's matrix."""
    words = ()
    for i in gl.static_range(len(words0)):
        words = words + (_of(program, first1, first2, (words0[i], words1[i], words2[i])),)
    return leaves_in(_of(program, first1, first2, joined), words)


@gluon.jit
def row_kernel(
    X, Joined0, Joined1, Joined2, Bias0, Bias1, Bias2, Y0, Y1, Y2,
    chunks, groups, first1, first2,
    at_scales0, at_zeros0, at_pointers0, at_outliers0, out_features0, outliers0,
    at_scales1, at_zeros1, at_pointers1, at_outliers1, out_features1, outliers1,
    at_scales2, at_zeros2, at_pointers2, at_outliers2, out_features2, outliers2,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y0, Y1 and Y2 from one X [chunks * 256]. Where there are but two, first2 is the number of programs."""
    program = gl.program_id(0)
    leaves = _leaves(
        program, first1, first2, (Joined0, Joined1, Joined2), (at_scales0, at_zeros0, at_pointers0, at_outliers0),
        (at_scales1, at_zeros1, at_pointers1, at_outliers1), (at_scales2, at_zeros2, at_pointers2, at_outliers2),
    )  # fmt: skip
    matvec.product_of_tile(
        program - _first(program, first1, first2), X, X, *leaves, _of(program, first1, first2, (Bias0, Bias1, Bias2)),
        _of(program, first1, first2, (Y0, Y1, Y2)),
        _of(program, first1, first2, (out_features0, out_features1, out_features2)), chunks, groups,
        _of(program, first1, first2, (outliers0, outliers1, outliers2)), BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, True,
        False, HAS_BIAS, WHOLE, WARPS, ENTRIES, DEPENDENT,
    )  # fmt: skip


_INTEGERS = (
    "batch", "chunks", "groups", "reciprocal", "parts", "first1", "first2",
    *(f"{name}{i}" for name in ("out_features", "base", "extra") for i in range(TOGETHER)),
)  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def few_rows_kernel(
    X, Scale, Joined0, Joined1, Joined2, Bias0, Bias1, Bias2, Y0, Y1, Y2, Partial,
    batch, chunks, groups, reciprocal, first1, first2,
    at_scales0, at_zeros0, at_pointers0, at_outliers0, out_features0, base0, extra0,
    at_scales1, at_zeros1, at_pointers1, at_outliers1, out_features1, base1, extra1,
    at_scales2, at_zeros2, at_pointers2, at_outliers2, out_features2, base2, extra2,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TALL: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr,
    SETS: gl.constexpr, ROOM: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`small_kernel` of three matrices, base and extra of each for the programs that it has."""
    NUMBERS: gl.constexpr = 2 * 16 * TALL * WARPS * BATCH  # in Partial, of a program
    program = gl.program_id(0)
    leaves = _leaves(
        program, first1, first2, (Joined0, Joined1, Joined2), (at_scales0, at_zeros0, at_pointers0, at_outliers0),
        (at_scales1, at_zeros1, at_pointers1, at_outliers1), (at_scales2, at_zeros2, at_pointers2, at_outliers2),
    )  # fmt: skip
    first = _first(program, first1, first2)
    out_features = _of(program, first1, first2, (out_features0, out_features1, out_features2))
    flags = Partial.to(gl.pointer_type(gl.int64)) + (gl.num_programs(0) * (NUMBERS // 2) + first)
    small.share_of_product(
        program - first, X, Scale, *leaves, _of(program, first1, first2, (Bias0, Bias1, Bias2)),
        _of(program, first1, first2, (Y0, Y1, Y2)), Partial + first * NUMBERS, flags, batch, out_features,
        gl.cdiv(out_features, 16), chunks, groups, reciprocal, _of(program, first1, first2, (base0, base1, base2)),
        _of(program, first1, first2, (extra0, extra1, extra2)), BITS, BILEVEL, BLOCKS_A_GROUP, HAS_BIAS, SCALED, BATCH, WARPS,
        TALL, STAGES, KEPT, SETS, ROOM, DEPENDENT,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def many_rows_kernel(
    X, Scale, Joined0, Joined1, Joined2, Bias0, Bias1, Bias2, Y0, Y1, Y2, Partial,
    batch, chunks, groups, parts, first1, first2,
    at_scales0, at_zeros0, at_pointers0, at_outliers0, out_features0, base0, extra0,
    at_scales1, at_zeros1, at_pointers1, at_outliers1, out_features1, base1, extra1,
    at_scales2, at_zeros2, at_pointers2, at_outliers2, out_features2, base2, extra2,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr,
    ENTRIES: gl.constexpr, CLUSTER: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`gemm_kernel` of three matrices, base and extra of each for the programs that it has."""
    NUMBERS: gl.constexpr = 16 * WARPS * BATCH  # in Partial, of a program
    program = gl.program_id(0)
    leaves = _leaves(
        program, first1, first2, (Joined0, Joined1, Joined2), (at_scales0, at_zeros0, at_pointers0, at_outliers0),
        (at_scales1, at_zeros1, at_pointers1, at_outliers1), (at_scales2, at_zeros2, at_pointers2, at_outliers2),
    )  # fmt: skip
    first = _first(program, first1, first2)
    out_features = _of(program, first1, first2, (out_features0, out_features1, out_features2))
    flags = Partial.to(gl.pointer_type(gl.int64)) + (gl.num_programs(0) * (NUMBERS // 2) + first)
    gemm.share_of_product(
        program - first, X, Scale, *leaves, _of(program, first1, first2, (Bias0, Bias1, Bias2)),
        _of(program, first1, first2, (Y0, Y1, Y2)), Partial + first * NUMBERS, flags, batch, out_features,
        gl.cdiv(out_features, 16), chunks, groups, parts, _of(program, first1, first2, (base0, base1, base2)),
        _of(program, first1, first2, (extra0, extra1, extra2)), BITS, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, HAS_BIAS, SCALED,
        BATCH, WARPS, ROOM, ENTRIES, DEPENDENT, 1, CLUSTER,
    )  # fmt: skip


def three(found: Sequence[Any]) -> list[Any]:
    """With the last one in the place of a third, where there are two."""
    return [*found, *[found[-1]] * (TOGETHER - len(found))]


def _pointers(dtype: torch.dtype, bias: torch.dtype | None) -> list[torch.dtype]:
    """What stored matrices, biases and results point to."""
    return [kind for kind in (torch.int32, bias or dtype, dtype) for _ in range(TOGETHER)]


def _addresses(joined: Sequence[Tensor], biases: Sequence[Tensor], results: Sequence[Tensor]) -> list[int]:
    matrices, to = three([tensor.data_ptr() for tensor in joined]), three([tensor.data_ptr() for tensor in results])
    return matrices + (three([tensor.data_ptr() for tensor in biases]) if biases else to) + to


def _begins(programs: Sequence[int]) -> list[int]:
    """first1 and first2 of matrices that have so many programs."""
    return [programs[0], programs[0] + programs[1]]


@cache
def row_launch(layouts: tuple[Layout, ...], dtype: torch.dtype, bias: torch.dtype | None, device: torch.device) -> Launch:
    """For one row of x: of x, each matrix, each bias, or what is not read, and each result, three of each."""
    tiles = [layout.tile_rows for layout in layouts]
    first = layouts[0]
    integers = [first.blocks // CHUNK, first.groups, *_begins(tiles)]
    for layout in three(layouts):
        integers += [*words_of(layout), layout.out_features, layout.outliers]
    entries = max(pair_outliers.entries(layout) for layout in layouts)
    constants = {"HAS_BIAS": bias is not None} | matvec.row_constants(first, entries, sum(tiles), dtype)
    constants |= overlap.options(device)
    return Launch(row_kernel, (sum(tiles), 1), device, (dtype, *_pointers(dtype, bias)), integers, constants)


def _geometry(layouts: Sequence[Layout], shares: Sequence[Share]) -> list[int]:
    """What a kernel of several rows is given of its matrices, behind the first programs of the second and the third."""
    found = _begins([share.programs for share in shares])
    for layout, share in zip(three(layouts), three(shares), strict=True):
        found += [*words_of(layout), layout.out_features, share.base, share.extra]
    return found


@lru_cache(REMEMBERED)
def _few_rows(
    layouts: tuple[Layout, ...], kept: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device
) -> small.Launches:
    """layouts: as `alike` has them. kept: the most words of outliers that one of them asks for."""
    plan = small.plan_of(layouts, kept, batch, dtype, device, joined=True)
    integers = (batch, *plan.sizes, *_geometry(layouts, plan.shares))
    dtypes = (torch.float16, torch.float32, *_pointers(dtype, bias), torch.float32)
    constants = {"HAS_BIAS": bias is not None} | plan.constants
    product = Launch(few_rows_kernel, (plan.programs, 1), device, dtypes, integers, constants)
    return small.Launches(plan.prepare, product, plan.parts)


@lru_cache(REMEMBERED)
def _many_rows(
    layouts: tuple[Layout, ...], entries: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device
) -> gemm.Launches:
    """layouts: as `alike` has them. entries: the most outliers of a cell that a lane fetches of one of them."""
    plan, prepare, constants = gemm.plan_of(layouts, entries, batch, dtype, device, joined=True)
    integers = (batch, layouts[0].blocks // CHUNK, layouts[0].groups, plan.parts, *_geometry(layouts, plan.shares))
    dtypes = (torch.float16, torch.float32, *_pointers(dtype, bias), torch.float32)
    constants |= {"HAS_BIAS": bias is not None}
    product = Launch(many_rows_kernel, (plan.programs, 1), device, dtypes, integers, constants, plan.cluster)
    return gemm.Launches(plan, prepare, product)


@cache
def alike(layouts: tuple[Layout, ...]) -> tuple[tuple[Layout, ...], int, int]:
    """What launches for matrices are looked up by: their layouts, with one outlier in the place of all, and what `small` and
    `gemm` keep of outliers, of those that have most."""
    kept = max(small.outliers_of_a_chunk(layout) for layout in layouts)
    entries = max(outliers.without_outliers(layout)[1] for layout in layouts)
    return tuple(layout.with_outliers(min(layout.outliers, 1)) for layout in layouts), kept, entries


def linears(x: Tensor, joined: Sequence[Tensor], layouts: tuple[Layout, ...], biases: Sequence[Tensor]) -> list[Tensor]:
    """x W^T + bias for each of two or three matrices that one launch can take (`dispatch.in_one_launch`).

    x: fp16 or bf16 [..., in], not empty. joined: what `joined.join` makes of each. biases: one of a dtype for each, or none.
    Returns [..., out] of each in x's dtype.
    """
    dtype, leading, in_features = x.dtype, x.shape[:-1], layouts[0].in_features
    batch = x.numel() // in_features
    results = [x.new_empty((*leading, layout.out_features)) for layout in layouts]
    added = [aligned(bias) for bias in biases]
    given = biases[0].dtype if biases else None
    x = aligned(x)
    others = _addresses(joined, added, results)
    if batch == 1:
        padding = layouts[0].blocks * TILE - in_features
        x = torch.nn.functional.pad(x, (0, padding)) if padding else x
        row_launch(layouts, dtype, given, x.device)(x.data_ptr(), *others)
        return results
    x = x.view(batch, in_features)
    shapes, kept, entries = alike(layouts)
    scale = results[0]  # where the kernels are told not to look
    if batch <= small.most_rows(shapes, dtype):
        prepare, product, parts = _few_rows(shapes, kept, batch, dtype, given, x.device)
        if prepare is not None:
            x, scale = prepared(prepare, x, layouts[0], batch)
    else:
        plan, prepare, product = _many_rows(shapes, entries, batch, dtype, given, x.device)
        x, scale = prepared(prepare, x, layouts[0], plan.parts * plan.width)
        parts = plan.partial
    partial = torch.empty(parts, dtype=torch.float32, device=x.device) if parts else scale
    product(x.data_ptr(), scale.data_ptr(), *others, partial.data_ptr())
    return results

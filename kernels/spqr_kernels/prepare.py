"""x made anew in fp16 before a product of several rows: scaled where it is bf16, and in the order in which `gemm` copies it."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import TILE, Layout, ceil_div

from .launch import Launch
from .overlap import await_previous, let_next_begin

_COLUMNS = gl.constexpr(2048)  # that a program makes at once
_ROOM = gl.constexpr(49 << 10)  # bytes of shared memory of a program of `slots_kernel`
_PROGRAMS = 512  # of a launch of `slots_kernel` that scales, for rows so few that several share one


@gluon.jit
def _factor(largest):
    """The power of two by which a row is scaled, whose largest value this is, and its inverse."""
    # fields of the exponent: 268 - e brings 2**(e - 127) to 2**14; 253 at most, for its inverse to be no subnormal
    exponent = gl.minimum(268 - (largest.to(gl.int32, bitcast=True) >> 23), 253)
    return (exponent << 23).to(gl.float32, bitcast=True), ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def prepare_kernel(
    X, Out, Scale, in_features, columns,
    SCALED: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """A row of X [batch, in_features] in fp16, zeros behind in_features: to Out [batch, columns], or where WIDTH is not 0 to
    slots as `slots.py` has them, Out [batch / WIDTH, columns / 64, WIDTH, 64].

    SCALED: by a power of two that brings its largest value below 2**15, with the inverse in Scale; exact for all that is
    within 2**-29 of the largest. A program takes BLOCK columns, or a whole row where SCALED."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    row = gl.program_id(0).to(gl.int64)
    begin = gl.program_id(1) * BLOCK
    end = begin + BLOCK
    near = gl.arange(0, BLOCK, layout=layout)
    if DEPENDENT:
        # Before the wait: the next kernel is a product of ours, which waits for all of this one before it reads or writes what
        # others do. Behind other kernels, torch's may follow that only wait for what they read of the one before them.
        let_next_begin(near)
        await_previous(X + near)
    factor = 1.0
    if SCALED:
        end = columns
        largest = gl.zeros([BLOCK], gl.float32, layout)
        for at in range(0, in_features, BLOCK):
            x = gl.load(X + row * in_features + at + near, mask=at + near < in_features, other=0)
            largest = gl.maximum(largest, gl.abs(x.to(gl.float32)))
        factor, inverse = _factor(gl.max(largest, axis=0))
        gl.store(Scale + row, inverse)
    for at in range(begin, end, BLOCK):
        to = at + near
        source = to
        target = Out + row * columns + to
        if WIDTH > 0:
            source = to // 64 * 64 + to % 8 // 2 * 16 + to % 64 // 16 * 4 + to % 16 // 8 * 2 + to % 2
            slot = (row // WIDTH * (columns // 64) + to // 64) * WIDTH + row % WIDTH
            target = Out + slot * 64 + (((to % 64 // 8) ^ (row % 8)) * 8 + to % 8)
        x = gl.load(X + row * in_features + source, mask=source < in_features, other=0)
        gl.store(target, (x.to(gl.float32) * factor).to(gl.float16), mask=to < columns)


@gluon.jit
def _halves(words):
    """Both bf16 of a word as float32."""
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _bits(x):
    """Of x as fp16, int32."""
    return x.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF


@gluon.jit
def slots_kernel(
    X, Out, Scale, in_features, columns, SCALED: gl.constexpr, WIDTH: gl.constexpr, DEPENDENT: gl.constexpr
):  # fmt: skip
    """What `prepare_kernel` makes in slots, for in_features a multiple of 8 and faster: a thread writes the 16 bytes of a unit
    of 8 columns at once, from four words that it reads. Where SCALED, each program of a row looks for the largest value on its
    own; they share the columns.

    It asks for shared memory that it does not need: with four programs a multiprocessor they spread over all of them, where 16
    would gather on the first ones that the kernel before leaves. Products of 32, 256 and 512 rows are 1 to 5 % faster so."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    UNITS: gl.constexpr = _COLUMNS // 8
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    memory = gl.allocate_shared_memory(gl.int32, [_ROOM // 512, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    memory.index(0).store(thread)  # or there would be none
    row = gl.program_id(0).to(gl.int64)
    unit = gl.arange(0, UNITS, layout=gl.SliceLayout(1, layout))[:, None]
    part = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))[None, :]
    words_at = X.to(gl.pointer_type(gl.int32)) + row * (in_features // 2)
    if DEPENDENT:  # as in `prepare_kernel`
        let_next_begin(unit * 4 + part)
        await_previous(words_at + (unit * 4 + part))
    if SCALED:
        largest = gl.zeros([UNITS, 4], gl.float32, layout)
        for at in range(0, in_features, 4 * _COLUMNS):  # so many at once, as each waits for its reads
            for k in gl.static_range(4):
                begin = at + k * _COLUMNS
                words = gl.load(words_at + (begin // 2 + unit * 4 + part), mask=begin + 8 * unit < in_features, other=0)
                low, high = _halves(words)
                largest = gl.maximum(largest, gl.maximum(gl.abs(low), gl.abs(high)))
        factor, inverse = _factor(gl.max(gl.max(largest, axis=1), axis=0))
        if gl.program_id(1) == 0:
            gl.store(Scale + row, inverse)
    for at in range(gl.program_id(1) * _COLUMNS, columns, gl.num_programs(1) * _COLUMNS):
        source = at // 2 + (unit // 8 * 32 + unit % 8) + part * 8
        slot = (row // WIDTH * (columns // 64) + (at // 64 + unit // 8)) * WIDTH + row % WIDTH
        words = gl.load(words_at + source, mask=2 * source < in_features, other=0)
        if SCALED:
            low, high = _halves(words)
            words = _bits(low * factor) | (_bits(high * factor) << 16)
        target = slot * 32 + ((unit % 8) ^ (row % 8)) * 4 + part
        gl.store(Out.to(gl.pointer_type(gl.int32)) + target, words, mask=at + 8 * unit < columns)


def prepare_launch(
    layout: Layout, batch: int, dtype: torch.dtype, device: torch.device, width: int, overlaps: dict[str, bool]
) -> Launch:
    """x of this dtype, [batch, in], made anew: scaled from bf16, as weights are exact enough in fp16 but not in bf16. width: of
    the slots, 0 for rows."""
    scaled, columns = dtype == torch.bfloat16, layout.blocks * TILE
    types, integers = (dtype, torch.float16, torch.float32), (layout.in_features, columns)
    if width and layout.in_features % 8 == 0:
        parts = ceil_div(columns, _COLUMNS.value)
        if scaled:
            parts = max(1, min(parts, _PROGRAMS // batch))
        constants = {"SCALED": scaled, "WIDTH": width, "num_warps": 4} | overlaps
        return Launch(slots_kernel, (batch, parts), device, types, integers, constants)
    grid = (batch, 1 if scaled else ceil_div(columns, _COLUMNS.value))
    constants = {"SCALED": scaled, "WIDTH": width, "BLOCK": _COLUMNS.value, "num_warps": 4} | overlaps
    return Launch(prepare_kernel, grid, device, types, integers, constants)


def prepared(prepare: Launch, x: Tensor, layout: Layout, rows: int) -> tuple[Tensor, Tensor]:
    """x as `prepare` makes it, fp16 [rows, blocks * 16], where rows is a multiple of its width, and what the rows of the
    product are multiplied with, float32 [batch] for bf16; else it is not read."""
    made = torch.empty(rows, layout.blocks * TILE, dtype=torch.float16, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if x.dtype == torch.bfloat16 else made
    prepare(x.data_ptr(), made.data_ptr(), scale.data_ptr())
    return made, scale

"""The torch operators, visible to torch.compile: `spqr::linear`, differentiable in x, and `spqr::dequantize`; `linear_forward`
is `linear` for where no gradient is asked for, and `linears` is several of those of one x.

Registered by their schemas: around an eager call `torch.library.custom_op` puts checks that these need not. An operator with
a gradient passes through Python twice in a call, and that is half of the time that the host takes for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout

from . import dispatch
from .checks import (
    aligned,
    check_blocks,
    check_ids,
    check_joined,
    check_names,
    check_operand,
    check_tables,
    check_tensors,
)
from .experts import Table
from .joined import Joined, places

# stored: the tensors of `Layout.tensors()` in their order, or the one that `joined.join` makes of them.
_MATRIX = (
    "Tensor[] stored, int out_features, int in_features, int weight_bits, int group_size, bool bilevel, int outliers,"
    " bool permuted"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("spqr::linear", f"(Tensor x, Tensor? bias, {_MATRIX}) -> Tensor", tags=_TAGS)
torch.library.define("spqr::linear_forward", f"(Tensor x, Tensor? bias, {_MATRIX}) -> Tensor", tags=_TAGS)
# biases: none, or one for each. joined: of `joined.join`. geometry: `geometry` of each, one behind the other.
torch.library.define("spqr::linears", "(Tensor x, Tensor[] biases, Tensor[] joined, int[] geometry) -> Tensor[]", tags=_TAGS)
# ids: the experts of row 0, of row 1, ... tables and geometry: one for each kind of matrix, see `experts.Table`.
torch.library.define(
    "spqr::experts", "(Tensor x, Tensor ids, Tensor stored, Tensor[] tables, int[] geometry) -> Tensor", tags=_TAGS
)
# blocks: of `expert_blocks.in_blocks`; x: their rows, one block behind the other.
torch.library.define(
    "spqr::experts_in_blocks", "(Tensor x, Tensor blocks, Tensor stored, Tensor[] tables, int[] geometry) -> Tensor", tags=_TAGS
)
torch.library.define("spqr::dequantize", f"({_MATRIX}, ScalarType dtype) -> Tensor", tags=_TAGS)


def geometry(layout: Layout) -> tuple[int, int, int, int, bool, int, bool]:
    """What the operators take after the stored tensors."""
    return (
        layout.out_features, layout.in_features, layout.weight_bits, layout.group_size, layout.statistics == "bilevel",
        layout.outliers, layout.permuted,
    )  # fmt: skip


_FIELDS = 7  # of `geometry`


@functools.cache
def layout_of(out: int, inn: int, bits: int, group: int, bilevel: bool, outliers: int, permuted: bool) -> Layout:
    """The layout that `geometry` describes."""
    return Layout(out, inn, bits, group, "bilevel" if bilevel else "direct", outliers, permuted, where="spqr::linear")


def _checked(stored: list[Tensor], layout: Layout, where: str) -> Mapping[str, Tensor]:
    """Leaf -> tensor that may be given to a kernel. Raises SpqrError E509."""
    if len(stored) == 1:  # no layout has but one
        check_joined(stored[0], layout, where)
        return Joined(stored[0], layout)
    leaves = places(layout)
    if len(stored) != len(leaves):
        raise SpqrError("E509", f"{where}.stored", f"{len(stored)} tensors, expected {', '.join(leaves)}")
    tensors = dict(zip(leaves, stored, strict=True))
    check_tensors(tensors, layout, where)
    return {leaf: aligned(tensor) for leaf, tensor in tensors.items()} if stored[0].is_cuda else tensors


def _dequantize(stored: list[Tensor], *matrix: Any) -> Tensor:
    layout = layout_of(*matrix[:-1])
    return dispatch.dequantize(_checked(stored, layout, "spqr::dequantize"), layout, matrix[-1])


torch.library.impl("spqr::dequantize", "default", _dequantize)


@torch.library.register_fake("spqr::dequantize")
def _(stored, out_features, in_features, *matrix):
    return stored[0].new_empty((out_features, in_features), dtype=matrix[-1])


def _linear(x: Tensor, bias: Tensor | None, stored: list[Tensor], *matrix: Any) -> Tensor:
    layout = layout_of(*matrix)
    tensors = _checked(stored, layout, "spqr::linear")
    check_operand(x, bias, layout, stored[0].device)
    return dispatch.linear(x, tensors, layout, bias)


def _linear_fake(x, bias, stored, out_features, *matrix):
    # This is how a compiler first meets the operator. Importing inductor takes seconds: it is left to who uses it.
    if "torch._inductor.config" in sys.modules:
        from . import inductor

        inductor.install()
    return x.new_empty((*x.shape[:-1], out_features))


for _name in ("spqr::linear", "spqr::linear_forward"):
    torch.library.impl(_name, "default", _linear)
    torch.library.register_fake(_name, _linear_fake)


@functools.cache
def _layouts(geometry: tuple[int, ...]) -> tuple[Layout, ...]:
    parts = [geometry[begin : begin + _FIELDS] for begin in range(0, len(geometry), _FIELDS)]
    return tuple(layout_of(*part[:4], bool(part[4]), part[5], bool(part[6])) for part in parts)


def _linears(x: Tensor, biases: list[Tensor], joined: list[Tensor], geometry: list[int]) -> list[Tensor]:
    layouts = _layouts(tuple(geometry))
    if not len(layouts) == len(joined) == (len(biases) or len(joined)):
        found = f"{len(joined)} matrices, {len(layouts)} geometries, {len(biases)} biases"
        raise SpqrError("E509", "spqr::linears", found)
    for index, layout in enumerate(layouts):
        check_joined(joined[index], layout, "spqr::linears")
        check_operand(x, biases[index] if biases else None, layout, joined[index].device, "spqr::linears")
    return dispatch.linears(x, joined, layouts, biases)


torch.library.impl("spqr::linears", "default", _linears)


@torch.library.register_fake("spqr::linears")
def _(x, biases, joined, geometry):
    return [x.new_empty((*x.shape[:-1], layout.out_features)) for layout in _layouts(tuple(geometry))]


def _tables(x: Tensor, stored: Tensor, begins: list[Tensor], geometry: list[int], where: str) -> list[Table]:
    """Checked. Raises SpqrError E509."""
    layouts = _layouts(tuple(geometry))
    check_tables(stored, begins, layouts, where)
    check_operand(x, None, layouts[0], stored.device, where)
    return [Table(layout, its) for layout, its in zip(layouts, begins, strict=True)]


def _experts(x: Tensor, ids: Tensor, stored: Tensor, tables: list[Tensor], geometry: list[int]) -> Tensor:
    found = _tables(x, stored, tables, geometry, "spqr::experts")
    check_ids(x, ids, "spqr::experts")
    return dispatch.experts(x, ids, stored, found)


torch.library.impl("spqr::experts", "default", _experts)


@torch.library.register_fake("spqr::experts")
def _(x, ids, stored, tables, geometry):
    return x.new_empty((ids.numel(), tables[0].shape[1] * geometry[0]))


def _experts_in_blocks(x: Tensor, blocks: Tensor, stored: Tensor, tables: list[Tensor], geometry: list[int]) -> Tensor:
    found = _tables(x, stored, tables, geometry, "spqr::experts_in_blocks")
    check_blocks(x, blocks, "spqr::experts_in_blocks")
    return dispatch.experts_in_blocks(x, blocks, stored, found)


torch.library.impl("spqr::experts_in_blocks", "default", _experts_in_blocks)


@torch.library.register_fake("spqr::experts_in_blocks")
def _(x, blocks, stored, tables, geometry):
    return x.new_empty((x.shape[0], tables[0].shape[1] * geometry[0]))


def _save(ctx, inputs, output):
    x, bias, stored, *matrix = inputs
    ctx.save_for_backward(*stored)
    ctx.matrix = matrix
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    weight = torch.ops.spqr.dequantize(list(ctx.saved_tensors), *ctx.matrix, ctx.dtype)
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad @ weight, grad_bias, [None] * len(ctx.saved_tensors), *[None] * len(ctx.matrix)


torch.library.register_autograd("spqr::linear", _backward, setup_context=_save)


def asks_for_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` must be called, and not `linear_forward`."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _stored(tensors: Mapping[str, Tensor], layout: Layout, where: str) -> list[Tensor]:
    check_names(tensors, layout, where)
    return [tensors[leaf] for leaf in layout.tensors()]


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias.

    x: float16, bfloat16, float32 or float64 [..., in], any strides, any batch (0 included).
    tensors: leaf -> stored tensor, dtypes and shapes as in `layout.tensors()`, all on x's device, outliers already checked.
    bias: [out] or None. Returns [..., out] in x's dtype; differentiable in x and bias. Accumulates in float32.
    Raises SpqrError E509 before anything is launched where an operand does not fit.
    """
    operator = torch.ops.spqr.linear if asks_for_gradient(x, bias) else torch.ops.spqr.linear_forward
    return operator(x, bias, _stored(tensors, layout, "spqr::linear"), *geometry(layout))


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] of the given dtype, original column order. In float32 it equals the spec's decode bit for bit on a CPU."""
    return torch.ops.spqr.dequantize(_stored(tensors, layout, "spqr::dequantize"), *geometry(layout), dtype)

"""The torch operators `spqr::linear` and `spqr::dequantize`: visible to torch.compile, differentiable in x.

Registered by their schemas: around an eager call `torch.library.custom_op` puts checks that these need not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout

from . import dispatch
from .checks import check_joined, check_names, check_operand, check_tensors
from .joined import places, split

# stored: the tensors of `Layout.tensors()` in their order, or the one that `joined.join` makes of them.
_MATRIX = (
    "Tensor[] stored, int out_features, int in_features, int weight_bits, int group_size, bool bilevel, int outliers,"
    " bool permuted"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("spqr::linear", f"(Tensor x, Tensor? bias, {_MATRIX}) -> Tensor", tags=_TAGS)
torch.library.define("spqr::dequantize", f"({_MATRIX}, ScalarType dtype) -> Tensor", tags=_TAGS)


def geometry(layout: Layout) -> tuple[int, int, int, int, bool, int, bool]:
    """What the operators take after the stored tensors."""
    return (
        layout.out_features, layout.in_features, layout.weight_bits, layout.group_size, layout.statistics == "bilevel",
        layout.outliers, layout.permuted,
    )  # fmt: skip


@functools.cache
def _layout(out: int, inn: int, bits: int, group: int, bilevel: bool, outliers: int, permuted: bool) -> Layout:
    return Layout(out, inn, bits, group, "bilevel" if bilevel else "direct", outliers, permuted, where="spqr::linear")


def _checked(stored: list[Tensor], layout: Layout, where: str) -> dict[str, Tensor]:
    """Leaf -> tensor that may be given to a kernel. Raises SpqrError E509."""
    if len(stored) == 1:  # no layout has but one
        check_joined(stored[0], layout, where)
        return split(stored[0], layout)
    leaves = places(layout)
    if len(stored) != len(leaves):
        raise SpqrError("E509", f"{where}.stored", f"{len(stored)} tensors, expected {', '.join(leaves)}")
    tensors = dict(zip(leaves, stored, strict=True))
    check_tensors(tensors, layout, where)
    return tensors


def _dequantize(stored: list[Tensor], *matrix: Any) -> Tensor:
    layout = _layout(*matrix[:-1])
    return dispatch.dequantize(_checked(stored, layout, "spqr::dequantize"), layout, matrix[-1])


torch.library.impl("spqr::dequantize", "default", _dequantize)


@torch.library.register_fake("spqr::dequantize")
def _(stored, out_features, in_features, *matrix):
    return stored[0].new_empty((out_features, in_features), dtype=matrix[-1])


def _linear(x: Tensor, bias: Tensor | None, stored: list[Tensor], *matrix: Any) -> Tensor:
    layout = _layout(*matrix)
    tensors = _checked(stored, layout, "spqr::linear")
    check_operand(x, bias, layout, stored[0].device)
    return dispatch.linear(x, tensors, layout, bias)


torch.library.impl("spqr::linear", "default", _linear)


@torch.library.register_fake("spqr::linear")
def _(x, bias, stored, out_features, *matrix):
    return x.new_empty((*x.shape[:-1], out_features))


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
    return torch.ops.spqr.linear(x, bias, _stored(tensors, layout, "spqr::linear"), *geometry(layout))


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] of the given dtype, original column order. In float32 it equals the spec's decode bit for bit on a CPU."""
    return torch.ops.spqr.dequantize(_stored(tensors, layout, "spqr::dequantize"), *geometry(layout), dtype)

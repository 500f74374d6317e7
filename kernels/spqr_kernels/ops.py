"""The torch operators `spqr::linear` and `spqr::dequantize`: visible to torch.compile, differentiable in x."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spqr_format.layout import Layout

from . import dispatch
from .checks import check_operand, check_tensors

LEAVES = ("weight", "stat_codes", "tile_stats", "group_sc", "group_zp", "outlier_ptr", "outliers", "perm")


def _layout(tensors: Mapping[str, Tensor | None], out: int, inn: int, bits: int, group: int) -> Layout:
    outliers = tensors.get("outliers")
    return Layout(
        out, inn, bits, group, "bilevel" if tensors.get("stat_codes") is not None else "direct",
        outliers=0 if outliers is None else outliers.numel(), permuted=tensors.get("perm") is not None, where="spqr::linear",
    )  # fmt: skip


def _present(*tensors: Tensor | None) -> dict[str, Tensor]:
    return {leaf: tensor for leaf, tensor in zip(LEAVES, tensors, strict=True) if tensor is not None}


@torch.library.custom_op("spqr::dequantize", mutates_args=())
def _dequantize(
    weight: Tensor, stat_codes: Tensor | None, tile_stats: Tensor | None, group_sc: Tensor | None, group_zp: Tensor | None,
    outlier_ptr: Tensor | None, outliers: Tensor | None, perm: Tensor | None,
    out_features: int, in_features: int, weight_bits: int, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    present = _present(weight, stat_codes, tile_stats, group_sc, group_zp, outlier_ptr, outliers, perm)
    layout = _layout(present, out_features, in_features, weight_bits, group_size)
    check_tensors(present, layout, "spqr::dequantize")
    return dispatch.dequantize(present, layout, dtype)


@_dequantize.register_fake
def _(weight, *arguments):
    out_features, in_features, _, _, dtype = arguments[-5:]
    return weight.new_empty((out_features, in_features), dtype=dtype)


@torch.library.custom_op("spqr::linear", mutates_args=())
def _linear(
    x: Tensor, bias: Tensor | None,
    weight: Tensor, stat_codes: Tensor | None, tile_stats: Tensor | None, group_sc: Tensor | None, group_zp: Tensor | None,
    outlier_ptr: Tensor | None, outliers: Tensor | None, perm: Tensor | None,
    out_features: int, in_features: int, weight_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    present = _present(weight, stat_codes, tile_stats, group_sc, group_zp, outlier_ptr, outliers, perm)
    layout = _layout(present, out_features, in_features, weight_bits, group_size)
    check_operand(x, bias, layout, check_tensors(present, layout))
    return dispatch.linear(x, present, layout, bias)


@_linear.register_fake
def _(x, *arguments):
    return x.new_empty((*x.shape[:-1], arguments[-4]))


def _save(ctx, inputs, output):
    x, bias, *stored = inputs
    ctx.save_for_backward(*stored[: len(LEAVES)])
    ctx.geometry = stored[len(LEAVES) :]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    weight = torch.ops.spqr.dequantize(*ctx.saved_tensors, *ctx.geometry, ctx.dtype)
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad @ weight, grad_bias, *[None] * (len(LEAVES) + len(ctx.geometry))


torch.library.register_autograd("spqr::linear", _backward, setup_context=_save)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias.

    x: float16, bfloat16, float32 or float64 [..., in], any strides, any batch (0 included).
    tensors: leaf -> stored tensor, dtypes and shapes as in `layout.tensors()`, all on x's device, outliers already checked.
    bias: [out] or None. Returns [..., out] in x's dtype; differentiable in x and bias. Accumulates in float32.
    Raises SpqrError E509 before anything is launched where an operand does not fit.
    """
    stored = [tensors.get(leaf) for leaf in LEAVES]
    return torch.ops.spqr.linear(
        x, bias, *stored, layout.out_features, layout.in_features, layout.weight_bits, layout.group_size
    )


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] of the given dtype, original column order. In float32 it equals the spec's decode bit for bit on a CPU."""
    stored = [tensors.get(leaf) for leaf in LEAVES]
    return torch.ops.spqr.dequantize(
        *stored, layout.out_features, layout.in_features, layout.weight_bits, layout.group_size, dtype
    )

"""What must hold before a kernel is launched. Outliers are checked once, at load (spqr_format.payload)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout

TORCH_DTYPES = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
INT32_MAX = 2**31 - 1


def check_tensors(tensors: Mapping[str, Tensor | None], layout: Layout, where: str = "spqr::linear") -> torch.device:
    """Dtype, shape, device and contiguity of each stored tensor; returns their device. Raises SpqrError E509."""
    device = None
    expected = layout.tensors()
    for leaf, spec in expected.items():
        tensor = tensors.get(leaf)
        if tensor is None:
            raise SpqrError("E509", f"{where}.{leaf}", "missing")
        if tensor.dtype != TORCH_DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise SpqrError("E509", f"{where}.{leaf}", f"{found}, expected {spec.dtype} {spec.shape}")
        if not tensor.is_contiguous():
            raise SpqrError("E509", f"{where}.{leaf}", "not contiguous")
        device = device or tensor.device
        if tensor.device != device:
            raise SpqrError("E509", f"{where}.{leaf}", f"on {tensor.device}, weight is on {device}")
        if tensor.numel() > INT32_MAX:
            raise SpqrError("E509", f"{where}.{leaf}", f"{tensor.numel()} elements, kernels index with int32")
    for leaf, tensor in tensors.items():
        if tensor is not None and leaf not in expected:
            raise SpqrError("E509", f"{where}.{leaf}", "the layout has no such tensor")
    assert device is not None
    return device


def check_operand(x: Tensor, bias: Tensor | None, layout: Layout, device: torch.device, where: str = "spqr::linear") -> None:
    """x [..., in] floating point and bias [out] on the tensors' device. Raises SpqrError E509."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise SpqrError("E509", f"{where}.x", f"{x.dtype}, expected a floating-point dtype")
    if x.ndim < 1 or x.shape[-1] != layout.in_features:
        raise SpqrError("E509", f"{where}.x", f"shape {tuple(x.shape)}, expected [..., {layout.in_features}]")
    if x.device != device:
        raise SpqrError("E509", f"{where}.x", f"on {x.device}, the weight is on {device}")
    if bias is not None and (tuple(bias.shape) != (layout.out_features,) or bias.device != device):
        raise SpqrError("E509", f"{where}.bias", f"shape {tuple(bias.shape)} on {bias.device}")


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it is a view that does not begin at 16 bytes, which vector loads need."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

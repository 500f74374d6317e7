"""What must hold before a kernel is launched. Outliers are checked once, at load (spqr_format.payload)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout

from .expert_blocks import WIDTHS
from .joined import length, places


def check_names(tensors: Mapping[str, Tensor], layout: Layout, where: str = "spqr::linear") -> None:
    """Exactly the tensors of the layout. Raises SpqrError E509."""
    expected = layout.tensors()
    for leaf in expected:
        if tensors.get(leaf) is None:
            raise SpqrError("E509", f"{where}.{leaf}", "missing")
    for leaf in tensors:
        if leaf not in expected:
            raise SpqrError("E509", f"{where}.{leaf}", "the layout has no such tensor")


def check_tensors(tensors: Mapping[str, Tensor], layout: Layout, where: str = "spqr::linear") -> None:
    """Dtype, shape, device and contiguity of each tensor of the layout. Raises SpqrError E509."""
    device = tensors["weight"].device
    for leaf, place in places(layout).items():
        tensor = tensors[leaf]
        if tensor.dtype != place.dtype or tensor.shape != place.shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise SpqrError("E509", f"{where}.{leaf}", f"{found}, expected {place.dtype} {place.shape}")
        if not tensor.is_contiguous():
            raise SpqrError("E509", f"{where}.{leaf}", "not contiguous")
        if tensor.device != device:
            raise SpqrError("E509", f"{where}.{leaf}", f"on {tensor.device}, weight is on {device}")


def check_joined(joined: Tensor, layout: Layout, where: str = "spqr::linear") -> None:
    """Dtype, shape, contiguity and alignment of the one tensor that holds all of the layout. Raises SpqrError E509."""
    if joined.dtype != torch.int32 or joined.ndim != 1 or joined.numel() != length(layout):
        found = f"{joined.dtype} {tuple(joined.shape)}"
        raise SpqrError("E509", f"{where}.stored", f"{found}, expected {torch.int32} {(length(layout),)}")
    if not joined.is_contiguous() or joined.data_ptr() % 16:  # vector loads need the latter
        raise SpqrError("E509", f"{where}.stored", "not contiguous, or not aligned to 16 bytes")


def check_tables(stored: Tensor, tables: Sequence[Tensor], layouts: Sequence[Layout], where: str) -> None:
    """Tables of matrices of one shape, and what they point to. Raises SpqrError E509."""
    if stored.dtype != torch.int32 or stored.ndim != 1 or not stored.is_contiguous() or stored.data_ptr() % 16:
        raise SpqrError("E509", f"{where}.stored", f"{stored.dtype} {tuple(stored.shape)}, expected aligned int32 [words]")
    if not layouts or len(tables) != len(layouts):
        raise SpqrError("E509", f"{where}.tables", f"{len(tables)} tables, {len(layouts)} geometries")
    for table, layout in zip(tables, layouts, strict=True):
        if table.dtype != torch.int64 or table.shape != (*tables[0].shape[:2], 2) or table.device != stored.device:
            raise SpqrError("E509", f"{where}.tables", f"{table.dtype} {tuple(table.shape)} on {table.device}")
        if not table.is_contiguous() or table.data_ptr() % 16:
            raise SpqrError("E509", f"{where}.tables", "not contiguous, or not aligned to 16 bytes")
        if (layout.out_features, layout.in_features) != (layouts[0].out_features, layouts[0].in_features):
            raise SpqrError("E509", f"{where}.geometry", "matrices of more than one shape")


def check_ids(x: Tensor, ids: Tensor, where: str) -> None:
    """x [rows, in] and int64 ids [a multiple of rows]. Raises SpqrError E509."""
    fits = x.ndim == 2 and ids.ndim == 1 and (len(ids) % len(x) == 0 if len(x) else len(ids) == 0)
    if not fits or ids.dtype != torch.int64 or ids.device != x.device:
        found = f"{ids.dtype} {tuple(ids.shape)} on {ids.device} for x {tuple(x.shape)}"
        raise SpqrError("E509", f"{where}.ids", f"{found}, expected int64 [a multiple of the rows]")


def check_blocks(x: Tensor, blocks: Tensor, where: str) -> None:
    """x [blocks * width, in] and int32 blocks [blocks, 2]. Raises SpqrError E509."""
    fits = x.ndim == 2 and blocks.ndim == 2 and blocks.shape[1] == 2 and len(blocks) > 0
    if not fits or blocks.dtype != torch.int32 or blocks.device != x.device or len(x) not in (w * len(blocks) for w in WIDTHS):
        found = f"{blocks.dtype} {tuple(blocks.shape)} on {blocks.device} for x {tuple(x.shape)}"
        raise SpqrError("E509", f"{where}.blocks", f"{found}, expected int32 [blocks, 2] of {', '.join(map(str, WIDTHS))} rows")


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
    """The tensor, or a copy of it where it is a view with gaps, or does not begin at 16 bytes, which vector loads need.

    A kernel is given the address alone.
    """
    if tensor.data_ptr() % 16 == 0 and tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

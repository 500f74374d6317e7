"""Which kernel runs: decided from shapes, dtypes and the device alone, never from values (no host sync)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812, its name everywhere
from torch import Tensor

from spqr_format.layout import CHUNK, Layout

from . import cpu, reference

# Largest batch of each kernel; beyond, dequantizing and cuBLAS are faster. The first is between what was measured on an H200
# at 512, where it is faster, and at 2048 (kernels/benchmarks/README.md); the decode kernel, without outliers and with them,
# stands in where `wgmma` is not, and there nothing was measured.
GEMM_BATCH = 1024
DECODE_BATCH = {False: 64, True: 32}
_SPLIT_BATCH = 256  # up to which cuBLAS may split columns: what was seen to lose exactness had 33 rows
# Bilevel groups of the tensor-core kernels. A lane's four blocks lie in two to four groups of these; wider ones, which hardly
# save bits, and those that cross a chunk would need other lane maps.
FAST_GROUPS = (16, 32, 64)
FIT_COLUMNS = 16  # the widest group that a thread of fit.py holds in its registers

Tensors = Mapping[str, Tensor]


@functools.cache
def has_triton(device: torch.device) -> bool:
    """True where the device is a GPU and Triton is installed."""
    return device.type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """True for NVIDIA GPUs of sm_80 and newer, which the decode kernel needs."""
    if device.type != "cuda" or torch.version.hip is not None or not has_triton(device):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_fit_kernels(w: Tensor) -> bool:
    """True for a group of weights [n, R] that the kernels of fit.py take."""
    return len(w) <= FIT_COLUMNS and has_triton(w.device)


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """True for NVIDIA Hopper, sm_90: the instruction is on no other."""
    return has_tensor_cores(device) and torch.cuda.get_device_capability(device)[0] == 9


def whole_chunks(layout: Layout) -> bool:
    """True for matrices that the tensor-core kernels take: whole chunks, statistics direct or bilevel in FAST_GROUPS."""
    return layout.blocks % CHUNK == 0 and (layout.statistics == "direct" or layout.group_size in FAST_GROUPS)


def dequantize(tensors: Tensors, layout: Layout, dtype: torch.dtype) -> Tensor:
    """W of the given dtype, [out, in]."""
    if has_triton(tensors["weight"].device):
        from . import dequant

        return dequant.dequantize(tensors, layout, dtype)
    if tensors["weight"].device.type == "cpu":
        return cpu.dequantize(tensors, layout, dtype)
    return reference.dequantize(tensors, layout, dtype)


def linear(x: Tensor, tensors: Tensors, layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for checked operands: x [..., in] of any strides, result [..., out] of x's dtype."""
    rows = x.reshape(-1, layout.in_features)
    batch = rows.shape[0]
    if batch == 0:
        return x.new_empty(*x.shape[:-1], layout.out_features)
    device = x.device
    half = x.dtype in (torch.float16, torch.bfloat16)
    fits = half and whole_chunks(layout) and has_tensor_cores(device)
    sparse = layout.outliers > 0
    # Outliers stand at original columns: batches, which add them to the weights, need codes that stand there too.
    in_place = not (sparse and layout.permuted)
    if fits and batch == 1:
        from . import matvec

        y = matvec.linear(rows.contiguous(), tensors, layout, bias)
    elif fits and in_place and batch <= GEMM_BATCH and has_wgmma(device):
        from . import gemm

        y = gemm.linear(rows.contiguous(), tensors, layout, bias)
    elif fits and in_place and batch <= DECODE_BATCH[sparse]:
        from . import decode

        y = decode.linear(rows.contiguous(), tensors, layout, bias)
    elif device.type == "cpu":
        y = cpu.linear(rows, tensors, layout, bias)
    else:
        weight = dequantize(tensors, layout, x.dtype)
        if half and batch <= _SPLIT_BATCH and device.type == "cuda" and torch.version.hip is None:  # out_dtype is CUDA's
            # cuBLAS would split the columns and add the parts up in half precision: errors of 2 % were seen in bf16.
            y = torch.mm(rows, weight.T, out_dtype=torch.float32)
            y = (y if bias is None else y + bias).to(x.dtype)
        else:
            y = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], layout.out_features)

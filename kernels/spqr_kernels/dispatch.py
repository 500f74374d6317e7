"""Which kernel runs: decided from shapes, dtypes and the device alone, never from values (no host sync)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812, its name everywhere
from torch import Tensor

from spqr_format.layout import CHUNK, Layout

from . import cpu, reference
from .checks import aligned
from .experts import Table, block_by_block, one_by_one
from .joined import Joined
from .launch import on_device

# Largest batch of each kernel; beyond, dequantizing and cuBLAS are faster. The first is between what was measured on an H200
# at 512, where it is faster, and at 2048 (kernels/benchmarks/README.md); for few rows, `small.most_rows`, another one takes its
# place. The decode kernel, without outliers and with them, stands in where `wgmma` is not, and there nothing was measured:
# `small` needs `stmatrix`, which is on no GPU before those that have `wgmma`.
GEMM_BATCH = 1024
DECODE_BATCH = {False: 64, True: 32}
_SPLIT_BATCH = 256  # up to which cuBLAS may split columns: what was seen to lose exactness had 33 rows
TOGETHER = 3  # matrices of one x that a launch takes at most
TOGETHER_BATCH = GEMM_BATCH  # and rows of that x; measured up to 512
MOST_PAIRS = 65535  # of rows and experts in a launch: the second dimension of a grid
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


@functools.cache
def whole_chunks(layout: Layout) -> bool:
    """True for matrices that the tensor-core kernels take: whole chunks, statistics direct or bilevel in FAST_GROUPS."""
    return layout.blocks % CHUNK == 0 and (layout.statistics == "direct" or layout.group_size in FAST_GROUPS)


def kind(layout: Layout) -> tuple[int, int, int, str, bool]:
    """What matrices of one x must have in common to share a launch: columns, bits, group size, statistics, permutation."""
    return layout.in_features, layout.weight_bits, layout.group_size, layout.statistics, layout.permuted


@functools.cache
def in_one_launch(layouts: tuple[Layout, ...], batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one launch multiplies so many rows of x of this dtype with all of these matrices: two or three of a `kind`, of
    whole chunks, not permuted; for more than one row all with outliers, or none."""
    if dtype not in (torch.float16, torch.bfloat16) or not has_tensor_cores(device) or not 2 <= len(layouts) <= TOGETHER:
        return False
    if batch > 1 and (batch > TOGETHER_BATCH or not has_wgmma(device) or len({layout.outliers > 0 for layout in layouts}) > 1):
        return False
    return len({kind(layout) for layout in layouts}) == 1 and whole_chunks(layouts[0]) and not layouts[0].permuted


def dequantize(tensors: Tensors, layout: Layout, dtype: torch.dtype) -> Tensor:
    """W of the given dtype, [out, in]."""
    device = tensors["weight"].device
    if has_triton(device):
        from . import dequant

        with on_device(device):
            return dequant.dequantize(tensors, layout, dtype)
    if device.type == "cpu":
        return cpu.dequantize(tensors, layout, dtype)
    return reference.dequantize(tensors, layout, dtype)


def linears(x: Tensor, joined: Sequence[Tensor], layouts: tuple[Layout, ...], biases: Sequence[Tensor]) -> list[Tensor]:
    """x W^T + bias for each of several matrices, of which each is one tensor, in a single launch where that is faster."""
    batch = x.numel() // layouts[0].in_features
    if batch and in_one_launch(layouts, batch, x.dtype, x.device):
        from . import siblings

        if not biases or all(bias.dtype == biases[0].dtype for bias in biases):
            return siblings.linears(x, joined, layouts, biases)
    each: Sequence[Tensor | None] = biases or [None] * len(joined)
    matrices = zip(joined, layouts, each, strict=True)
    return [linear(x, Joined(whole, layout), layout, bias) for whole, layout, bias in matrices]


def experts(x: Tensor, ids: Tensor, stored: Tensor, tables: Sequence[Table]) -> Tensor:
    """x [rows, in] times the matrices of each row's experts, ids int64 [pairs]: [pairs, parts * out]."""
    pairs = ids.numel()
    if pairs == 0:
        return x.new_empty(0, tables[0].begins.shape[1] * tables[0].layout.out_features)
    half = x.dtype in (torch.float16, torch.bfloat16)
    fits = all(whole_chunks(table.layout) and not table.layout.permuted for table in tables)
    if half and fits and has_tensor_cores(x.device) and pairs <= MOST_PAIRS:
        from . import grouped

        return grouped.experts(x.contiguous(), aligned(ids), stored, tables)
    return one_by_one(x, ids, stored, tables)


def takes_blocks(layouts: Iterable[Layout], device: torch.device) -> bool:
    """Whether there are kernels on this device for blocks of half-precision rows and experts of these layouts."""
    return has_wgmma(device) and all(whole_chunks(layout) and not layout.permuted for layout in layouts)


def experts_in_blocks(x: Tensor, blocks: Tensor, stored: Tensor, tables: Sequence[Table]) -> Tensor:
    """x [blocks * width, in] times the matrices of each block's expert: [blocks * width, parts * out]."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and takes_blocks((table.layout for table in tables), x.device):
        from . import expert_batches

        return expert_batches.experts_in_blocks(x.contiguous(), aligned(blocks), stored, tables)
    return block_by_block(x.contiguous(), blocks, stored, tables)


def linear(x: Tensor, tensors: Tensors, layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for checked operands: x [..., in] of any strides, result [..., out] of x's dtype."""
    rows = x if x.ndim == 2 else x.reshape(-1, layout.in_features)
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
        from . import gemm, small

        product = small.linear if batch <= small.most_rows((layout,), x.dtype) else gemm.linear
        y = product(rows.contiguous(), tensors, layout, bias)
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
    return y if x.ndim == 2 else y.view(*x.shape[:-1], layout.out_features)

"""The torch reference: decode a quantized matrix on any device, by the exact arithmetic of spec 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spqr_format.layout import LANES, TILE, Layout
from spqr_format.packing import FIELDS, PAIRS, SPREAD


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """int32 [tile_rows * 8 * bits, blocks] to codes uint8 [tile_rows * 16, blocks * 16] (spec 4.2)."""
    blocks = words.shape[1]
    w = words.view(-1, bits, LANES, blocks)
    q = torch.empty(w.shape[0], 2, LANES, blocks, PAIRS, 2, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            for parity in range(2):
                if bit == SPREAD:
                    value = sum(((w[:, k] >> (15 + 16 * parity)) & 1) << k for k in range(3))
                else:
                    value = (w[:, word] >> (bit + 16 * parity)) & mask
                q[:, half, :, :, pair, parity] = value
    return q.view(-1, blocks * TILE)


def unpack_stat_codes(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [tile_rows * 3, groups] to scale and zero codes, each uint8 [tile_rows * 16, groups] (spec 4.3)."""
    groups = words.shape[1]
    w = words.view(-1, 3, groups).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(2, w.shape[0], 2, LANES, groups, dtype=torch.uint8, device=words.device)
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        value = w[:, word] >> bit
        if bit > 20:
            value = value | (w[:, word + 1] << (32 - bit))
        for half in range(2):
            codes[0, :, half, lane] = (value >> (6 * half)) & 7
            codes[1, :, half, lane] = (value >> (6 * half + 3)) & 7
    scale_codes, zero_codes = codes.view(2, -1, groups)
    return scale_codes, zero_codes


def statistics(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Scales and zeros, each float32 [out, groups] (spec 3.1 and 3.2)."""
    out = layout.out_features
    if layout.statistics == "direct":
        return tensors["group_sc"].view(torch.float16).float(), tensors["group_zp"].float()
    scale_codes, zero_codes = unpack_stat_codes(tensors["stat_codes"])
    stats = tensors["tile_stats"].view(torch.float16).view(-1, layout.groups, 4).float()
    stats = stats.repeat_interleave(TILE, dim=0)[:out]
    scales = stats[..., 0] * (scale_codes[:out].float() - stats[..., 1])
    zeros = stats[..., 2] * (zero_codes[:out].float() - stats[..., 3])
    return scales, zeros


def indices(stored: Tensor) -> Tensor:
    """Stored CSR indices as int64: I16 tensors hold unsigned 16-bit integers (spec 6.1)."""
    return stored.to(torch.int64) & 0xFFFF if stored.dtype == torch.int16 else stored.to(torch.int64)


def outlier_rows(crow_indices: Tensor, count: int) -> Tensor:
    """Row of each of `count` stored values, int64 [count], from int64 crow_indices [out + 1]."""
    rows = torch.arange(crow_indices.numel() - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff(), output_size=count)


def add_outliers(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Add S in place to weight float [out, in] (spec 6); returns weight. The CSR must have been checked."""
    columns = indices(tensors["col_indices"])
    rows = outlier_rows(indices(tensors["crow_indices"]), columns.numel())
    # No two values share a place, so that this is exact and the same on every run.
    weight.view(-1).index_add_(0, rows * weight.shape[1] + columns, tensors["values"].view(torch.float16).to(weight.dtype))
    return weight


def dequantize(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """W float32 [out, in] in original column order, equal to spqr_format's numpy decode bit for bit."""
    out, inn = layout.out_features, layout.in_features
    scales, zeros = (x.repeat_interleave(layout.group_size, dim=1)[:, :inn] for x in statistics(tensors, layout))
    codes = unpack_codes(tensors["weight"], layout.weight_bits)[:out, :inn].float()
    weight = scales * (codes - zeros)
    if layout.permuted:
        weight = torch.empty_like(weight).index_copy_(1, tensors["perm"].to(torch.int64), weight)
    if layout.outliers:
        add_outliers(weight, tensors)
    return weight

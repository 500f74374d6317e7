"""The torch reference: decode a quantized matrix on any device, by the exact arithmetic of spec 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spqr_format.layout import CELL_COLUMNS, CHUNK, LANES, PANEL_COLUMNS, TILE, Layout, ceil_div
from spqr_format.packing import FIELDS, PAIRS, SET, SET_WORDS, SPREAD, is_spread

_PIECE = 1 << 20  # weights that are decoded at a time: 4 MB in float32


def _stays(bit: int, bits: int) -> bool:
    """True for a field that is masked where it lies; at bit 15 of a half it would meet the sign of int16."""
    return not is_spread(bits, bit) and bit + bits <= 15


def to_grid(words: Tensor, bits: int) -> Tensor:
    """int32 [tile_rows, 8 * bits * blocks], as stored, to int32 [tile_rows, bits, 8, blocks] (spec 4.2)."""
    tiles, blocks = words.shape[0], words.shape[1] // (bits * LANES)
    chunks, tail = divmod(blocks, CHUNK)
    full, rest = words.split([chunks * CHUNK * bits * LANES, tail * bits * LANES], dim=1)
    grid = torch.empty(tiles, bits, LANES, blocks, dtype=torch.int32, device=words.device)
    # tile, chunk, word, lane, b % 4, b // 4
    ordered = full.unflatten(1, (chunks, bits, LANES, 4, 4)).permute(0, 2, 3, 1, 5, 4)
    grid[..., : chunks * CHUNK].unflatten(-1, (chunks, 4, 4)).copy_(ordered)
    grid[..., chunks * CHUNK :].copy_(rest.unflatten(1, (bits, LANES, tail)))
    return grid


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """int32 [tile_rows, 8 * bits * blocks] to codes int16 [tile_rows * 16, blocks * 16], each still shifted left by its bit
    position; `positions` undoes it (spec 4.2). A masked word is a pair of neighbouring columns already."""
    w = to_grid(words, bits)
    blocks = w.shape[3]
    pairs = torch.empty(w.shape[0], 2, LANES, blocks, PAIRS, dtype=torch.int32, device=words.device)
    mask = (2**bits - 1) * 0x00010001
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            out = pairs[:, half, :, :, pair]
            if is_spread(bits, bit):
                bits_of = [((w[:, k] >> SPREAD) & 0x00010001) << k for k in range(3)]
                out.copy_(bits_of[0] | bits_of[1] | bits_of[2])
            elif _stays(bit, bits):
                torch.bitwise_and(w[:, word], mask << bit, out=out)
            else:
                torch.bitwise_and(w[:, word] >> bit, mask, out=out)
    return pairs.view(torch.int16).view(-1, blocks * TILE)


def positions(bits: int, device: torch.device) -> Tensor:
    """What a masked code counts, float32 [16 rows of a tile, 16 columns of a block]: 2**-bit of its field."""
    rows = []
    for table in FIELDS[bits]:
        row = [2.0 ** -(bit if _stays(bit, bits) else 0) for _, bit in table for _parity in range(2)]
        rows += [row] * LANES
    return torch.tensor(rows, device=device)


def unpack_stat_codes(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [tile_rows, 3 * groups] to scale and zero codes, each uint8 [tile_rows * 16, groups] (spec 4.3)."""
    tiles, groups = words.shape[0], words.shape[1] // 3
    sets, tail = divmod(groups, SET)
    full, rest = words.split([sets * SET_WORDS, 3 * tail], dim=1)
    # v: the 12 bits of rows l and l + 8 of a lane, with others above them
    v = torch.empty(tiles, LANES, groups, dtype=torch.int32, device=words.device)
    full = full.unflatten(1, (sets, SET_WORDS))
    first = full[..., :32].unflatten(2, (LANES, 4))
    halves = torch.stack([full[..., 32:] & 0xFFFF, full[..., 32:] >> 16], dim=-1).flatten(2).unflatten(2, (LANES, 4))
    low = torch.stack([first, first >> 12], dim=-1)  # tile, set, lane, pair of groups, group
    high = torch.stack([(first >> 24) & 0xFF | halves << 8, halves >> 4], dim=-1)
    in_sets = torch.stack([low, high], dim=3).permute(0, 2, 1, 3, 4, 5)
    v[..., : sets * SET].unflatten(-1, (sets, 2, 4, 2)).copy_(in_sets)
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        w = rest.unflatten(1, (3, tail))
        value = w[:, word] >> bit
        if bit > 20:
            value = value & ((1 << (32 - bit)) - 1) | w[:, word + 1] << (32 - bit)
        v[:, lane, sets * SET :] = value
    codes = torch.stack([v & 7, (v >> 3) & 7, (v >> 6) & 7, (v >> 9) & 7]).to(torch.uint8)
    codes = codes.view(2, 2, tiles, LANES, groups).permute(1, 2, 0, 3, 4)  # scale or zero, tile, half, lane, group
    scale_codes, zero_codes = codes.reshape(2, -1, groups)
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


def outliers(tensors: Mapping[str, Tensor], in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns int64 and values float16, each [outliers], in stored order (spec 5.3)."""
    pointers, words = tensors["outlier_ptr"], tensors["outliers"]
    cells = torch.arange(pointers.numel() - 1, device=words.device)
    cells = cells.repeat_interleave(pointers.diff(), output_size=words.numel())
    cells_a_tile = ceil_div(in_features, CELL_COLUMNS)
    position = words & 0xFFFF
    rows = cells // cells_a_tile * TILE + position // PANEL_COLUMNS
    panels = cells % cells_a_tile * CELL_COLUMNS // PANEL_COLUMNS
    columns = panels * PANEL_COLUMNS + position % PANEL_COLUMNS
    return rows, columns, (words >> 16).to(torch.int16).view(torch.float16)


def add_outliers(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Add S in place to weight float [out, in] (spec 3); returns weight. The outliers must have been checked."""
    rows, columns, values = outliers(tensors, weight.shape[1])
    # No two values share a place, so that this is exact and the same on every run.
    weight.view(-1).index_add_(0, rows * weight.shape[1] + columns, values.to(weight.dtype))
    return weight


def rows_of(tensors: Mapping[str, Tensor], layout: Layout, first: int, last: int) -> tuple[dict[str, Tensor], Layout]:
    """Stored tensors and layout of the row tiles first..last - 1: views, but for a shifted outlier_ptr.

    Reads two of the pointers, which on a GPU waits for it.
    """
    rows = slice(first * TILE, min(last * TILE, layout.out_features))
    part = {"weight": tensors["weight"][first:last]}
    if layout.statistics == "bilevel":
        part["stat_codes"] = tensors["stat_codes"][first:last]
        part["tile_stats"] = tensors["tile_stats"][first:last]
    else:
        part |= {leaf: tensors[leaf][rows] for leaf in ("group_sc", "group_zp")}
    count = 0
    if layout.outliers:
        pointers = tensors["outlier_ptr"][first * layout.cells_a_tile : last * layout.cells_a_tile + 1]
        begin, end = int(pointers[0]), int(pointers[-1])
        count = end - begin
        if count:
            part |= {"outlier_ptr": pointers - begin, "outliers": tensors["outliers"][begin:end]}
    if layout.permuted:
        part["perm"] = tensors["perm"]
    fields = {**layout.as_dict(), "out_features": rows.stop - rows.start, "outliers": count}
    return part, Layout(**fields)


def _decode(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """W float32 [out, in] in one piece."""
    out, inn = layout.out_features, layout.in_features
    scales, zeros = (x.repeat_interleave(layout.group_size, dim=1)[:, :inn] for x in statistics(tensors, layout))
    shifted = unpack_codes(tensors["weight"], layout.weight_bits).view(-1, TILE, layout.blocks, TILE)
    codes = shifted * positions(layout.weight_bits, shifted.device).view(1, TILE, 1, TILE)
    weight = codes.view(-1, layout.blocks * TILE)[:out, :inn].sub_(zeros).mul_(scales)
    if layout.permuted:
        weight = torch.empty_like(weight).index_copy_(1, tensors["perm"].to(torch.int64), weight)
    if layout.outliers:
        weight = add_outliers(weight.contiguous(), tensors)
    return weight


def _pieces(layout: Layout) -> list[tuple[int, int]]:
    """Runs of row tiles that decode inside a processor's cache."""
    step = max(1, _PIECE // (layout.blocks * TILE * TILE))
    return [(first, min(first + step, layout.tile_rows)) for first in range(0, layout.tile_rows, step)]


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] in original column order; in float32 equal to spqr_format's numpy decode bit for bit."""
    weight = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=tensors["weight"].device)
    for first, last in _pieces(layout):
        weight[first * TILE : last * TILE] = _decode(*rows_of(tensors, layout, first, last))
    return weight


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x [batch, in] of any floating dtype: pieces of W are decoded, rounded to x's dtype, and multiplied, so
    that W as a whole never lies in memory."""
    y = torch.empty(x.shape[0], layout.out_features, dtype=x.dtype, device=x.device)
    for first, last in _pieces(layout):
        rows = slice(first * TILE, last * TILE)
        piece = _decode(*rows_of(tensors, layout, first, last)).to(x.dtype)
        y[:, rows] = torch.nn.functional.linear(x, piece, None if bias is None else bias[rows])
    return y

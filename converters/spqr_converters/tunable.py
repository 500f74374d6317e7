"""A matrix whose codes are frozen and whose fp16 numbers can be learnt: the decode of spec 3 with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spqr_format.layout import TILE
from spqr_format.matrix import SpqrMatrix


class _Affine(torch.autograd.Function):
    """s * (q - z) with s, z float32 [out, groups] and q uint8 [out, groups * group_size]. Of the full size only q is kept for
    the gradients, for they need no more than two sums over each group."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, zeros: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(scales, zeros, codes)
        q = codes.view(*scales.shape, -1).float()
        return (scales.unsqueeze(2) * (q - zeros.unsqueeze(2))).view(codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        scales, zeros, codes = ctx.saved_tensors
        by_group = gradients[0].reshape(*scales.shape, -1)
        total = by_group.sum(2)
        return (by_group * codes.view(by_group.shape)).sum(2) - zeros * total, -scales * total, None


class _Rounded(torch.autograd.Function):
    """The nearest finite number of a dtype, as float32; gradients pass as if it were the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        most = torch.finfo(dtype).max
        return x.clamp(-most, most).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 as it will be stored in `dtype`, float32; the gradient is that of the identity."""
    return _Rounded.apply(x, dtype)  # type: ignore[no-any-return]


class TunableMatrix(nn.Module):
    """`forward()` is W float32 [out, in], bit for bit `matrix().dequantize()`.

    Parameters are offsets from the stored numbers, float32, in units in which 1 changes a typical scale by all of itself or
    a zero by one code, so that one learning rate fits all: `statistics` [tile_rows, groups, 4] for ss, sz, zs, zz, or
    [out, groups] for direct scales (whole zeros stay); `values` [outliers] in units of their mean size.
    """

    def __init__(self, matrix: SpqrMatrix, device: torch.device) -> None:
        super().__init__()
        self.source, layout = matrix, matrix.layout
        self.layout = layout

        def tensor(array: Any) -> Tensor:
            return torch.from_numpy(array.copy()).to(device)

        missing = layout.groups * layout.group_size - layout.in_features
        self.codes = nn.functional.pad(tensor(matrix.codes), (0, missing))
        if layout.statistics == "bilevel":
            self.scale_codes, self.zero_codes = tensor(matrix.scale_codes), tensor(matrix.zero_codes)
            self.stored = tensor(matrix.tile_stats).float()
            self.unit = self._bilevel_units()
        else:
            self.zeros = tensor(matrix.group_zeros).float()
            self.stored = tensor(matrix.group_scales).float()
            self.unit = self.stored.abs()
        self.statistics = nn.Parameter(torch.zeros_like(self.stored))
        self.values: nn.Parameter | None = None
        if matrix.values is not None:
            rows = torch.arange(layout.out_features, device=device).repeat_interleave(tensor(matrix.crow_indices).diff())
            self.at = (rows, tensor(matrix.col_indices))
            self.stored_values = tensor(matrix.values).float()
            self.values_unit = self.stored_values.abs().mean()
            self.values = nn.Parameter(torch.zeros_like(self.stored_values))
        if matrix.perm is not None:
            self.position = torch.argsort(tensor(matrix.perm))

    def _bilevel_units(self) -> Tensor:
        """[tile_rows, groups, 4] for ss, sz, zs, zz."""
        ss, sz, zs, zz = self.stored.unbind(2)

        def spread(codes: Tensor, offset: Tensor) -> Tensor:
            distance = (codes.float() - self._rows(offset)).abs()
            padded = nn.functional.pad(distance, (0, 0, 0, -len(distance) % TILE), value=torch.nan)
            return padded.view(-1, TILE, padded.shape[1]).nanmean(1)

        unit_sz, spread_z = spread(self.scale_codes, sz), spread(self.zero_codes, zz)
        unit = torch.stack([ss.abs(), unit_sz, 1 / spread_z, 1 / zs.abs()], 2)
        return unit.nan_to_num(0, 0, 0)  # what is divided by 0 stays as it is

    def _rows(self, tiles: Tensor) -> Tensor:
        """[tile_rows, groups] -> [out, groups]"""
        # Not repeat_interleave: its gradient is summed in no fixed order on a GPU.
        return tiles.unsqueeze(1).expand(-1, TILE, -1).reshape(-1, tiles.shape[1])[: self.layout.out_features]

    def _numbers(self) -> Tensor:
        return rounded(self.stored + self.unit * self.statistics, torch.float16)

    def _values(self) -> Tensor:
        assert self.values is not None
        return rounded(self.stored_values + self.values_unit * self.values, torch.float16)

    def forward(self) -> Tensor:
        layout = self.layout
        numbers = self._numbers()
        if layout.statistics == "bilevel":
            ss, sz, zs, zz = map(self._rows, numbers.unbind(2))
            scales = ss * (self.scale_codes.float() - sz)
            zeros = zs * (self.zero_codes.float() - zz)
        else:
            scales, zeros = numbers, self.zeros
        weight: Tensor = _Affine.apply(scales, zeros, self.codes)[:, : layout.in_features]  # type: ignore[no-untyped-call]
        if self.source.perm is not None:
            weight = weight[:, self.position]
        if self.values is not None:
            weight = weight.index_put(self.at, self._values(), accumulate=True)
        return weight

    @torch.no_grad()
    def matrix(self) -> SpqrMatrix:
        """The matrix with the learnt numbers, which fp16 holds exactly."""
        numbers = self._numbers().half().cpu().numpy()
        name = "tile_stats" if self.layout.statistics == "bilevel" else "group_scales"
        arrays: dict[str, Any] = {name: numbers}
        if self.values is not None:
            arrays["values"] = self._values().half().cpu().numpy()
        return replace(self.source, **arrays)

"""A solved matrix: torch tensors in the solver's own arrangement, turned into the format's numpy form."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout
from spqr_format.matrix import SpqrMatrix

from .statistics import TILE_ROWS, GroupFit


@dataclass
class Solution:
    """Codes, statistics and outliers of one matrix, filled in group by group.

    codes uint8 [in, rows]; rows = out padded to whole tiles; fits by group number; outliers: bool [in, rows] and their
    float32 values (each exactly an fp16 number), or None.
    """

    layout: Layout
    codes: torch.Tensor
    statistics: dict[str, torch.Tensor]
    free: torch.Tensor | None = None
    values: torch.Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def empty(cls, layout: Layout, device: torch.device) -> Solution:
        rows = layout.tile_rows * TILE_ROWS
        if layout.statistics == "bilevel":
            statistics = {
                "tile_stats": torch.zeros(layout.groups, layout.tile_rows, 4, dtype=torch.float16, device=device),
                "scale_codes": torch.zeros(layout.groups, rows, dtype=torch.uint8, device=device),
                "zero_codes": torch.zeros(layout.groups, rows, dtype=torch.uint8, device=device),
            }
        else:
            statistics = {
                "group_scales": torch.zeros(layout.groups, rows, dtype=torch.float16, device=device),
                "group_zeros": torch.zeros(layout.groups, rows, dtype=torch.uint8, device=device),
            }
        return cls(layout, torch.zeros(layout.in_features, rows, dtype=torch.uint8, device=device), statistics)

    def put(self, group: int, columns: torch.Tensor, fit: GroupFit) -> None:
        """Store the fit of one group whose codes stand in the order of the original columns `columns` (int64 [n])."""
        self.codes[columns] = fit.codes
        for name, tensor in self.statistics.items():
            tensor[group] = getattr(fit, name)

    def put_groups(self, first: int, count: int, fit: GroupFit) -> None:
        """Store the fits of `count` neighbouring groups of one width, the first of them `first`, stacked by rows."""
        groups, rows = slice(first, first + count), self.codes.shape[1]
        width = len(fit.codes)
        columns = self.codes[first * self.layout.group_size :][: width * count]
        columns.view(count, width, rows).copy_(fit.codes.view(width, count, rows).transpose(0, 1))
        for name, tensor in self.statistics.items():
            tensor[groups] = getattr(fit, name).view(tensor[groups].shape)

    def decoded(self) -> torch.Tensor:
        """W float32 [out, in] by the exact arithmetic of spec 3, where the tensors are: equal to `matrix().dequantize()`."""
        if self.layout.statistics == "bilevel":
            stats = self.statistics["tile_stats"].float()
            shape = (*stats.shape[:2], TILE_ROWS)
            codes = [self.statistics[name].view(shape).float() for name in ("scale_codes", "zero_codes")]
            scales = (stats[..., 0:1] * (codes[0] - stats[..., 1:2])).flatten(1)
            zeros = (stats[..., 2:3] * (codes[1] - stats[..., 3:4])).flatten(1)
        else:
            scales, zeros = self.statistics["group_scales"].float(), self.statistics["group_zeros"].float()
        weight = self.codes.float()
        size = self.layout.group_size
        full = len(weight) // size
        for part, groups in ((weight[: full * size], slice(full)), (weight[full * size :], slice(full, None))):
            if len(part):
                by_group = part.view(-1, min(size, len(part)), part.shape[1])
                by_group.sub_(zeros[groups].unsqueeze(1)).mul_(scales[groups].unsqueeze(1))
        if self.values is not None:
            weight = torch.where(self.values != 0, weight + self.values, weight)
        return weight[:, : self.layout.out_features].T.contiguous()

    def matrix(self) -> SpqrMatrix:
        """The same numbers as an SpqrMatrix (padding rows dropped)."""
        out = self.layout.out_features
        arrays = {}
        for name, tensor in self.statistics.items():
            if name == "tile_stats":
                arrays[name] = tensor.permute(1, 0, 2).contiguous().cpu().numpy()
            else:
                arrays[name] = tensor[:, :out].T.contiguous().cpu().numpy()
        if self.free is not None and self.values is not None:
            free = self.free[:, :out].T.contiguous()
            values = self.values[:, :out].T.contiguous()
            free &= values != 0
            rows, columns = free.nonzero(as_tuple=True)
            crow = torch.zeros(out + 1, dtype=torch.int64, device=rows.device)
            crow[1:] = torch.bincount(rows, minlength=out).cumsum(0)
            if len(rows):
                arrays |= {
                    "crow_indices": crow.cpu().numpy(),
                    "col_indices": columns.cpu().numpy(),
                    "values": values[free].half().cpu().numpy(),
                }
        return SpqrMatrix(self.layout, self.codes[:, :out].T.contiguous().cpu().numpy(), **arrays)


def padded_rows(weight: torch.Tensor) -> torch.Tensor:
    """W^T, float32 [in, rows]: the last row repeated until the last tile is full, so that padding bends no statistic."""
    w = weight.detach().float().T
    missing = -w.shape[1] % TILE_ROWS
    if missing:
        w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
    return w.contiguous()


def check_finite(weight: torch.Tensor, name: str) -> None:
    """E502, naming the first index, when a weight is a NaN or an infinity."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise SpqrError("E502", name, f"shape {tuple(weight.shape)}: a matrix with rows and columns is expected")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise SpqrError("E502", f"{name}[{row}, {column}]", f"the weight is {float(weight[row, column])}")

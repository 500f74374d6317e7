"""Quantized matrices of random content, made on the GPU: what the benchmarks multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from spqr_format.layout import CELL_COLUMNS, PANEL_COLUMNS, TILE, Layout


def random_tensors(layout: Layout, outlier_share: float, seed: int, device: str = "cuda") -> tuple[dict[str, Tensor], Layout]:
    """Stored tensors of random codes, statistics that give weights near N(0, 0.02), and uniformly spread outliers."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    tensors = {}
    if outlier_share:
        weights = layout.out_features * layout.in_features
        places = torch.randint(weights, (round(weights * outlier_share),), generator=generator, device=device).unique()
        layout = layout.with_outliers(places.numel())
        values = uniform(-0.1, 0.1, layout.outliers).half().view(torch.int16)
        tensors["outlier_ptr"], tensors["outliers"] = _in_cells(places, values, layout)
    for leaf, spec in layout.tensors().items():
        if leaf in ("weight", "stat_codes"):
            tensors[leaf] = torch.randint(
                -(2**31), 2**31 - 1, spec.shape, generator=generator, device=device, dtype=torch.int32
            )
        elif leaf == "tile_stats":
            shape = (layout.tile_rows, layout.groups)
            stats = [uniform(0.001, 0.003, *shape), uniform(-3, -2, *shape), uniform(0.1, 0.3, *shape)]
            middle = (2**layout.weight_bits - 1) / 2
            stats.append(3.5 - middle / stats[2])
            tensors[leaf] = torch.stack(stats, -1).half().view(torch.int16).view(spec.shape)
        elif leaf == "group_sc":
            tensors[leaf] = uniform(0.005, 0.02, *spec.shape).half().view(torch.int16)
        elif leaf == "group_zp":
            high = 2**layout.weight_bits + 1
            tensors[leaf] = torch.randint(high, spec.shape, generator=generator, device=device, dtype=torch.uint8)
        elif leaf == "perm":
            tensors[leaf] = torch.randperm(layout.in_features, generator=generator, device=device).int()
    return tensors, layout


def _in_cells(places: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """outlier_ptr and outliers (spec 5.3) of values int16 at places row * in_features + column int64, none of them twice."""
    rows, columns = places // layout.in_features, places % layout.in_features
    cells = rows // TILE * layout.cells_a_tile + columns // CELL_COLUMNS
    position = rows % TILE * PANEL_COLUMNS + columns % PANEL_COLUMNS
    order = (cells * TILE * PANEL_COLUMNS + position).argsort()
    counts = cells.bincount(minlength=layout.cells)
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return pointers, (values.int() << 16 | position.int())[order]

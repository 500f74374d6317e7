"""What a conversion will cost and give: from the source's headers alone, with a budget of bits from its weights too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spqr_format.layout import Layout

from . import sensitivity
from .blocks import build, linears, plan
from .budget import plan_bits
from .calibration import Calibration
from .coverage import check_coverage, keep_dense
from .experts import unstack
from .footprint import Footprint, MemoryPlan, Text, plan_memory
from .job import context_length, load_tokenizer, refuse_with_budget, refuse_with_lossless, resolve_device
from .lossless import lossless_plan
from .options import SolverOptions
from .parallel import worker_count
from .ranks import Ranks
from .sources import Source, open_source

_FLOPS = {"cpu": 1.0e11, "cuda": 3.0e13}  # float32 products a second, as seen on 2 cores and on an H200
_WEIGHTS = {"cpu": 4.0e5, "cuda": 9.0e7}  # weights a second and per pass that the search of statistics takes, as seen

_CARRIED = 4.0e7  # weights a second that a lossless conversion carries over and compares, as seen on one core


@dataclass(frozen=True)
class Prediction:
    """bits: stored bits per quantised weight (exact without `outlier_threshold`). budget: what
    a budget of bits is spent on (`BitPlan.as_dict`), None without one.
    Bytes of tensors on disk; seconds are rough. memory: what will be held where, of this many workers (footprint.py)."""

    modules: int
    bits: float
    quantised_parameters: int
    quantised_bytes: int
    dense_parameters: int
    dense_bytes: int
    total_bytes: int
    memory: MemoryPlan
    seconds: float
    device: str
    budget: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory.as_dict()}


def predict(
    source: str | Path | Source,
    *,
    lossless: bool = False,
    weight_bits: int = 3,
    group_size: int = 16,
    statistics: str = "bilevel",
    outlier_share: float | None = None,
    outlier_threshold: float | None = None,
    bits_per_weight: float | None = None,
    calibration: Calibration | None = None,
    keep: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    solver: SolverOptions | None = None,
) -> Prediction:
    """Predict `convert` with the same arguments; reads only config.json and the shards' headers, unless a budget of
    `bits_per_weight` makes it plan as `convert` does, with the calibration. With a threshold the outliers are not known before
    and 0.5 % of the weights is assumed. Errors: as `convert`; without a budget E501, E504, E505, E513."""
    from dataclasses import replace

    options = replace(
        solver or SolverOptions(), weight_bits=weight_bits, group_size=group_size, statistics=statistics,
        outlier_share=outlier_share, outlier_threshold=outlier_threshold,
    )  # fmt: skip
    refuse_with_lossless(lossless, calibration, outlier_share, outlier_threshold, bits_per_weight)
    refuse_with_budget(bits_per_weight, options)
    where = torch.device("cpu") if lossless else resolve_device(device)
    origin = source if isinstance(source, Source) else open_source(source)
    model: Any = build(origin.config, str(origin.folder), len(origin.entries))
    unstack(model, origin)
    todo = keep_dense(plan(model, origin), origin, keep)
    layouts: dict[str, Layout] = {}
    if lossless:
        todo, layouts = lossless_plan(todo, origin)
    check_coverage(todo, origin)
    context = context_length(origin.config)
    text = None if calibration is None else Text.of(calibration, context)
    footprint = Footprint(model, todo, origin, options, text, where, budget=bits_per_weight is not None, lossless=lossless)
    memory = plan_memory(footprint, worker_count(workers), max_memory, where)
    budget = None
    if bits_per_weight is not None:
        windows = None
        if calibration is not None:
            windows, _ = calibration.windows(load_tokenizer(origin.companions()), context, seed)
        with memory.room("measuring", where, None) as room:
            budget = plan_bits(
                model, todo, origin, options, bits_per_weight, windows=windows, room=room, ranks=Ranks(),
                workers=memory.workers, seed=seed,
            )  # fmt: skip
    share = 0.005 if options.outlier_threshold is not None else options.outlier_share or 0.0
    quantised_bytes = quantised = 0
    for tensor in todo.matrices:
        rows, columns = origin.entries[tensor].shape
        if tensor in layouts:
            quantised_bytes += layouts[tensor].stored_bytes()
        else:
            own = options if budget is None else budget.options[tensor]
            quantised_bytes += own.layout(rows, columns).stored_bytes(
                outliers=round((own.outlier_share or share) * rows * columns)
            )
        quantised += rows * columns
    dense = [origin.entries[tensor] for tensor in todo.dense]
    dense_bytes = sum(entry.numel * entry.dtype.itemsize for entry in dense)
    passes = 1 + (1 if options.keeps_outliers else 0)
    flops = 0.0
    if text is not None:
        streams = 2 if options.drift > 0 else 1
        passes += options.sweeps
        squares = sum(layer.in_features**2 for layer in {x.in_features: x for _, x in linears(todo.blocks)}.values())
        flops = streams * 3.5 * 2 * text.tokens * quantised + streams * 2 * text.tokens * squares * len(todo.blocks)
        if budget is not None:  # one pass forward and one with its backward
            flops += 4 * 2 * sensitivity.TOKENS * quantised
    seconds = flops / _FLOPS[where.type if where.type in _FLOPS else "cuda"]
    seconds += quantised * passes * options.rounds / 3 / _WEIGHTS[where.type if where.type in _WEIGHTS else "cuda"]
    if lossless:
        seconds = quantised / _CARRIED / memory.workers
    return Prediction(
        modules=len(todo.matrices),
        bits=8 * quantised_bytes / max(quantised, 1),
        quantised_parameters=quantised,
        quantised_bytes=quantised_bytes,
        dense_parameters=sum(entry.numel for entry in dense),
        dense_bytes=dense_bytes,
        total_bytes=quantised_bytes + dense_bytes,
        memory=memory,
        seconds=seconds + 5,
        device=str(where),
        budget=None if budget is None else budget.as_dict(),
    )

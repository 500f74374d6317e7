"""What a conversion will cost and give: from the source's headers alone, with a budget of bits from its weights too."""

from __future__ import annotations

from collections.abc import Sequence
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
from .job import context_length, load_tokenizer, refuse_with_budget, refuse_with_lossless, resolve_device
from .lossless import lossless_plan
from .options import SolverOptions
from .parallel import beside_gpu, worker_count
from .sources import Source, open_source

_RUNTIME = 400 << 20  # Python, torch and transformers, as seen
_FLOPS = {"cpu": 1.0e11, "cuda": 3.0e13}  # float32 products a second, as seen on 2 cores and on an H200
_WEIGHTS = {"cpu": 4.0e5, "cuda": 9.0e7}  # weights a second and per pass that the search of statistics takes, as seen

_CARRIED = 4.0e7  # weights a second that a lossless conversion carries over and compares, as seen on one core
_CARRIED_BYTES = 8  # a weight of the matrix on its way: codes, words, dequantized, and copies


@dataclass(frozen=True)
class Prediction:
    """bits: stored bits per quantised weight (exact without `outlier_threshold`). budget: what
    a budget of bits is spent on (`BitPlan.as_dict`), None without one.
    Bytes of tensors on disk; peak memory in bytes on the host and on the device (the same memory when the device is the
    CPU, then device_memory is 0); seconds are rough."""

    modules: int
    bits: float
    quantised_parameters: int
    quantised_bytes: int
    dense_parameters: int
    dense_bytes: int
    total_bytes: int
    peak_memory: int
    device_memory: int
    seconds: float
    device: str
    budget: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    budget = None
    if bits_per_weight is not None:
        windows = None
        if calibration is not None:
            windows, _ = calibration.windows(load_tokenizer(origin.companions()), context_length(origin.config), seed)
        budget = plan_bits(
            model,
            todo,
            origin,
            options,
            bits_per_weight,
            windows=windows,
            device=where,
            workers=worker_count(workers),
            seed=seed,
        )
    share = 0.005 if options.outlier_threshold is not None else options.outlier_share or 0.0
    quantised_bytes = quantised = largest = widest = 0
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
        largest, widest = max(largest, rows * columns), max(widest, columns)
    dense = [origin.entries[tensor] for tensor in todo.dense]
    dense_bytes = sum(entry.numel * entry.dtype.itemsize for entry in dense)
    read = max((entry.end - entry.begin for entry in origin.entries.values()), default=0)
    # One matrix on its way: target, decoded, gains, codes and copies of them, and a search of 32 M floats held thrice.
    work = 24 * largest + 3 * 4 * min(1 << 25, 64 * largest)
    passes = 1 + (1 if options.keeps_outliers else 0)
    flops = 0.0
    if calibration is not None:
        tokens = calibration.tokens
        length = calibration.window_length(context_length(origin.config))
        block = max(sum(p.numel() for p in b.parameters()) for b in todo.blocks)
        width = max((layer.in_features for _, layer in linears(todo.blocks[0])), default=1)
        hidden = getattr(model.config.get_text_config(), "hidden_size", width)
        streams = 2 if options.drift > 0 else 1
        batch = calibration.batch * length
        states = 2 if todo.fused else 1  # those before the block, and those before its experts
        # The block (twice with a reference), hidden states, Hessian and its factors in float32 and float64, one batch.
        work += (
            streams * 4 * (block + states * tokens * hidden)
            + (3 * 4 + 5 * 8) * widest * widest
            + 4 * batch * (4 * hidden + 3 * width)
        )
        outside = max((e.numel for e in dense), default=0) * 4
        work = max(work, outside + streams * 4 * tokens * hidden)
        passes += options.sweeps
        squares = sum(layer.in_features**2 for layer in {x.in_features: x for _, x in linears(todo.blocks)}.values())
        flops = streams * 3.5 * 2 * tokens * quantised + streams * 2 * tokens * squares * len(todo.blocks)
        if budget is not None:  # the hidden states before every block, one pass forward and one with its backward
            work += 4 * sensitivity.TOKENS * hidden * len(todo.blocks)
            flops += 4 * 2 * sensitivity.TOKENS * quantised
    seconds = flops / _FLOPS[where.type if where.type in _FLOPS else "cuda"]
    seconds += quantised * passes * options.rounds / 3 / _WEIGHTS[where.type if where.type in _WEIGHTS else "cuda"]
    if lossless:
        work, seconds = _CARRIED_BYTES * largest, quantised / _CARRIED
    on_host = where.type == "cpu"
    workers = worker_count(workers)
    at_once = min(workers if on_host else beside_gpu(workers), len(todo.matrices)) if calibration is None else 1
    if lossless:
        seconds /= at_once
    return Prediction(
        modules=len(todo.matrices),
        bits=8 * quantised_bytes / max(quantised, 1),
        quantised_parameters=quantised,
        quantised_bytes=quantised_bytes,
        dense_parameters=sum(entry.numel for entry in dense),
        dense_bytes=dense_bytes,
        total_bytes=quantised_bytes + dense_bytes,
        peak_memory=_RUNTIME + at_once * (2 * read + (work if on_host else 2 * largest)),
        device_memory=0 if on_host else work,
        seconds=seconds + 5,
        device=str(where),
        budget=None if budget is None else budget.as_dict(),
    )

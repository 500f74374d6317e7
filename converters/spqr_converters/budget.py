"""How the bits of a budget are spread over the modules: what each way to store one would cost the model, then the least
predicted loss within the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spqr_format.errors import SpqrError

from . import sensitivity
from .activations import Room
from .allocation import allocate
from .blocks import Plan
from .options import SolverOptions
from .parallel import in_order, one_thread_each
from .presets import candidates
from .ranks import Ranks
from .sources import Source

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BitPlan:
    """options: tensor name of the source -> what it is stored as. bits: stored bits a weight of all of them together, at most
    the budget. predicted_kl: to the unquantized model, nats a token, to second order and without what the quantizer's
    sweeps gain; None without calibration. modules: the choices by module name, as JSON."""

    bits_per_weight: float
    options: dict[str, SolverOptions]
    bits: float
    predicted_kl: float | None
    modules: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For the provenance and the report."""
        return {
            "bits_per_weight": self.bits_per_weight, "planned_bits": self.bits, "predicted_kl": self.predicted_kl,
            "modules": self.modules,
        }  # fmt: skip

    def usual(self, todo: Plan, source: Source) -> dict[str, Any]:
        """The bits and the group size that hold most weights, for config.json."""
        weights: Counter[tuple[int, int]] = Counter()
        for tensor in todo.matrices:
            options = self.options[tensor]
            weights[options.weight_bits, options.group_size] += source.entries[tensor].numel
        bits, size = weights.most_common(1)[0][0]
        return {"weight_bits": bits, "group_size": size}


def plan_bits(
    model: Any, todo: Plan, source: Source, base: SolverOptions, bits_per_weight: float, *, windows: torch.Tensor | None,
    room: Room, ranks: Ranks, workers: int = 1, seed: int = 0, progress: Progress | None = None,
) -> BitPlan:  # fmt: skip
    """The choice of bits, group size and outlier share for each matrix, from `presets.candidates`, whose predicted loss is
    least among those that take at most `bits_per_weight` stored bits a weight. windows: of the calibration; None for none.
    room: for the hidden states; its device computes. Of several ranks the first measures, and the others wait.

    The same arguments give the same plan, whatever the number of workers. Errors: E505 where the budget is below or above
    what the candidates take, E502 and E503 as the quantizer.
    """
    offered = candidates(bits_per_weight, base)
    tensors = list(todo.matrices)
    costs = [[_stored_bytes(source, tensor, options) for options in offered] for tensor in tensors]
    weights = sum(source.entries[tensor].numel for tensor in tensors)
    least, most = (8 * sum(map(pick, costs)) / weights for pick in (min, max))
    if not least <= bits_per_weight <= most:
        raise SpqrError("E505", "bits_per_weight", f"{bits_per_weight}: this model's matrices take {least:.3f} to {most:.3f}")
    # Candidates are compared after one round: further ones lower the errors of all of them alike.
    quick = [replace(options, rounds=1) for options in offered]
    done = partial(progress, "measuring") if progress else None

    def measure() -> tuple[dict[str, list[float]], dict[str, Any]]:
        if windows is None:
            return _data_free(todo, source, quick, room.device, workers, done), {}
        return sensitivity.Sensitivity(model, todo, source, windows, room, seed).measure(quick, done), {}

    losses = ranks.share(0, measure)[0]
    chosen = allocate(costs, [losses[tensor] for tensor in tensors], int(bits_per_weight * weights / 8))
    options = {tensor: offered[i] for tensor, i in zip(tensors, chosen, strict=True)}
    return BitPlan(
        bits_per_weight, options,
        bits=8 * sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) / weights,
        predicted_kl=None if windows is None else sum(losses[t][i] for t, i in zip(tensors, chosen, strict=True)),
        modules={
            todo.matrices[tensor]: {
                "weight_bits": options[tensor].weight_bits, "group_size": options[tensor].group_size,
                "outlier_share": options[tensor].outlier_share, "bits": 8 * cost[i] / source.entries[tensor].numel,
                "predicted_loss": losses[tensor][i],
            }
            for tensor, cost, i in zip(tensors, costs, chosen, strict=True)
        },
    )  # fmt: skip


def _stored_bytes(source: Source, tensor: str, options: SolverOptions) -> int:
    rows, columns = source.entries[tensor].shape
    outliers = round((options.outlier_share or 0.0) * rows * columns)
    return options.layout(rows, columns).stored_bytes(outliers)


def _data_free(
    todo: Plan, source: Source, offered: list[SolverOptions], device: torch.device, workers: int, progress: Any
) -> dict[str, list[float]]:
    def measure(tensor: str) -> list[float]:
        return sensitivity.data_free(source.load(tensor).to(device), offered, tensor)

    on_host = device.type == "cpu"
    found: dict[str, list[float]] = {}
    with one_thread_each() if on_host else nullcontext():
        results = in_order((partial(measure, tensor) for tensor in todo.matrices), workers if on_host else 1)
        for tensor, losses in zip(todo.matrices, results, strict=True):
            found[tensor] = losses
            if progress:
                progress(len(found), len(todo.matrices))
    return found

"""What the router sends to each expert of a stack, and what the expert makes of it.

The experts modules of transformers keep a contract, so that several implementations can compute them
(`transformers.integrations.moe`): they are called with (hidden_states, top_k_index, top_k_weights), and an expert's output
is down(_apply_gate(gate_up(x))), times the router's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .hessian import Accumulator

# With fewer tokens than this for each input column an expert's matrix is quantized without data. Its Hessian is singular then,
# and what it is damped with counts for more than the tokens do: on tiny-moe data was worth less than 10 % of the error on other
# tokens there, and from here on 14 to 27 % (converters/benchmarks/experts.py).
TOKENS_PER_COLUMN = 1

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor | None]]  # inputs of a matrix, and what the original has for them
Part = Callable[[int], Accumulator | None]  # the sums over the inputs of a shard of the calibration; None where there are none
Solve = Callable[[dict[str, torch.Tensor], Callable[[], Accumulator], Part], list[torch.Tensor]]


def runs_one_by_one(stack: nn.Module) -> bool:
    """Whether a stack (see `experts.stacks`) keeps the contract, and in its plain form."""
    expected = {"has_gate": True, "is_concatenated": True}
    expected |= dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm"), False)
    plain = all(getattr(stack, name, value) == value for name, value in expected.items())
    return plain and hasattr(type(stack), "_apply_gate")


def is_starved(tokens: int, in_features: int) -> bool:
    """Whether so many tokens are too few for the Hessian of a matrix with so many columns."""
    return tokens < TOKENS_PER_COLUMN * in_features


def intermediate(stack: Any, gate_up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The input of an expert's down projection, [n, inner], from that of the expert, [n, hidden], and its gate and up
    projections, [2 * inner, hidden]."""
    gated: torch.Tensor = type(stack)._apply_gate(stack, nn.functional.linear(x, gate_up))
    return gated


@dataclass(frozen=True)
class Routed:
    """One call of a stack: hidden float32 [tokens, hidden]; the experts of each token, chosen int64 [tokens, k], where an empty
    slot holds a number beyond the last expert; and what their outputs are multiplied with, weights float [tokens, k]."""

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Routed:
        """From what the stack was called with."""

        def bound(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Routed:
            return cls(hidden_states, top_k_index, top_k_weights)

        return bound(*args, **kwargs)

    def to(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of an expert, int64 [n], and their weights, float [n, 1]."""
        token, slot = torch.where(self.chosen == expert)
        return token, self.weights[token, slot, None]


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs of a stack's experts: what the model quantized so far gives them, and beside it what the original model has
    for the same tokens (None where nobody asked for it).

    Which tokens belong to an expert is for the router of the quantized model to say: those are the ones that the stored
    expert will meet. The original may have sent some of them elsewhere, and still its expert can be asked what it would
    have made of them.
    """

    seen: list[Routed]
    meant: list[Routed] | None

    def of(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """For each call float32 [n, hidden] twice, and the router's weights, float [n, 1]."""
        for number, call in enumerate(self.seen):
            token, weight = call.to(expert)
            yield call.hidden[token], None if self.meant is None else self.meant[number].hidden[token], weight


def solve_experts(
    stack: Any, original: Any, shards: Sequence[ExpertInputs], names: Iterable[tuple[list[str], list[str]]], solve: Solve,
    name: str,
) -> None:  # fmt: skip
    """Quantizes the experts one after the other, and puts what is decoded in their place, so that a down projection is
    calibrated behind the quantized gate and up. An error of an expert's output is multiplied with the router's weight, so
    every token counts by its square.

    original: the same stack with weights that stay; None without a second stream. shards: the inputs, by shard. names: for
    each expert its matrices' names, by parameter. solve: decoded weights from weights that share their inputs, what makes
    empty sums over these, and the sums of a shard.
    """
    if original is not None:  # which shares its tensors
        for leaf in ("gate_up_proj", "down_proj"):
            setattr(stack, leaf, nn.Parameter(getattr(stack, leaf).detach().clone(), requires_grad=False))
    for expert, (halves, (whole,)) in enumerate(names):
        gate_up, down = stack.gate_up_proj[expert], stack.down_proj[expert]
        new = partial(Accumulator, name=f"{name}.{expert}", device=down.device, reference=original is not None)
        first, second = partial(new, gate_up.shape[1]), partial(new, down.shape[1])
        into, between = partial(_into, expert), partial(_between, expert, stack, original)
        gates = solve(dict(zip(halves, gate_up.chunk(2), strict=True)), first, partial(_sums, first, into, shards))
        gate_up.copy_(torch.cat(gates))
        down.copy_(solve({whole: down}, second, partial(_sums, second, between, shards))[0])


def _into(expert: int, inputs: ExpertInputs) -> Pairs:
    for x, x_reference, weight in inputs.of(expert):
        yield weight * x, None if x_reference is None else weight * x_reference


def _between(expert: int, stack: Any, original: Any, inputs: ExpertInputs) -> Pairs:
    for x, x_reference, weight in inputs.of(expert):
        h_reference = None
        if x_reference is not None:
            h_reference = weight * intermediate(original, original.gate_up_proj[expert], x_reference)
        yield weight * intermediate(stack, stack.gate_up_proj[expert], x), h_reference


def _sums(
    new: Callable[[], Accumulator], pairs: Callable[[ExpertInputs], Pairs], shards: Sequence[ExpertInputs], shard: int
) -> Accumulator | None:
    sums = None
    for x, x_reference in pairs(shards[shard]):
        if len(x):
            sums = sums or new()
            sums.add(x, x_reference)
    return sums

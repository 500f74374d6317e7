"""How much each way to store a module would cost the model: half the importance of each weight times its squared error.

Small errors e of a layer's weights move the output distribution by KL = 1/2 e F e, with F the Fisher information. For a
linear layer F is taken as G (x) H: H = E[x x^T] of its inputs, G = E[g g^T] of the gradients with respect to its outputs of
-log p(label), with labels drawn from the model itself; of G only the diagonal counts. [K-FAC, Martens and Grosse 2015]
The calibrated quantizer feeds errors back, which leaves of e H e the sum of its rounding errors squared, each times the
pivot 1 / U_jj^2 of its column. [GPTQ, Frantar et al. 2022] So every weight gets an importance G_r / U_jj^2, and candidates
can be compared by rounding a few rows, without solving a matrix for each.

Experts that the model holds stacked have an F of their own, of their own tokens. Where those are too few for feedback, the
importance is the diagonal of F. Without calibration every module counts by its size and its relative error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from spqr_format.errors import SpqrError

from . import calibrated, datafree
from .activations import Activations, Room
from .blocks import Plan, linears
from .experts import stacks
from .forward import Stream, load, loaded_outside, unload
from .hessian import Accumulator
from .memory import release
from .options import SolverOptions
from .routing import is_starved, runs_one_by_one
from .sources import Source

TOKENS = 8192  # of the calibration windows that are run forward and backward
_ROWS = 64  # of each matrix that are rounded for each candidate
_TILE = 16

Progress = Callable[[int, int], None]


def measured_windows(windows: torch.Tensor) -> torch.Tensor:
    """Those of the calibration windows int64 [n, length] that are run forward and backward."""
    return windows[: max(1, TOKENS // windows.shape[1])]


def losses(weight: torch.Tensor, importance: torch.Tensor, candidates: Sequence[SolverOptions], name: str) -> list[float]:
    """Half the sum of importance * error^2 over weight [out, in], for each candidate, from at most 64 rows of it: whole
    tiles, evenly apart. importance: float32 [out, in], or what broadcasts to it. The rows' share of the whole is taken as
    their share of importance * weight^2, which is known of all rows."""
    weight = weight.float()
    whole = float((importance * weight.square()).sum(dtype=torch.float64))
    rows = _sampled_rows(len(weight)).to(weight.device)
    part, share = weight[rows], importance.expand_as(weight)[rows]
    signal = float((share * part.square()).sum(dtype=torch.float64))
    found = []
    for options in candidates:
        matrix, _ = datafree.solve(part, options, name)
        error = part - torch.from_numpy(matrix.dequantize()).to(part.device)
        noise = float((share * error.square()).sum(dtype=torch.float64))
        found.append(0.5 * whole * noise / signal if signal > 0 else 0.0)
    return found


def _sampled_rows(count: int) -> torch.Tensor:
    """int64: the rows of some tiles, evenly apart; all rows of a small matrix."""
    tiles = -(-count // _TILE)
    wanted = min(tiles, _ROWS // _TILE)
    firsts = [(2 * i + 1) * tiles // (2 * wanted) * _TILE for i in range(wanted)]
    return torch.cat([torch.arange(first, min(first + _TILE, count)) for first in firsts])


def data_free(weight: torch.Tensor, candidates: Sequence[SolverOptions], name: str) -> list[float]:
    """Without calibration: the relative squared error of the weights times their number."""
    energy = float(weight.float().square().sum(dtype=torch.float64))
    importance = torch.full((1, 1), weight.numel() / max(energy, 1e-30), device=weight.device)
    return losses(weight, importance, candidates, name)


class Sensitivity:
    """Runs the dense model over calibration windows, forward and then backward, with one block's weights in memory at a
    time (and the hidden states before each block)."""

    def __init__(self, model: Any, plan: Plan, source: Source, windows: torch.Tensor, room: Room, seed: int = 0) -> None:
        """windows: int64 [n, length], of which the first ones up to 8192 tokens are used (one at least). room: for the hidden
        states. seed: of the labels that are drawn."""
        self.plan, self.source, self.device = plan, source, room.device
        self.windows = measured_windows(windows)
        self.stream = Stream(model, plan, source, self.windows.split(1), room)
        # Before each block, and behind the last one; going back, the gradients take the place of the hidden states.
        self.between = [*self._forward(room), self.stream.hidden]
        self._head(model, seed)

    def _forward(self, room: Room) -> list[Activations]:
        """The hidden states before each block, window by window."""
        before = []
        for index, block in enumerate(self.plan.blocks):
            before.append(Activations(room, self.stream.hidden))
            load(block, f"{self.plan.prefix}.{index}", self.plan, self.source, self.device)
            self.stream.advance(block, index)
            unload(block)
        return before

    def _head(self, model: Any, seed: int) -> None:
        """Replaces the last block's outputs by the gradients of the summed -log p(label) with respect to them."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with loaded_outside(model, self.plan, self.source, self.device, outputs=True):
            for number, ids in enumerate(self.windows):
                leaf = self.between[-1][number].detach().requires_grad_(True)
                try:
                    for block in self.plan.blocks:
                        block.forward = lambda *_, leaf=leaf, **__: leaf
                    logits = model(input_ids=ids[None].to(self.device), use_cache=False).logits[0, :-1].float()
                finally:
                    for block in self.plan.blocks:
                        del block.forward
                with torch.no_grad():
                    if not bool(torch.isfinite(logits).all()):
                        raise SpqrError("E503", type(model).__name__, "its logits on the calibration text are not finite")
                    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                self.between[-1][number] = torch.autograd.grad(loss, leaf)[0]

    def measure(self, candidates: Sequence[SolverOptions], progress: Progress | None = None) -> dict[str, list[float]]:
        """Tensor name of the source -> predicted KL, nats a token, for each candidate. To be called once.

        A module that these windows never reach gets the median importance of the others for its relative error.
        """
        table: dict[str, list[float]] = {}
        signals: list[float] = []  # of each measured module, for each of its weights

        def add(tensor: str, found: list[float]) -> None:
            table[tensor] = found
            if progress:
                progress(len(table), len(self.plan.matrices))

        for index in reversed(range(len(self.plan.blocks))):
            block, prefix = self.plan.blocks[index], f"{self.plan.prefix}.{index}"
            load(block, prefix, self.plan, self.source, self.device)
            importances = self._backward(block, prefix, index)
            unload(block)
            for tensor, importance in importances.items():
                weight = self.source.load(tensor).to(self.device)
                signal = float((importance * weight.float().square()).mean(dtype=torch.float64))
                if not math.isfinite(signal):
                    raise SpqrError("E503", tensor, "the gradients of the calibration text are not finite")
                if signal > 0:
                    signals.append(signal)
                    add(tensor, losses(weight, importance, candidates, tensor))
                release()
        unreached = [tensor for tensor in self.plan.matrices if tensor not in table]
        usual = statistics.median(signals) if signals else 1.0
        for tensor in unreached:
            found = data_free(self.source.load(tensor).to(self.device), candidates, tensor)
            add(tensor, [usual * loss for loss in found])
        return table

    def _backward(self, block: nn.Module, prefix: str, index: int) -> dict[str, torch.Tensor]:
        """The importance of the weights of a block's matrices, by tensor name of the source. Replaces the hidden states before
        the block by the gradients with respect to them."""
        watch = _Watch(block, prefix, self.device)
        experts = {name: _ExpertWatch(stack) for name, stack in stacks(block, prefix) if runs_one_by_one(stack)}
        try:
            gradients = self.between.pop()
            for number, hidden in enumerate(self.between[index]):
                leaf = hidden.detach().requires_grad_(True)
                args, kwargs = self.stream.calls[tuple(hidden.shape)][index]
                out = block(leaf, *args, **kwargs)
                (out if isinstance(out, torch.Tensor) else out[0]).backward(gradients[number])
                assert leaf.grad is not None
                self.between[index][number] = leaf.grad
        finally:
            watch.end()
            for stack in experts.values():
                stack.end()
        labels = len(self.windows) * (self.windows.shape[1] - 1)
        found = {}
        for name, importance in watch.importances(labels):
            found[self.plan.parameters[f"{name}.weight"]] = importance
        for name, stack in experts.items():
            for (parameter, expert), importance in stack.importances(labels, name):
                tensors = self.plan.experts[f"{name}.{parameter}"][expert]
                found |= dict(zip(tensors, importance.chunk(len(tensors)), strict=True))
        return {tensor: importance for tensor, importance in found.items() if tensor in self.plan.matrices}


class _Watch:
    """Listens to the linear layers of a block: their inputs' Hessians, one for layers that share an input, and the squares
    of the gradients with respect to their outputs."""

    def __init__(self, block: nn.Module, prefix: str, device: torch.device) -> None:
        self.hessians: dict[str, Accumulator] = {}
        self.shared: dict[str, str] = {}  # layer -> the one whose Hessian it shares
        self.squares: dict[str, torch.Tensor] = {}  # layer -> float32 [out], summed over tokens
        self._device = device
        self._last: tuple[str, torch.Tensor] | None = None
        self._handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in linears(block, prefix)
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if name not in self.shared:
                same = self._last is not None and self._last[1] is x
                self.shared[name] = self.shared[self._last[0]] if same and self._last else name
            if self.shared[name] == name:
                hessian = self.hessians.setdefault(name, Accumulator(x.shape[-1], name, self._device))
                hessian.add(x.detach())
            self._last = (name, x)
            if out.requires_grad:  # or nothing that the block is given reaches this layer
                out.register_hook(lambda gradient: self._add(name, gradient))

        return note

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        square = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).sum(0)
        self.squares[name] = self.squares[name] + square if name in self.squares else square

    def importances(self, labels: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Layer and G_r / U_jj^2, float32 [out, in], for a loss that is a mean over so many labels."""
        pivots: dict[str, torch.Tensor] = {}
        for name, first in self.shared.items():
            if self.hessians[first].tokens == 0 or name not in self.squares:
                continue
            if first not in pivots:
                pivots[first] = _pivots(self.hessians[first].mean(), first)
            yield name, (self.squares[name] / labels)[:, None] * pivots[first]

    def end(self) -> None:
        """Stop listening."""
        self._last = None
        for handle in self._handles:
            handle.remove()


class _ExpertWatch:
    """Runs a stack of experts one by one instead of as a whole, and keeps the inputs of each projection and the squares of the
    gradients with respect to its outputs, for there would be too many Hessians to sum them all at once."""

    def __init__(self, stack: Any) -> None:
        self._stack = stack
        self._kept: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        stack.forward = self._forward

    def _forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(len(self._stack.down_proj)):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                h = type(self._stack)._apply_gate(self._stack, self._linear("gate_up_proj", expert, hidden_states[token]))
                y = self._linear("down_proj", expert, h) * top_k_weights[token, slot, None]
                result = result.index_add(0, token, y.to(result.dtype))
        return result

    def _linear(self, leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(x, self._stack.get_parameter(leaf)[expert])
        if out.requires_grad:
            kept = self._kept.setdefault((leaf, expert), [])
            out.register_hook(lambda gradient: kept.append((x.detach(), gradient.float().square())))
        return out

    def importances(self, labels: int, stack: str) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
        """Parameter and expert, and the importances of its weights, float32 [out, in], as `_Watch.importances`."""
        for key, kept in self._kept.items():
            x, squares = (torch.cat(parts) for parts in zip(*kept, strict=True))
            if is_starved(*x.shape):
                yield key, squares.T @ x.square() / labels
                continue
            name = f"{stack}.{key[1]}.{key[0]}"
            hessian = Accumulator(x.shape[1], name, x.device)
            hessian.add(x)
            yield key, (squares.sum(0) / labels)[:, None] * _pivots(hessian.mean(), name, len(x))

    def end(self) -> None:
        """Let the stack run as before."""
        del self._stack.forward


def _pivots(H: torch.Tensor, name: str, tokens: int | None = None) -> torch.Tensor:
    """1 / U_jj^2 of each column, float32 [in]. tokens: as in `calibrated.prepare`."""
    factor = calibrated.prepare(H, SolverOptions(), name, tokens)
    pivots = torch.empty_like(factor.inverse_root[0])
    pivots[factor.order] = factor.inverse_root.diagonal().square().reciprocal()
    return pivots

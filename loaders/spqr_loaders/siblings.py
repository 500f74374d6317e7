"""Layers that are given the same input one after the other, as q, k and v are: the first one computes for all.

A launch for three matrices is faster than three, on the GPU and on the host, but for very many rows. In a compiled graph a pass
over the graph does it (`spqr_kernels.inductor`); here is what serves eager calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from spqr_kernels.dispatch import TOGETHER_BATCH, kind
from spqr_kernels.eager import OneRow
from spqr_kernels.launch import current_stream
from spqr_kernels.ops import asks_for_gradient

if TYPE_CHECKING:
    from .linear import SpqrLinear

# Children of one module that models call with one input.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wq", "wk", "wv"))


class _Results(NamedTuple):
    """Of the layers that have not asked yet, for one input in the state that it had, as queued on one stream."""

    x: Tensor
    version: int
    stream: int
    of_layers: dict[SpqrLinear, Tensor]


class Siblings:
    """Two or three layers of one module in the order in which they are called.

    The results of the others are kept until they ask with the same tensor, unchanged since, on the same stream. Where they do
    not, as with the k and v of cross-attention, that was in vain once, and from then on each computes for itself.
    """

    def __init__(self, layers: Sequence[SpqrLinear]) -> None:
        self.layers = tuple(layers)
        self.most = TOGETHER_BATCH * layers[0].in_features  # numbers in x
        self.one_row: OneRow | None = None  # the way of one row of x
        self.results: _Results | None = None
        self.in_vain = False

    def product(self, layer: SpqrLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x [..., in], or None where it has to compute that itself."""
        held = self.results
        if (
            held is not None and held.x is x and held.version == x._version and held.stream == _stream(x)
            and not asks_for_gradient(x, layer._parameters["bias"])
        ):  # fmt: skip
            result = held.of_layers.pop(layer, None)  # given out once: who has it may change it
            if not held.of_layers:
                self.results = None
            if result is not None:
                return result
        if layer is not self.layers[0] or self.in_vain or not 0 < x.numel() <= self.most:
            return None
        self.in_vain = held is not None
        self.results = None
        if self.in_vain:
            return None
        device, joined, each = x.device, [], []
        for other in self.layers:
            bias, whole = other._parameters["bias"], other.joined if other.is_joined() else None
            if whole is None or whole.device != device or asks_for_gradient(x, bias):  # hooks may move x for each layer
                return None
            if bias is not None and bias.device != device:
                return None
            joined.append(whole)
            each.append(bias)
        found = self._products_of_row(x, joined, each) if x.numel() == layer.in_features else None
        if found is None:
            biases = [bias for bias in each if bias is not None]
            if len(biases) not in (0, len(joined)):
                return None
            geometry = [number for other in self.layers for number in other.geometry]
            found = torch.ops.spqr.linears(x, biases, joined, geometry)
        first, *others = found
        self.results = _Results(x, x._version, _stream(x), dict(zip(self.layers[1:], others, strict=True)))
        return first

    def _products_of_row(self, x: Tensor, joined: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The output of each for a row of x past the dispatcher, where there is that way."""
        if self.one_row is None or not self.one_row.is_of(joined, biases):
            self.one_row = OneRow(joined, [layer.layout for layer in self.layers if layer.layout is not None], biases)
        return self.one_row(x)

    def forget(self) -> None:
        """Lets go of the results, and of the matrices, because a layer has changed."""
        self.results = self.one_row = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"results": None, "one_row": None}


def _stream(x: Tensor) -> int:
    """The current one: on another a result may not be there yet, nor be part of the CUDA graph that is captured there."""
    return current_stream(x.device) if x.is_cuda else 0


def share(model: nn.Module) -> None:
    """Makes siblings of the packed layers of `model` that FAMILIES names, of those of a family that one launch can take."""
    from .linear import SpqrLinear

    for parent in model.modules():
        for names in FAMILIES:
            kinds: dict[object, list[SpqrLinear]] = {}
            for layer in (getattr(parent, name, None) for name in names):
                if isinstance(layer, SpqrLinear) and layer.layout is not None and not layer.layout.permuted:
                    kinds.setdefault((kind(layer.layout), layer.bias is None), []).append(layer)
            for layers in kinds.values():
                together = Siblings(layers) if len(layers) > 1 else None
                for layer in layers:
                    layer.siblings = together

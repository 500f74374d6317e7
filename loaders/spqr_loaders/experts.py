"""Mixture-of-experts layers. transformers fuses all experts of a layer into 3-D parameters; ours stay single matrices.

Outliers differ in number from expert to expert, so quantized experts cannot be stacked. They keep the names of the hub
(`experts.7.gate_proj`), and the conversions that would fuse them are dropped while loading and saving.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spqr_kernels.dispatch import takes_blocks
from spqr_kernels.expert_blocks import MOST, in_blocks, width_for
from spqr_kernels.experts import arrange, tables
from spqr_kernels.joined import length
from spqr_kernels.ops import geometry

from .linear import SpqrLinear
from .names import FUSED

# Where rows are not brought together in blocks: how many weights a launch for all pairs of a row and an expert multiplies in
# the time that a loop takes for one expert, which is the host's. On an H200 the launch was faster at 64 tokens of a Mixtral,
# which this allows, and the loop at 512.
WEIGHTS_OF_A_TURN = 3e9


class _Pool(NamedTuple):
    """All matrices in one tensor, and what `spqr::experts` takes of gate and up, and of down."""

    stored: Tensor  # int32
    tables: tuple[list[Tensor], list[Tensor]]
    geometries: tuple[list[int], list[int]]
    blocks: bool  # whether this device has kernels for blocks of rows in half precision


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this is an experts module of transformers that `SplitExperts` computes alike."""
    fused = all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in FUSED)
    expected = {"has_gate": True, "is_concatenated": True}
    expected |= dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm"), False)
    alike = all(getattr(module, name, value) == value for name, value in expected.items())
    return fused and alike and len(list(module.parameters())) == 2 and hasattr(type(module), "_apply_gate")


class SplitExperts(nn.Module):
    """The experts of one layer, each with its own gate, up and down projection, dense or quantized.

    Computes what the fused module computes: for each token the sum of its experts' outputs, weighted by the router.
    """

    pool: _Pool | None = None
    pooled = False  # whether there should be a pool
    # The modules of each expert, by name; of these a name, its layer, and the layer's joined tensor, a piece of the pool.
    _parts: tuple[tuple[dict[str, nn.Module | None], str, SpqrLinear, Tensor], ...] = ()

    def __init__(self, fused: Any, projections: tuple[str, str, str]) -> None:
        """Dense placeholders on `meta` for the experts of `fused`. projections: their names for gate, up and down."""
        super().__init__()
        self.num_experts, self.hidden, self.intermediate = fused.down_proj.shape
        self.projections = projections
        self._fused: tuple[Any] = (fused,)  # in a tuple, so that its parameters are not parameters of this module
        dtype = fused.down_proj.dtype
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        for index in range(self.num_experts):
            expert = nn.Module()
            for name, (inn, out) in zip(projections, (up, up, down), strict=True):
                expert.add_module(name, nn.Linear(inn, out, bias=False, device="meta", dtype=dtype))
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k], to [tokens, hidden]."""
        if self._takes(hidden_states, top_k_index):
            given, most = (hidden_states, top_k_index, top_k_weights), MOST * self.num_experts // top_k_index.shape[1]
            if len(hidden_states) <= most or self.pool is None or not self.pool.blocks:
                return self._all_pairs(*given)
            turns = zip(*(tensor.split(most) for tensor in given), strict=True)
            return torch.cat([self._all_pairs(*turn) for turn in turns])
        fused = self._fused[0]
        gate, up, down = self.projections
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:  # a slot that the router left empty
                continue
            token, slot = torch.where(top_k_index == index)
            expert, x = getattr(self, str(index)), hidden_states[token]
            both = torch.cat([getattr(expert, gate)(x), getattr(expert, up)(x)], -1)
            y = getattr(expert, down)(type(fused)._apply_gate(fused, both)) * top_k_weights[token, slot, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def _takes(self, x: Tensor, index: Tensor) -> bool:
        """Whether launches for all experts are right, and faster than a loop. Decided from shapes alone."""
        if not self.pooled or (torch.is_grad_enabled() and x.requires_grad):
            return False
        whole = self._is_whole()
        if not whole and not torch.compiler.is_dynamo_compiling():
            self.join()
            whole = self.pooled
        pairs = index.numel()
        if not whole or self._width(x, pairs) is not None:
            return whole
        return pairs * 3 * self.hidden * self.intermediate <= min(pairs, self.num_experts) * WEIGHTS_OF_A_TURN

    def _width(self, x: Tensor, pairs: int) -> int | None:
        """Rows of a block, where the rows of an expert are to be multiplied together."""
        if self.pool is None or not self.pool.blocks or x.dtype not in (torch.float16, torch.bfloat16):
            return None
        return width_for(pairs, self.num_experts)

    @torch.compiler.assume_constant_result
    def _is_whole(self) -> bool:
        """Whether there is a pool, and each layer in its place and in the pool: an adapter may have taken a layer's place.
        A compiled graph asks while it is made, and not again: guards on every expert would take longer than a step."""
        whole = all(its.get(name) is layer and layer.joined is part for its, name, layer, part in self._parts)
        return self.pool is not None and whole

    def _all_pairs(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert self.pool is not None
        fused, stored = self._fused[0], self.pool.stored
        (gate_up, down), (of_gate_up, of_down) = self.pool.tables, self.pool.geometries
        empty = index >= self.num_experts  # slots that the router left empty
        ids = index.masked_fill(empty, 0).reshape(-1).to(torch.int64)
        width = self._width(x, ids.numel())
        if width is None:
            both = torch.ops.spqr.experts(x, ids, stored, gate_up, of_gate_up)
            y = torch.ops.spqr.experts(type(fused)._apply_gate(fused, both), ids, stored, down, of_down)
        else:
            weights = weights.masked_fill(index < 0, torch.nan)  # no expert: the launch for pairs gives NaN of itself
            rows, table, places = in_blocks(ids.clamp(min=0), len(x), self.num_experts, width)
            both = torch.ops.spqr.experts_in_blocks(x[rows], table, stored, gate_up, of_gate_up)
            inner = type(fused)._apply_gate(fused, both)
            y = torch.ops.spqr.experts_in_blocks(inner, table, stored, down, of_down)[places]
        y = y.view(*index.shape, self.hidden) * weights.masked_fill(empty, 0)[..., None]
        return y.sum(1).to(x.dtype)

    def join(self, on_cpu: bool = True) -> None:
        """Lays the tensors of all experts into one, where all are quantized and on one device; on_cpu as in SpqrLinear."""
        self.pool, self.pooled, self._parts = None, False, ()
        experts = [getattr(self, str(index)) for index in range(self.num_experts)]
        layers = [[getattr(expert, name) for name in self.projections] for expert in experts]
        single = [layer for three in layers for layer in three]
        if not all(isinstance(layer, SpqrLinear) and layer.bias is None for layer in single):
            return
        device = single[0].weight.device
        if device.type == "cpu" and not on_cpu:
            return
        for layer in single:
            layer.join()
        if any(layer.joined is None or layer.weight.device != device or layer.layout.permuted for layer in single):
            return
        layouts = [[layer.layout for layer in three] for three in layers]
        begins, end = arrange(layouts)
        # Past nn.Module, and parameters nevertheless: see SpqrLinear.
        stored = nn.Parameter(torch.empty(end, dtype=torch.int32, device=device), requires_grad=False)
        for three, places in zip(layers, begins, strict=True):
            for layer, begin in zip(three, places, strict=True):
                piece = stored.data[begin : begin + length(layer.layout)]
                layer.lie_in(piece.copy_(layer.joined))
        kinds: list[list[Tensor]] = []
        geometries: list[list[int]] = []
        for which in (slice(0, 2), slice(2, 3)):
            found = tables([three[which] for three in layouts], [three[which] for three in begins])
            kinds.append([nn.Parameter(kind.begins.to(device), requires_grad=False) for kind in found])
            geometries.append([int(number) for kind in found for number in geometry(kind.layout)])
        blocks = takes_blocks((layer.layout for layer in single), device)
        self.pool = _Pool(stored, (kinds[0], kinds[1]), (geometries[0], geometries[1]), blocks)
        modules = [(expert._modules, name) for expert in experts for name in self.projections]
        self._parts = tuple((its, name, layer, layer.joined) for (its, name), layer in zip(modules, single, strict=True))
        self.pooled = True

    def _apply(self, fn: Any, recurse: bool = True) -> SplitExperts:
        pooled = self.pooled
        super()._apply(fn, recurse)
        self.join(on_cpu=pooled)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the pool: the layers bring their tensors along, and a copy makes a pool of its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("pool", "_parts")}

    def fuse(self) -> Any:
        """The fused module with these experts' weights, which must be dense by now."""
        fused = self._fused[0]
        gate, up, down = (
            torch.stack([getattr(getattr(self, str(index)), name).weight.detach() for index in range(self.num_experts)])
            for name in self.projections
        )
        fused.gate_up_proj = nn.Parameter(torch.cat([gate, up], 1))
        fused.down_proj = nn.Parameter(down)
        return fused

    def has_quantized(self) -> bool:
        """Whether any projection is quantized."""
        return any(isinstance(module, SpqrLinear) for module in self.modules())

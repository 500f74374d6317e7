"""Mixture-of-experts layers. transformers fuses all experts of a layer into 3-D parameters; ours stay single matrices.

Outliers differ in number from expert to expert, so quantized experts cannot be stacked. They keep the names of the hub
(`experts.7.gate_proj`), and the conversions that would fuse them are dropped while loading and saving.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear import SpqrLinear
from .names import FUSED


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

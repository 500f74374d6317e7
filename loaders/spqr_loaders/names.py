"""Names: what a tensor is called in the checkpoint (hub layout) and in the model.

transformers renames what it loads (a VLM's prefixes, a base model without its head, Mixtral's `block_sparse_moe`), and
tells a quantizer nothing of it. This file asks the same functions as its loader does, so that both agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

FUSED = ("gate_up_proj", "down_proj")  # the two 3-D parameters of transformers' experts modules


def is_expert_converter(conversion: object) -> bool:
    """Whether this conversion fuses the weights of single experts into one 3-D parameter."""
    if not isinstance(conversion, WeightConverter):
        return False
    fused = conversion.target_patterns[0].rpartition(".")[2] in FUSED
    return fused and all("experts.*." in pattern for pattern in conversion._original_source_patterns)


def expert_projections(model: PreTrainedModel) -> tuple[str, str, str]:
    """What the checkpoint calls an expert's gate, up and down projection, such as ("w1", "w3", "w2")."""
    found: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(model):
        if is_expert_converter(conversion):
            parts = [re.search(r"\*\.(\w+)\.weight\W*$", pattern) for pattern in conversion._original_source_patterns]
            if all(parts):
                target = conversion.target_patterns[0].rpartition(".")[2]
                found[target] = [part.group(1) for part in parts if part]
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    if len(gate_up) == 2 and len(down) == 1:
        return gate_up[0], gate_up[1], down[0]
    return "gate_proj", "up_proj", "down_proj"


class Names:
    """Checkpoint names to the names of `model`, whose quantized modules are in place or not yet."""

    def __init__(self, model: PreTrainedModel, split_experts: bool = False) -> None:
        """split_experts: the model's experts are single modules here, so nothing fuses them while loading."""
        conversions = get_model_conversion_mapping(model)
        self.prefix = model.base_model_prefix
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.converters = [c for c in converters if not (split_experts and is_expert_converter(c))]

    def in_model(self, key: str, state: dict[str, Any]) -> tuple[list[str], bool]:
        """The model's names of what the stored tensor `key` becomes, and whether it gets there unchanged.

        `state` holds the model's names; a name that is not in it means that the model has no place for the tensor.
        """
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], self.prefix, state)
        if pattern is None:
            return [name], True
        targets = next(c for c in self.converters if pattern in c.source_patterns).target_patterns
        return [name.replace(targets[0], target) for target in targets], False


def hub_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """Module name in `model` -> the name under which `save_pretrained` writes its tensors."""
    # The same function that save_pretrained calls, on empty tensors: each is found again by its identity.
    tags = {f"{module}.weight": torch.empty(0, device="meta") for module in modules}
    owners = {id(tag): key.removesuffix(".weight") for key, tag in tags.items()}
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(tags))
    return {owners[id(tag)]: key.removesuffix(".weight") for key, tag in stored.items()}


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the module name, its last parts, its first parts, or a regular expression for all of it.

    Our own rule: transformers' lets `layers.1` mean `layers.10` before 5.21.
    """
    return f".{name}.".endswith(f".{pattern}.") or f"{name}.".startswith(f"{pattern}.") or _fullmatch(pattern, name)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers of the model; subclasses have a meaning of their own and are left alone."""
    return ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)

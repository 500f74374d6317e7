"""Experts: the model of transformers holds those of a layer stacked, checkpoints mostly one by one, under other names.

Every expert's projection is quantized as a matrix of its own, under its name on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .sources import DenseSource, Source

FUSED = ("gate_up_proj", "down_proj")  # [experts, 2 * inner, hidden] and [experts, hidden, inner]


class HubNames:
    """What transformers makes of a checkpoint's names when it loads them (Mixtral's `block_sparse_moe`), asked of itself."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        self._state = dict.fromkeys(name for name, _ in names)

    def in_model(self, tensor: str) -> str:
        """The name that a checkpoint's tensor has in the model; an expert's own one is `...experts.7.gate_proj.weight`."""
        from transformers.core_model_loading import rename_source_key

        if tensor in self._state:
            return tensor
        renamed: str = rename_source_key(tensor, self._renamings, [], self._prefix, self._state)[0]
        return renamed

    def projections(self) -> tuple[str, str, str]:
        """What the checkpoint calls an expert's gate, up and down projection, such as ("w1", "w3", "w2")."""
        found: dict[str, list[str]] = {}
        for conversion in self._converters:
            target = conversion.target_patterns[0].rpartition(".")[2]
            parts = [re.search(r"experts\.\*\.(\w+)\.weight\W*$", p) for p in conversion._original_source_patterns]
            if target in FUSED and all(parts):
                found[target] = [part.group(1) for part in parts if part]
        gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
        return (
            (gate_up[0], gate_up[1], down[0]) if (len(gate_up), len(down)) == (2, 1) else ("gate_proj", "up_proj", "down_proj")
        )


def stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Names and modules inside that hold experts as the two stacks of `FUSED`, rows first, without biases."""
    for name, child in module.named_modules(prefix=prefix):
        shapes = [tuple(getattr(getattr(child, leaf, None), "shape", ())) for leaf in FUSED]
        if [len(shape) for shape in shapes] == [3, 3] and _fits(*shapes) and len(list(child.parameters())) == 2:
            yield name, child


def _fits(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    experts, hidden, inner = down
    return gate_up == (experts, 2 * inner, hidden)


def single_names(stack: str, experts: int, projections: tuple[str, str, str]) -> dict[str, list[list[str]]]:
    """Model parameter -> for each expert the names, in the model's spelling, of the tensors that lie in it, in order."""
    gate, up, down = projections
    return {
        f"{stack}.{leaf}": [[f"{stack}.{i}.{part}.weight" for part in parts] for i in range(experts)]
        for leaf, parts in zip(FUSED, ((gate, up), (down,)), strict=True)
    }


def unstack(model: Any, source: Source) -> None:
    """Lets a dense source that stores experts stacked offer them one by one. Other sources are left as they are."""
    if not isinstance(source, DenseSource):
        return
    names = HubNames(model)
    in_source = {names.in_model(tensor): tensor for tensor, entry in source.entries.items() if len(entry.shape) == 3}
    for stack, module in stacks(model, ""):
        for parameter, rows in single_names(stack, len(module.down_proj), names.projections()).items():
            tensor = in_source.get(parameter)
            if tensor is None or source.entries[tensor].shape != tuple(model.get_parameter(parameter).shape):
                continue
            # The name in the checkpoint may have another prefix than the one in the model.
            outer = tensor.removesuffix(".weight").rpartition(".")[0]
            source.split(tensor, [[outer + name.removeprefix(stack) for name in row] for row in rows])

"""Puts a quantized module where the checkpoint holds one, and checks that model and checkpoint fit, from headers alone.

Everything here happens before a tensor is read. transformers itself only warns of missing and unexpected tensors, and
before 5.23 it does not even compare shapes once a quantizer is at work.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spqr_format.errors import SpqrError
from spqr_format.metadata import features_of
from spqr_format.reader import Checkpoint

from .config import SpqrFormatConfig
from .experts import SplitExperts, is_fused_experts
from .linear import SpqrLinear
from .names import Names, expert_projections


def place(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Replaces the model's linear layers by SpqrLinear wherever the checkpoint holds a quantized module.

    The model is on `meta`. Returns model name -> checkpoint name of the modules placed.
    Raises SpqrError E508 where the two do not fit.
    """
    if any(re.search(r"\.experts\.\d+\.", f"{hub}.") for hub in checkpoint.modules):
        split_experts(model)
    names = Names(model, split_experts=any(isinstance(module, SplitExperts) for module in model.modules()))
    state = model.state_dict()
    ties = _ties(model)
    tied = {*ties, *ties.values()}
    placed: dict[str, str] = {}
    for hub, layout in checkpoint.modules.items():
        (target, *_), _ = names.in_model(f"{hub}.weight", state)
        name = target.removesuffix(".weight")
        if target not in state:
            if _may_be_left(model, hub, name, checkpoint):
                continue
            raise SpqrError("E508", hub, f"{type(model).__name__} has no linear layer {name}")
        dense = model.get_submodule(name)
        if type(dense) is not nn.Linear:
            raise SpqrError("E508", hub, f"{name} of {type(model).__name__} is a {type(dense).__name__}, not a Linear")
        if (dense.out_features, dense.in_features) != (layout.out_features, layout.in_features):
            found = f"{layout.out_features} x {layout.in_features}"
            raise SpqrError("E508", hub, f"{found}, but {name} is {dense.out_features} x {dense.in_features}")
        if target in tied:
            what = "is tied to another tensor; set tie_word_embeddings to false in config.json"
            raise SpqrError("E508", hub, f"quantized, but {target} {what}")
        layer = SpqrLinear(layout, device="meta")
        layer.bias = dense.bias
        model.set_submodule(name, layer)
        placed[name] = hub
    check_fit(model, names, checkpoint, placed)
    return placed


def split_experts(model: PreTrainedModel) -> list[str]:
    """Replaces every fused experts module by single projections; returns their names."""
    fused = [name for name, module in model.named_modules() if is_fused_experts(module)]
    projections = expert_projections(model) if fused else ("", "", "")
    for name in fused:
        experts = SplitExperts(model.get_submodule(name), projections)
        model.set_submodule(name, experts)
    return fused


def check_fit(model: PreTrainedModel, names: Names, checkpoint: Checkpoint, placed: Mapping[str, str]) -> None:
    """Every parameter of the model has a stored tensor of its shape, and every quantized tensor has a place.

    Raises SpqrError E508 otherwise.
    """
    state = model.state_dict()
    hubs, loaded = set(placed.values()), set()
    for key in checkpoint.place:
        targets, unchanged = names.in_model(key, state)
        loaded.update(targets)
        module = key.rpartition(".")[0]
        if targets[0] not in state:
            if module in hubs:
                raise SpqrError("E508", key, f"{type(model).__name__} has no place for it: {targets[0]} is not there")
        elif unchanged and tuple(state[targets[0]].shape) != checkpoint.info(key).shape:
            stored, expected = list(checkpoint.info(key).shape), list(state[targets[0]].shape)
            raise SpqrError("E508", key, f"shape {stored}, but {targets[0]} is {expected}")
    check_missing(model, loaded, "the checkpoint has no tensor for it")


def check_missing(model: PreTrainedModel, loaded: Collection[str], what: str) -> None:
    """Raises SpqrError E508 for parameters that are neither in `loaded`, nor tied to one, nor allowed to be absent."""
    ties = _ties(model)  # tied name -> the name that it shares its tensor with
    owned = {ties.get(name, name) for name in loaded}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if ties.get(name, name) not in owned and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise SpqrError("E508", missing[0], f"{what}{more}; it would be random")


def check_agreement(config: SpqrFormatConfig, checkpoint: Checkpoint) -> None:
    """Raises SpqrError E105 where config.json and the shards name another version or other features."""
    where = "config.json quantization_config"
    if config.format_version != checkpoint.version:
        raise SpqrError("E105", where, f"format_version {config.format_version}, the shards have {checkpoint.version}")
    used = features_of(checkpoint.modules.values())
    if set(config.features) != set(used):
        raise SpqrError("E105", where, f"features {config.features}, the shards use {used}")


def _ties(model: PreTrainedModel) -> dict[str, str]:
    ties: dict[str, Any] | None = getattr(model, "all_tied_weights_keys", None)
    return dict(ties or {})


def _may_be_left(model: PreTrainedModel, hub: str, name: str, checkpoint: Checkpoint) -> bool:
    """Whether a quantized module without a place is expected: a base model's head, or what the model says it drops."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    if any(re.search(pattern, f"{key}.weight") for pattern in patterns for key in (hub, name)):
        return True
    prefix = f"{model.base_model_prefix}."
    is_base = model.base_model is model and any(key.startswith(prefix) for key in checkpoint.place)
    return is_base and not hub.startswith(prefix)

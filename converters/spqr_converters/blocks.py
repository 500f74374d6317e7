"""The parts of a decoder language model, found without knowing its architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spqr_format.errors import SpqrError
from spqr_format.header import short

from .experts import FUSED, HubNames, single_names, stacks
from .sources import Source


def build(config: dict[str, Any], folder: str, tensors: int | None = None) -> nn.Module:
    """The causal LM of a config with its parameters on the meta device and its buffers real. E501 when transformers
    does not know it, or when it has more layers than the source has `tensors`. No code from the checkpoint is ever run."""
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    for holder in (config, config.get("text_config")):
        layers = holder.get("num_hidden_layers") if isinstance(holder, dict) else None
        if tensors is not None and isinstance(layers, int) and layers > tensors:  # or it would be built for hours
            raise SpqrError("E501", folder, f"config.json has {layers} layers, the checkpoint {tensors} tensors")
    kind = config.get("model_type")
    try:
        if isinstance(kind, str) and kind in CONFIG_MAPPING:  # the folder may have no config.json of its own (GGUF)
            parsed = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config))
        else:
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever a model's code raises at values that it does not expect
        shown = config.get("architectures") or kind
        raise SpqrError("E501", folder, f"transformers builds no causal LM of {shown}: {short(str(error), 300)}") from None
    return model.eval()


@dataclass
class Plan:
    """What becomes of every tensor of a source.

    prefix and blocks: the decoder blocks. matrices: tensor name of the source -> module name, for each 2-D weight to be
    quantised, in source order. fused: those of them that are experts, which the model holds stacked.
    dense: tensor name -> why it stays dense. parameters: model parameter name -> source tensor name. experts: stacked
    parameter of the model -> for each expert the source tensors whose rows it holds.
    """

    prefix: str
    blocks: nn.ModuleList
    matrices: dict[str, str] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    dense: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    experts: dict[str, list[list[str]]] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of same-class modules with the most parameters, each of them with a linear layer. E504 if none."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            same = len({type(child) for child in module}) == 1
            if same and all(any(isinstance(m, nn.Linear) for m in child.modules()) for child in module):
                found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found:
        raise SpqrError("E504", type(model).__name__, "no list of decoder blocks with linear layers")
    _, name, blocks = max(found, key=lambda row: row[0])
    return name, blocks


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of each linear layer inside."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear):
            yield name, child


def plan(model: nn.Module, source: Source) -> Plan:
    """Decide for every tensor of the source: quantised, or dense and why. E504 when nothing can be quantised, or when
    experts lie stacked in a 3-D tensor of the source; E501 when a linear layer's weight is missing there."""
    prefix, blocks = find_blocks(model)
    result = Plan(prefix, blocks)
    base = getattr(model, "base_model_prefix", "")
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        for candidate in (name, name.removeprefix(base + ".")):
            if candidate in source.entries:
                result.parameters[name] = candidate
                break
    names = HubNames(model)
    in_model = {tensor: names.in_model(tensor) for tensor in source.entries}
    in_source = {name: tensor for tensor, name in in_model.items()}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name not in result.parameters and name in in_source:
            result.parameters[name] = in_source[name]
    by_tensor = {tensor: name for name, tensor in result.parameters.items()}
    wanted: dict[str, str] = {}
    for name, layer in linears(blocks, prefix):
        parameter = f"{name}.weight"
        if parameter not in result.parameters:
            raise SpqrError("E501", str(source.folder), f"tensor {parameter} is missing")
        tensor = result.parameters[parameter]
        if source.entries[tensor].shape != tuple(layer.weight.shape):
            raise SpqrError(
                "E501", tensor, f"shape {source.entries[tensor].shape}, config.json implies {tuple(layer.weight.shape)}"
            )
        wanted[tensor] = tensor.removesuffix(".weight")
    for stack, module in stacks(blocks, prefix):
        for parameter, rows in single_names(stack, len(module.down_proj), names.projections()).items():
            if all(name in in_source for row in rows for name in row):
                result.experts[parameter] = [[in_source[name] for name in row] for row in rows]
                for tensor in (tensor for row in result.experts[parameter] for tensor in row):
                    if len(source.entries[tensor].shape) == 2:
                        wanted[tensor] = tensor.removesuffix(".weight")
                        result.fused.add(tensor)
    for name, module in blocks.named_modules(prefix=prefix):
        for leaf in FUSED:
            parameter = f"{name}.{leaf}"
            if getattr(getattr(module, leaf, None), "ndim", 0) == 3 and parameter in result.parameters:
                what = "experts stacked in one 3-D tensor of this kind cannot be quantised yet"
                raise SpqrError("E504", result.parameters[parameter], what)
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    modules = dict(model.named_modules(remove_duplicate=False))
    for tensor, entry in source.entries.items():
        if tensor in wanted:
            result.matrices[tensor] = wanted[tensor]
            continue
        owner = modules.get(by_tensor.get(tensor, "").rpartition(".")[0])
        if tensor not in by_tensor:
            reason = "not a parameter of the model"
        elif owner is inputs or isinstance(owner, nn.Embedding):
            reason = "embedding"
        elif owner is outputs:
            reason = "lm_head"
        elif isinstance(owner, nn.Linear) and tensor.endswith(".bias"):
            reason = "bias"
        elif len(entry.shape) < 2:
            reason = "vector"
        elif isinstance(owner, nn.Linear):
            reason = "outside the decoder blocks"
        else:
            reason = f"not a linear layer ({type(owner).__name__})"
        result.dense[tensor] = reason
    return result

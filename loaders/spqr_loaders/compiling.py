"""How a step of a SpQR model is compiled, where its cache is static and its caller does not say.

As transformers has it for every model, by Inductor; and Inductor's kernels too begin while the one before them ends, as ours
do, which torch leaves off (`spqr_kernels.overlap`): 259 to 292 tokens/s of a model of LLaMA-2-7B's shape on an H200."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config
from transformers import CompileConfig, PreTrainedModel


def compile_config() -> CompileConfig:
    """transformers' own, a CUDA graph, with dependent launches where the GPU and torch have them."""
    overlap = _overlap()
    if not overlap:
        return CompileConfig()
    reduce_overhead = torch._inductor.list_mode_options(CompileConfig().mode)
    return CompileConfig(mode=None, options=reduce_overhead | overlap)  # type: ignore[arg-type]  # torch takes one of both


def compile_config_within_a_graph() -> CompileConfig:
    """For what is recorded as a CUDA graph by its caller."""
    return CompileConfig(mode=None, options=_overlap())  # type: ignore[arg-type]


def _overlap() -> dict[str, Any]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or not hasattr(config.triton, "enable_pdl"):
        return {}
    return {"triton.enable_pdl": True}


def prefer_overlap(model: PreTrainedModel) -> None:
    """Makes `compile_config` what `model.generate` takes where it is given none."""
    model._default_compile_config = compile_config  # type: ignore[method-assign]

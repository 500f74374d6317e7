"""GGUF's names and metadata keys of decoder models, and the Hugging Face ones. Both ways: the source reads by these
tables, the export writes by them. tests/converters/test_gguf.py holds the names equal to gguf-py's own map."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spqr_format.errors import SpqrError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_QWEN_MOE = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_QWEN_EXPERTS = {f"ffn_{leaf}_exps": f"mlp.experts.{{}}.{leaf}_proj" for leaf in ("gate", "up", "down")}
_MIXTRAL_EXPERTS = {
    f"ffn_{leaf}_exps": f"block_sparse_moe.experts.{{}}.{w}" for leaf, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}


@dataclass(frozen=True)
class Family:
    """One architecture: its names within a block, and what GGUF changes in values.

    permuted: rows of q and k are reordered within each head. norm_offset: added to norm weights by GGUF.
    """

    model_type: str
    architecture: str
    block: dict[str, str]
    experts: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: int = 0


_LLAMA_BLOCK = {**_ATTENTION, **_FFN_NORM, **_MLP}
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_BLOCK, permuted=True),
    "mixtral": Family(
        "mixtral", "MixtralForCausalLM", {**_ATTENTION, **_FFN_NORM, "ffn_gate_inp": "block_sparse_moe.gate"},
        _MIXTRAL_EXPERTS, permuted=True,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_LLAMA_BLOCK, **_QK_NORM}),
    "qwen2moe": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_ATTENTION, **_FFN_NORM, **_QWEN_MOE, **_SHARED}, _QWEN_EXPERTS
    ),
    "qwen3moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**_ATTENTION, **_FFN_NORM, **_QK_NORM, **_QWEN_MOE}, _QWEN_EXPERTS
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", _LLAMA_BLOCK, norm_offset=1),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", {**_ATTENTION, **_SANDWICH, **_MLP}, norm_offset=1),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**_ATTENTION, **_QK_NORM, **_SANDWICH, **_MLP}, norm_offset=1),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
            **_FFN_NORM, "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        },
    ),
}  # fmt: skip
TOP = _TOP
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)\.(weight|bias)")
_OLD_EXPERT = re.compile(r"(ffn_(?:gate|up|down))\.(\d{1,5})")


def hf_name(family: Family, name: str) -> tuple[str, bool] | None:
    """The Hugging Face name of a GGUF tensor, and whether it holds stacked experts ("{}" stands for the number then).
    None where the architecture has no such tensor."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP and leaf in ("weight", "bias"):
        return f"{_TOP[stem]}.{leaf}", False
    match = _BLOCK.fullmatch(name)
    if not match:
        return None
    prefix, part, leaf = f"model.layers.{int(match[1])}.", match[2], match[3]
    if part in family.block:
        return f"{prefix}{family.block[part]}.{leaf}", False
    if part in family.experts:
        return f"{prefix}{family.experts[part]}.{leaf}", True
    old = _OLD_EXPERT.fullmatch(part)  # files of before April 2024
    if old and f"{old[1]}_exps" in family.experts:
        return f"{prefix}{family.experts[old[1] + '_exps'].format(int(old[2]))}.{leaf}", False
    return None


def gguf_name(family: Family, name: str) -> str | None:
    """The inverse of `hf_name` for tensors that are not experts."""
    stem, _, leaf = name.rpartition(".")
    for gguf, hf in _TOP.items():
        if hf == stem:
            return f"{gguf}.{leaf}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match:
        for gguf, hf in family.block.items():
            if hf == match[2]:
                return f"blk.{match[1]}.{gguf}.{leaf}"
    return None


def gguf_expert(family: Family, name: str) -> tuple[str, int] | None:
    """The GGUF tensor in which an expert's tensor is stacked, and its number; None for any other tensor."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        for gguf, hf in family.experts.items():
            number = re.fullmatch(re.escape(hf).replace(r"\{\}", r"(\d+)"), match[2])
            if number:
                return f"blk.{match[1]}.{gguf}.{match[3]}", int(number[1])
    return None


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's row order of q or k [heads * head_dim, ...] to llama.cpp's: the two halves of a head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """float32 [head_dim / 2]: what llama.cpp divides each rotary frequency by, for rope_type llama3."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = int(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return found.astype(np.float32)


def llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The rope_parameters that give these factors, or None. Only the constants that Meta's models use are tried."""
    for context in (8192, 4096, 16384, 32768):
        scaling = {
            "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }  # fmt: skip
        if np.allclose(llama3_factors(2 * factors.size, theta, scaling), factors, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **scaling}
    return None


class Keys:
    """Metadata of one architecture, each value checked for its type. where: for messages (E501)."""

    def __init__(self, metadata: dict[str, Any], prefix: str, where: str) -> None:
        self.metadata, self.prefix, self.where = metadata, prefix, where

    def whole(self, key: str, default: int | None = None, limit: int = 2**31) -> int:
        """An integer from 1 to limit."""
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            shown = "an array" if hasattr(value, "__len__") else value
            raise SpqrError("E501", self.where, f"{self.prefix}.{key} is {shown}, expected an integer from 1 to {limit}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number. float32's shortest decimal form, as config.json had it: 1e-05 and not 9.999e-06."""
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise SpqrError("E501", self.where, f"{self.prefix}.{key} is {value}, expected a positive number")
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

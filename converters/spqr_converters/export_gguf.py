"""A GGUF file of a decoder model, by gguf-py's writer: F32, F16, BF16 or Q8_0, with metadata and tokenizer."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import gguf
import numpy as np
import torch

from spqr_format.errors import SpqrError

from .export import Exporter, Output
from .sources.gguf_names import FAMILIES, Family, gguf_expert, gguf_name, llama3_factors, permute

# model_type -> our family of names, and GGUF's architecture
_ARCHS = {
    "llama": ("llama", "llama"), "mistral": ("llama", "llama"), "mixtral": ("mixtral", "llama"),
    "qwen2": ("qwen2", "qwen2"), "qwen3": ("qwen3", "qwen3"), "qwen2_moe": ("qwen2moe", "qwen2moe"),
    "qwen3_moe": ("qwen3moe", "qwen3moe"), "gemma": ("gemma", "gemma"), "gemma2": ("gemma2", "gemma2"),
    "gemma3_text": ("gemma3", "gemma3"), "phi3": ("phi3", "phi3"),
}  # fmt: skip
_WINDOWED = ("gemma2", "gemma3", "phi3")  # architectures whose sliding window llama.cpp knows
_ROUTER = "ffn_gate_inp"  # routers stay in F32, as llama.cpp's converter leaves them
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Names of llama.cpp for ways to split a text before BPE, from the names that transformers' table gives to each pattern.
_PREFERRED = ("llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o")


class GgufExporter(Exporter):
    """Matrices in the chosen type (rows that no Q8_0 block divides: F16), vectors in F32, as llama.cpp's converter does."""

    to = "gguf"

    def write(self, output: Output, max_shard_bytes: int) -> None:
        family, arch = self._family()
        kind = _KINDS[self.dtype]
        self._vocabulary()  # refuses before anything is written
        if arch not in _WINDOWED and self.config.get("sliding_window") and self.config.get("use_sliding_window", True):
            self.report.notes.append("llama.cpp attends to the whole context here: the model's sliding window is not written")
        file = f"model-{kind}.gguf"
        writer = gguf.GGUFWriter(output.path(file), arch)
        try:
            self._metadata(writer, arch, kind)
            rope = self._rope_factors()
            if rope is not None:
                writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
            rows = self._rows(family, arch, kind)
            for stored, (names, typed) in rows.items():
                shape = self._stored_shape(names, stored)
                block, size = gguf.GGML_QUANT_SIZES[typed]
                nbytes = math.prod(shape) // block * size
                writer.add_tensor_info(stored, shape, np.dtype(np.float32), nbytes, raw_dtype=typed)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if rope is not None:
                writer.write_tensor_data(rope)
            for stored, (names, typed) in rows.items():
                parts = []
                for name in names:
                    parts.append(self._data(name, typed, family))
                    self.advance(name)
                data = np.stack(parts) if self._stacked(stored) else parts[0]
                writer.write_tensor_data(data.reshape(-1) if stored.endswith("_inp_shexp.weight") else data)
        finally:
            writer.close()

    def _rows(self, family: Family, arch: str, kind: str) -> dict[str, tuple[list[str], Any]]:
        """GGUF's tensor -> ours, several where it stacks experts, and its type."""
        rows: dict[str, tuple[list[str], Any]] = {}
        for name in self.names:
            expert = gguf_expert(family, name)
            stored = expert[0] if expert else gguf_name(family, name)
            if stored is None:
                raise SpqrError("E505", name, f"no name in GGUF's {arch}: export --to safetensors")
            names, _ = rows.setdefault(stored, ([], self._type(name, "F32" if _ROUTER in stored else kind)))
            if expert and expert[1] != len(names):
                raise SpqrError("E505", name, f"expert {len(names)} is missing before it")
            names.append(name)
        for stored, (names, _) in rows.items():
            shapes = {self.shapes[name] for name in names}
            if self._stacked(stored) and (len(names) != self._experts() or len(shapes) > 1):
                raise SpqrError(
                    "E505", names[0], f"{len(names)} experts of shapes {sorted(shapes)}, expected {self._experts()}"
                )
        return rows

    @staticmethod
    def _stacked(stored: str) -> bool:
        return stored.endswith("_exps.weight")

    def _stored_shape(self, names: list[str], stored: str) -> tuple[int, ...]:
        shape = self.shapes[names[0]]
        if self._stacked(stored):
            return (len(names), *shape)
        return shape[1:] if stored.endswith("_inp_shexp.weight") else shape

    def _experts(self) -> int:
        return int(self.config.get("num_experts") or self.config.get("num_local_experts") or 0)

    def _family(self) -> tuple[Family, str]:
        kind = str(self.config.get("model_type"))
        if kind not in _ARCHS or self.config.get("partial_rotary_factor", 1.0) != 1.0:
            raise SpqrError("E505", "export", f"GGUF of a {kind} model is not written: export --to safetensors")
        family, arch = _ARCHS[kind]
        # What llama.cpp takes for granted, because its metadata has no key for it.
        fixed = {
            "qwen2moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
            "qwen3moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        }.get(arch, {})
        for key, value in fixed.items():
            if self.config.get(key, value) != value:
                raise SpqrError("E505", "export", f"{key} = {self.config[key]}: llama.cpp has no {kind} of that kind")
        return FAMILIES[family], arch

    def _type(self, name: str, kind: str) -> Any:
        if len(self.shapes[name]) < 2:
            kind = "F32"
        elif kind == "Q8_0" and self.shapes[name][-1] % 32:
            kind = "F16"
        return gguf.GGMLQuantizationType[kind]

    def _heads(self, name: str) -> int:
        heads = int(self.config["num_attention_heads"])
        if ".q_proj." in name:
            return heads
        return int(self.config.get("num_key_value_heads") or heads) if ".k_proj." in name else 0

    def _data(self, name: str, typed: Any, family: Family) -> np.ndarray:
        tensor = self.load(name)
        if family.norm_offset and name.endswith("norm.weight"):
            tensor = tensor.float() + family.norm_offset
        if typed.name == "Q8_0":
            exact = tensor.float()
            values = self._permuted(name, exact, family)
            blocks = gguf.quantize(values.numpy(), typed)
            self.rounded(name, values, torch.from_numpy(gguf.dequantize(blocks, typed)))
            return blocks
        found = self._permuted(name, self.cast(name, tensor, _TORCH[typed.name]), family)
        return found.view(torch.int16).numpy().view(np.uint16) if typed.name == "BF16" else found.numpy()

    def _permuted(self, name: str, tensor: torch.Tensor, family: Family) -> torch.Tensor:
        heads = self._heads(name)
        if not family.permuted or not heads:
            return tensor.contiguous()
        order = permute(np.arange(tensor.shape[0]), heads)
        return tensor[torch.from_numpy(order)].contiguous()

    # Metadata

    def _rope(self) -> dict[str, Any]:
        legacy = self.config.get("rope_scaling") or {}
        own = self.config.get("rope_parameters") or {}
        own = own.get("full_attention", own)  # gemma 3 has a second one for its windows
        found = {"rope_theta": self.config.get("rope_theta", 10000.0), **legacy, **own}
        found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
        if found["rope_type"] not in ("default", "linear", "yarn", "llama3"):
            raise SpqrError("E505", "export", f"rotary scaling {found['rope_type']!r} is not written to GGUF")
        return found

    def _head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def _rope_factors(self) -> np.ndarray | None:
        rope = self._rope()
        return llama3_factors(self._head_dim(), float(rope["rope_theta"]), rope) if rope["rope_type"] == "llama3" else None

    def _metadata(self, writer: Any, arch: str, kind: str) -> None:
        config, rope = self.config, self._rope()
        heads = int(config["num_attention_heads"])
        writer.add_type("model")
        writer.add_name(self.folder.resolve().name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(2)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_rope_dimension_count(self._head_dim())
        writer.add_key_length(self._head_dim())
        writer.add_value_length(self._head_dim())
        writer.add_vocab_size(config["vocab_size"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(float(rope["factor"]))
            if rope["rope_type"] == "yarn":
                context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
                writer.add_rope_scaling_orig_ctx_len(int(context))
        self._special(writer, arch)
        for key, content in self._vocabulary().items():
            getattr(writer, f"add_{key}")(content)

    def _special(self, writer: Any, arch: str) -> None:
        """What one architecture has beyond the common keys."""
        config = self.config
        if self._experts():
            writer.add_expert_count(self._experts())
            writer.add_expert_used_count(config["num_experts_per_tok"])
        if arch in ("qwen2moe", "qwen3moe"):
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if arch == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
        if arch in _WINDOWED and config.get("sliding_window"):
            writer.add_sliding_window(config["sliding_window"])
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(float(config.get("attn_logit_softcapping") or 50.0))
            writer.add_final_logit_softcapping(float(config.get("final_logit_softcapping") or 30.0))
        if arch == "gemma3":
            rope = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
            local = float(rope.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)
            writer.add_float32("gemma3.rope.freq_base_swa", local)

    # Tokenizer

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except (ValueError, OSError) as error:
            raise SpqrError("E501", str(path), f"not JSON: {error}") from None
        return found if isinstance(found, dict) else {}

    def _vocabulary(self) -> dict[str, Any]:
        """Method of the writer without add_ -> its argument."""
        whole, settings = self._json("tokenizer.json"), self._json("tokenizer_config.json")
        model = whole.get("model") or {}
        if model.get("type") != "BPE":
            kind = model.get("type") or "missing"
            raise SpqrError("E505", "tokenizer.json", f"a tokenizer of kind {kind} is not written to GGUF")
        size = int(self.config["vocab_size"])
        tokens = [f"[PAD{i}]" for i in range(size)]
        types = [_UNUSED] * size
        for token, index in model["vocab"].items():
            if not 0 <= index < size:
                raise SpqrError("E505", "tokenizer.json", f"token {index} is outside the vocabulary of {size}")
            byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            tokens[index] = token
            types[index] = _BYTE if byte else _UNKNOWN if token == model.get("unk_token") else _NORMAL
        for added in whole.get("added_tokens") or []:
            if not 0 <= added["id"] < size:
                raise SpqrError("E505", "tokenizer.json", f"token {added['id']} is outside the vocabulary of {size}")
            tokens[added["id"]] = added["content"]
            if types[added["id"]] != _UNKNOWN:
                types[added["id"]] = _CONTROL if added["special"] else _USER
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        found: dict[str, Any] = {"token_list": tokens, "token_types": types}
        if model.get("byte_fallback"):
            rank: dict[str, int] = {}
            for index, merge in enumerate(merges):
                rank.setdefault(merge.replace(" ", ""), index)
            scores = [
                -float(rank[t]) if t in rank else 0.0 if k != _NORMAL else -float(len(merges))
                for t, k in zip(tokens, types, strict=True)
            ]
            found |= {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_scores": scores}
            found["add_space_prefix"] = (
                (
                    "\u2581" in json.dumps(whole.get("normalizer"), ensure_ascii=False)
                    and ('"Prepend"' in json.dumps(whole.get("normalizer")))
                )
                or '"prepend_scheme": "first"' in json.dumps(whole)
                or '"prepend_scheme": "always"' in json.dumps(whole)
            )
        elif '"ByteLevel"' in json.dumps(whole.get("pre_tokenizer")):
            found |= {"tokenizer_model": "gpt2", "tokenizer_pre": _pre(whole["pre_tokenizer"]), "token_merges": merges}
        else:
            raise SpqrError("E505", "tokenizer.json", "BPE with neither bytes nor byte fallback is not written to GGUF")
        ids = {token: index for index, token in enumerate(tokens)}
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unk"), ("pad", "pad")):
            token = settings.get(f"{key}_token")
            token = token.get("content") if isinstance(token, dict) else token
            index = ids.get(token) if isinstance(token, str) else self.config.get(f"{key}_token_id")
            if isinstance(index, int):
                found[f"{name}_token_id"] = index
        first, last = _wrapped(whole.get("post_processor"))
        found |= {"add_bos_token": first, "add_eos_token": last}
        template = settings.get("chat_template")
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            template = path.read_text("utf-8")
        if isinstance(template, str):
            found["chat_template"] = template
        return found


def _pre(pre: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. E505 where it has none: another one's split would give
    other tokens without a word."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = pre.get("pretokenizers") or [pre]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(steps) == len(byte_level) == 1 and byte_level[0].get("use_regex", True) and not byte_level[0]["add_prefix_space"]:
        return "gpt-2"
    if len(patterns) == 1 and len(steps) == 2 and len(byte_level) == 1 and not byte_level[0].get("use_regex", True):
        for name in (*_PREFERRED, *GGUF_PRE_TOKENIZER_SPLITS):
            if GGUF_PRE_TOKENIZER_SPLITS.get(name) == patterns[0]:
                return name
    raise SpqrError("E505", "tokenizer.json", "it splits text in a way that GGUF has no name for: export --to safetensors")


def _wrapped(processor: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a token is put before and after every text."""
    for step in (processor or {}).get("processors") or [processor or {}]:
        if step.get("type") == "TemplateProcessing":
            single = step.get("single") or []
            return bool(single and "SpecialToken" in single[0]), bool(single and "SpecialToken" in single[-1])
    return False, False

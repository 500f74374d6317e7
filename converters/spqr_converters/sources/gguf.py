"""GGUF: llama.cpp's files, one or split. Every type that gguf-py dequantizes, with names, row order, configuration and
tokenizer brought to the Hugging Face layout."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.matrix import SpqrMatrix

from .base import Entry, Source
from .gguf_file import TYPES, GgufFile, GgufTensor, Strings
from .gguf_names import FAMILIES, Family, Keys, hf_name, llama3_scaling, unpermute

_PIECE = 256  # rows
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "generation_config.json")
_QKV = {"attn_q", "attn_k", "attn_v"}
_BIASES = {
    "llama": {*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"}, "qwen2": _QKV, "qwen2moe": _QKV,
    "qwen3": {*_QKV, "attn_output"}, "qwen3moe": {*_QKV, "attn_output"},
}  # fmt: skip


class GgufSource(Source):
    """A .gguf file, or a folder with one (or with all parts of a split one). F32, F16 and BF16 tensors come as they are
    stored, the others as float32 by gguf-py's arithmetic. Errors: E501; `matrix` raises E510 for what is quantized."""

    name = "GGUF"

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        first = path if path.is_file() else _only(path)
        self.folder = first.parent
        self._single = path.is_file()
        self._parts = {first.name: GgufFile(first)}
        self.metadata = self._parts[first.name].metadata
        self._join(first)
        self.files = sorted(self._parts)
        self._where = first.name
        self._stored: dict[str, tuple[str, GgufTensor]] = {}
        for file, part in self._parts.items():
            for name, tensor in part.tensors.items():
                if name in self._stored:
                    raise SpqrError("E501", file, f"tensor {name} stands in {self._stored[name][0]} too")
                self._stored[name] = (file, tensor)
        self._notes: list[str] = []
        self._companions: Path | None = None
        self.family, self.config = self._configuration()
        self.entries: dict[str, Entry] = {}
        self._kinds: dict[str, tuple[str, str]] = {}  # tensor -> its ggml type and name in the file
        for name in self._stored:
            self._add(name)
        self._kinds_note()

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return bool(_candidates(folder))

    # Structure

    def _bad(self, what: str) -> SpqrError:
        return SpqrError("E501", self._where, what)

    def _join(self, first: Path) -> None:
        count = self.metadata.get("split.count", 1)
        if not isinstance(count, int) or not 1 <= count <= 1000:
            raise SpqrError("E501", first.name, f"split.count is {count}")
        if count == 1:
            return
        match = _SPLIT.fullmatch(first.name)
        if not match or int(match[3]) != count:
            raise SpqrError("E501", first.name, f"a part of {count}, and its name does not say which")
        if int(match[2]) != 1:
            raise SpqrError("E501", first.name, f"part {int(match[2])} of {count}: name the first one")
        for number in range(2, count + 1):
            path = first.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
            if not path.is_file():
                raise SpqrError("E501", first.name, f"part {path.name} is missing")
            self._parts[path.name] = GgufFile(path)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        found = self._stored.get(name)
        return found[1].shape if found else None

    def _add(self, name: str) -> None:
        if name == "rope_freqs.weight":
            return  # became a part of the configuration
        file, tensor = self._stored[name]
        found = hf_name(self.family, name)
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if found is None or (name.endswith(".bias") and part not in _BIASES.get(self._arch, ())):
            raise self._bad(f"tensor {name} has no place in a {self.family.model_type} model")
        hf, stacked = found
        dtype = _PLAIN.get(tensor.type, torch.float32)
        if not stacked:
            shape = (1, *tensor.shape) if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
            if self._heads(name) and shape[0] != self._heads(name) * self.config["head_dim"]:
                raise self._bad(f"{name} has {shape[0]} rows, its heads imply {self._heads(name) * self.config['head_dim']}")
            self._put(hf, name, Entry(file, dtype, shape, tensor.begin, tensor.end))
            return
        experts = self.config.get("num_experts", self.config.get("num_local_experts"))
        if len(tensor.shape) != 3 or tensor.shape[0] != experts:
            raise self._bad(f"{name} has shape {list(tensor.shape)}, expected {experts} experts of two dimensions each")
        size = (tensor.end - tensor.begin) // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            begin = tensor.begin + expert * size
            self._put(hf.format(expert), name, Entry(file, dtype, tensor.shape[1:], begin, begin + size))

    def _put(self, hf: str, name: str, entry: Entry) -> None:
        if hf in self.entries:
            raise self._bad(f"{name} and {self._kinds[hf][1]} are both {hf}")
        self.entries[hf] = entry
        self._kinds[hf] = (self._stored[name][1].type, name)

    def _heads(self, name: str) -> int:
        """Heads whose rows were reordered in this tensor, or 0."""
        part = name.split(".")[2] if self.family.permuted and name.startswith("blk.") else ""
        return {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}.get(part, 0)

    # Configuration

    def _configuration(self) -> tuple[Family, dict[str, Any]]:
        kind = self.metadata.get("general.type", "model")
        if kind != "model":
            raise self._bad(f"general.type is {kind!r}: not the weights of a language model")
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise self._bad("general.architecture is missing")
        keys = Keys(self.metadata, arch, self._where)
        self._arch = "mixtral" if arch == "llama" and keys.has("expert_count") and self._has_experts() else arch
        if self._arch not in FAMILIES:
            raise self._bad(f"architecture {arch!r} is not read; those that are: {', '.join(sorted(FAMILIES))}")
        family = FAMILIES[self._arch]
        embedding = self._shape("token_embd.weight")
        hidden, layers = keys.whole("embedding_length"), keys.whole("block_count", limit=10_000)
        if embedding is None or len(embedding) != 2 or embedding[1] != hidden:
            shown = None if embedding is None else list(embedding)
            raise self._bad(f"token_embd.weight has shape {shown}, expected [vocabulary, {hidden}]")
        blocks = {name.split(".")[1] for name in self._stored if name.startswith("blk.")}
        if blocks != {str(i) for i in range(layers)}:
            raise self._bad(f"{arch}.block_count is {layers}, the file has tensors of {len(blocks)} blocks")
        heads = keys.whole("attention.head_count", limit=65_536)
        rotary = keys.whole("rope.dimension_count", 0) if keys.has("rope.dimension_count") else None
        head_dim = keys.whole("attention.key_length", rotary if family.permuted and rotary else max(1, hidden // heads))
        rows = self._shape("blk.0.attn_q.weight") or self._shape(
            "blk.0.attn_output.weight",
        )
        wanted = heads * head_dim
        if rows is None or wanted not in rows:
            raise self._bad(f"{heads} heads of {head_dim} do not fit blk.0's attention, shape {rows and list(rows)}")
        config: dict[str, Any] = {
            "architectures": [family.architecture], "model_type": family.model_type, "vocab_size": embedding[0],
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys.whole("attention.head_count_kv", heads, limit=65_536), "head_dim": head_dim,
            "max_position_embeddings": keys.whole("context_length"),
            "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._stored, "dtype": self._dtype(),
        }  # fmt: skip
        if keys.has("feed_forward_length"):
            config["intermediate_size"] = keys.whole("feed_forward_length")
        for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{key}_token_id"] = self._token(name)
        config |= self._rope(keys, head_dim, rotary)
        config |= self._special(keys, config)
        return family, config

    def _has_experts(self) -> bool:
        return any(name.startswith("blk.0.ffn_gate") and "inp" in name for name in self._stored)

    def _token(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < 2**31 else None

    def _dtype(self) -> str:
        kinds = {tensor.type for _, tensor in self._stored.values() if len(tensor.shape) > 1}
        if kinds <= {"F32"}:
            return "float32"
        return "float16" if "F16" in kinds and "BF16" not in kinds else "bfloat16"

    def _rope(self, keys: Keys, head_dim: int, rotary: int | None) -> dict[str, Any]:
        theta = keys.real("rope.freq_base", 10000.0)
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        scaling = self.metadata.get(f"{keys.prefix}.rope.scaling.type", "none")
        if scaling in ("linear", "yarn"):
            parameters |= {"rope_type": scaling, "factor": keys.real("rope.scaling.factor", 1.0)}
            if scaling == "yarn":
                parameters["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
        elif scaling != "none" or any(name.startswith("rope_factors_") for name in self._stored):
            raise self._bad(f"rotary scaling {scaling!r} is not read")
        if rotary is not None and rotary != head_dim:
            if self._arch != "phi3" or rotary > head_dim:
                raise self._bad(f"rotary dimension {rotary} of heads of {head_dim} is not read")
            parameters["partial_rotary_factor"] = rotary / head_dim
        if "rope_freqs.weight" in self._stored:
            if self._shape("rope_freqs.weight") != (head_dim // 2,):
                raise self._bad(f"rope_freqs.weight has shape {self._shape('rope_freqs.weight')}, expected [{head_dim // 2}]")
            found = llama3_scaling(self._dequantize("rope_freqs.weight").reshape(-1), theta)
            if found is None:
                raise self._bad("rope_freqs.weight has factors that no rotary scaling of transformers gives")
            parameters |= found
        return {"rope_parameters": parameters}

    def _special(self, keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        """What one architecture needs beyond the common keys."""
        arch, special = self._arch, dict[str, Any]()
        if arch == "mixtral":
            special = {"num_local_experts": keys.whole("expert_count", limit=4096)}
        elif arch in ("qwen2moe", "qwen3moe"):
            special = {
                "num_experts": keys.whole("expert_count", limit=4096),
                "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
                "norm_topk_prob": arch == "qwen3moe", "decoder_sparse_step": 1, "mlp_only_layers": [],
            }  # fmt: skip
            if arch == "qwen2moe":
                special["shared_expert_intermediate_size"] = keys.whole("expert_shared_feed_forward_length")
        if "num_experts" in special or "num_local_experts" in special:
            special["num_experts_per_tok"] = keys.whole("expert_used_count", limit=4096)
        if arch in ("llama", "qwen3", "qwen3moe"):
            special["attention_bias"] = "blk.0.attn_q.bias" in self._stored
        if arch == "llama":
            special["mlp_bias"] = "blk.0.ffn_down.bias" in self._stored
        if arch in ("gemma2", "gemma3"):
            largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]  # the 27B: llama.cpp's own rule
            scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
            special |= {"query_pre_attn_scalar": scalar, "sliding_window": keys.whole("attention.sliding_window")}
        if arch == "gemma2":
            special |= {
                "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
            }  # fmt: skip
        if arch == "gemma3":
            rope = config["rope_parameters"]
            local = keys.real("rope.freq_base_swa", 10000.0)
            special["rope_parameters"] = {
                "full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }  # fmt: skip
        if arch == "phi3" and keys.has("attention.sliding_window"):
            special["sliding_window"] = keys.whole("attention.sliding_window")
        return special

    # Weights

    def _bytes(self, file: str, begin: int, end: int, what: str) -> bytearray:
        data = bytearray(end - begin)
        try:
            with open(self.folder / file, "rb") as stream:
                stream.seek(begin)
                if stream.readinto(data) != len(data):
                    raise SpqrError("E501", file, f"{what} is cut short")
        except OSError as error:
            raise SpqrError("E501", file, f"cannot be read: {error.strerror}") from None
        return data

    def _dequantize(self, name: str, entry: Entry | None = None) -> np.ndarray:
        """A tensor of the file, or an expert of it, in the file's order: float32, float16, or raw uint16 (BF16)."""
        file, tensor = self._stored[name]
        begin, end, shape = (entry.begin, entry.end, entry.shape) if entry else (tensor.begin, tensor.end, tensor.shape)
        data = self._bytes(file, begin, end, name)
        if tensor.type in _PLAIN:
            return np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.type]).reshape(shape)
        gguf = _library()
        _, block, size = TYPES[tensor.type]
        rows = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // block * size)
        found = np.empty((rows.shape[0], shape[-1]), np.float32)
        with np.errstate(all="ignore"):  # what is not finite is found and named later (E502)
            for at in range(0, rows.shape[0], _PIECE):  # gguf-py holds its result twice
                piece = rows[at : at + _PIECE]
                found[at : at + _PIECE] = gguf.dequantize(piece, gguf.GGMLQuantizationType[tensor.type])
        return found.reshape(shape)

    def load(self, name: str) -> torch.Tensor:
        if name not in self.entries:
            raise self._bad(f"tensor {name} is missing")
        kind, stored = self._kinds[name]
        values = self._dequantize(stored, self.entries[name])
        heads = self._heads(stored)
        if heads:
            values = unpermute(values, heads)
        if not values.flags.writeable or not values.flags.c_contiguous:
            values = np.array(values, order="C")
        tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if kind == "BF16" else torch.from_numpy(values)
        if self.family.norm_offset and stored.endswith("norm.weight"):
            tensor -= self.family.norm_offset
        return tensor

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name not in self._kinds or self._kinds[name][0] in _PLAIN:
            return None
        kind = self._kinds[name][0]
        raise SpqrError(
            "E510", name, f"stored as {kind}, whose scales and blocks this format has no place for: convert without --lossless"
        )

    def notes(self) -> list[str]:
        return list(self._notes)

    def _kinds_note(self) -> None:
        counts: dict[str, int] = {}
        for kind, _ in self._kinds.values():
            counts[kind] = counts.get(kind, 0) + 1
        stored = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        self.quantized = not set(counts) <= set(_PLAIN)  # type: ignore[misc]  # a file may hold the original weights
        self._notes.append(f"GGUF of architecture {self._arch}: {stored}; dequantized by gguf-py's arithmetic in float32")
        if self.family.permuted:
            self._notes.append("rows of q and k were put back into Hugging Face's order")
        if not set(counts) & {"F16", "BF16"} and set(counts) != {"F32"}:
            self._notes.append("the file does not say in which dtype the model was trained: config.json says bfloat16")

        if not self._beside():
            self._notes.append(
                "the tokenizer is rebuilt by transformers from the file's metadata; the original model's is the better one"
                if "tokenizer.ggml.tokens" in self.metadata
                else "the file holds no vocabulary: no tokenizer is written"
            )

    # What comes along

    def _beside(self) -> list[Path]:
        """A tokenizer that lies in the source folder, and what belongs to it."""
        if self._single or not (self.folder / "tokenizer.json").is_file():
            return []
        return [self.folder / name for name in _BESIDE if (self.folder / name).is_file()]

    def companions(self) -> Path:
        """A folder that lives as long as this object: config.json, and the tokenizer that transformers builds from the
        metadata. A tokenizer.json beside the file in the source folder takes precedence."""
        if self._companions is None:
            folder = Path(tempfile.mkdtemp(prefix="spqr-gguf-"))
            weakref.finalize(self, shutil.rmtree, folder, True)
            (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", "utf-8")
            for path in self._beside():
                shutil.copyfile(path, folder / path.name)
            if not (folder / "tokenizer.json").is_file():
                self._write_tokenizer(folder)
            self._companions = folder
        return self._companions

    def _write_tokenizer(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

        known, settings = (
            {
                name: _plain(self.metadata[f"tokenizer.{key}"])
                for key, name in GGUF_TOKENIZER_MAPPING[group].items()
                if f"tokenizer.{key}" in self.metadata
            }
            for group in ("tokenizer", "tokenizer_config")
        )
        if "tokens" not in known:
            return
        template = settings.pop("chat_template", None)
        if known.get("tokenizer_type") == "llama":
            settings.setdefault("add_bos_token", True)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = self._token(key)
            if token is not None and token < len(known["tokens"]):
                settings[f"{name}_token"] = known["tokens"][token]
        try:
            backend, extra = convert_gguf_tokenizer(self.metadata["general.architecture"], known)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend, model_max_length=self.config["max_position_embeddings"], **(settings | extra)
            )
        except Exception as error:  # tokenizers raises a bare Exception, and transformers half a dozen kinds
            self._notes.append(f"transformers builds no tokenizer from this file's metadata ({error}): add one by hand")
            return
        if isinstance(template, str):
            tokenizer.chat_template = template
        tokenizer.save_pretrained(str(folder))


def _plain(value: Any) -> Any:
    if isinstance(value, Strings):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray) else value


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise SpqrError("E501", "GGUF", "reading it needs the package gguf: pip install 'spqr-format[convert]'") from None
    return gguf


def _candidates(folder: Path) -> list[Path]:
    """Files of a folder that begin as GGUF files do; of split ones the first part only."""
    found = []
    for path in sorted(folder.glob("*.gguf")):
        match = _SPLIT.fullmatch(path.name)
        if path.is_file() and not (match and int(match[2]) != 1):
            with open(path, "rb") as file:
                if file.read(4) == b"GGUF":
                    found.append(path)
    return found


def _only(folder: Path) -> Path:
    found = _candidates(folder)
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        raise SpqrError("E501", str(folder), f"{len(found)} GGUF files ({names}): give the path of one of them")
    return found[0]

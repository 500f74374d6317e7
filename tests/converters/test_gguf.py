"""The GGUF source: files made by gguf-py's writer or byte by byte here; numpy, gguf-py and transformers as oracles."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from spqr_converters import SolverOptions, convert, datafree
from spqr_converters.export import export
from spqr_converters.sources import open_source
from spqr_converters.sources.gguf import GgufSource
from spqr_converters.sources.gguf_file import TYPES
from spqr_converters.sources.gguf_names import (
    FAMILIES,
    TOP,
    gguf_name,
    hf_name,
    llama3_factors,
    llama3_scaling,
    permute,
    unpermute,
)
from spqr_format.errors import SpqrError
from spqr_format.writer import CheckpointWriter

# A file byte by byte

U8, I32, U32, F32, BOOL, STR, ARR, U64 = 0, 5, 4, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    if kind == STR:
        return string(content)
    return struct.pack({U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}[kind], content)


def pair(key: str | bytes, kind: int, content: Any) -> bytes:
    body = content if isinstance(content, bytes) and kind != STR else value(kind, content)
    return string(key) + struct.pack("<I", kind) + body


def info(name: str | bytes, dims: list[int], kind: int, offset: int, rank: int | None = None) -> bytes:
    shape = b"".join(struct.pack("<Q", d) for d in dims)
    return string(name) + struct.pack("<I", len(dims) if rank is None else rank) + shape + struct.pack("<IQ", kind, offset)


KEYS: dict[str, tuple[int, Any]] = {
    "general.architecture": (STR, "llama"), "llama.block_count": (U32, 1), "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32), "llama.feed_forward_length": (U32, 64), "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.dimension_count": (U32, 8),
}  # fmt: skip
SHAPES: dict[str, list[int]] = {
    "token_embd.weight": [32, 50], "output_norm.weight": [32], "blk.0.attn_norm.weight": [32], "blk.0.ffn_norm.weight": [32],
    "blk.0.attn_q.weight": [32, 32], "blk.0.attn_k.weight": [32, 16], "blk.0.attn_v.weight": [32, 16],
    "blk.0.attn_output.weight": [32, 32], "blk.0.ffn_gate.weight": [32, 64], "blk.0.ffn_up.weight": [32, 64],
    "blk.0.ffn_down.weight": [64, 32],
}  # fmt: skip


def make(
    keys: dict[str, Any] | None = None, extra: bytes = b"", extra_keys: int = 0, infos: dict[str, bytes] | None = None,
    more: list[bytes] | None = None, version: int = 3, magic: bytes = b"GGUF", tensors: int | None = None,
    count: int | None = None, cut: int = 0, without: tuple[str, ...] = (), shapes: dict[str, list[int]] | None = None,
) -> bytes:  # fmt: skip
    """A small llama, with one thing changed. infos: tensor name -> its entry; extra: raw metadata at the end."""
    pairs = {key: pair(key, *content) for key, content in KEYS.items()}
    for key, content in (keys or {}).items():
        pairs[key] = content if isinstance(content, bytes) else pair(key, *content)
    offset, rows = 0, []
    for name, dims in {**SHAPES, **(shapes or {})}.items():
        if name in without:
            continue
        rows.append((infos or {}).get(name) or info(name, dims, 0, offset))
        offset += -(-4 * int(np.prod(dims)) // 32) * 32
    rows += more or []
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", len(rows) if tensors is None else tensors, len(pairs) + extra_keys if count is None else count)
    head += b"".join(pairs.values()) + extra + b"".join(rows)
    head += bytes(-len(head) % 32)
    return (head + np.random.default_rng(0).normal(0, 1, offset // 4).astype("<f4").tobytes())[: -cut or None]


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def bomb() -> bytes:
    """192 bytes that keep gguf-py busy until memory ends: an array of 2^60 numbers."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<I", ARR) + array(U8, 2**60)
    return head + bytes(192 - len(head))


Q = "blk.0.attn_q.weight"
EMB = "token_embd.weight"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "magic"),
    "magic": (lambda: make(magic=b"GGML"), "not a GGUF file"),
    "magic only": (lambda: b"GGUF", "version"),
    "version 0": (lambda: make(version=0), "version 0"),
    "version 1": (lambda: make(version=1), "version 1"),
    "version 4": (lambda: make(version=4), "version 4"),
    "big-endian": (lambda: make(version=3 << 24), "big-endian"),
    "array bomb": (bomb, "2.*elements"),
    "uint64 wrap of an array": (lambda: make(extra=pair("x", ARR, array(U64, 2**61)), extra_keys=1), "elements"),
    "string bomb": (lambda: make(extra=pair("x", ARR, array(STR, 2**40)), extra_keys=1), "strings"),
    "empty strings": (lambda: make(extra=pair("x", ARR, array(STR, 2_900_000)), extra_keys=1), "more than the rest"),
    "a string of 2^64 - 1": (
        lambda: make(extra=string("x") + struct.pack("<IQ", STR, 2**64 - 1), extra_keys=1), "length|bytes"
    ),
    "a string past the end within an array": (
        lambda: make(extra=pair("x", ARR, array(STR, 2, string("a") + struct.pack("<Q", 2**63))), extra_keys=1),
        "bytes|string",
    ),
    "nested arrays": (lambda: make(extra=pair("x", ARR, array(ARR, 1, array(U8, 1, b"a"))), extra_keys=1), "array of arrays"),
    "deeply nested arrays": (
        lambda: make(extra=pair("x", ARR, b"".join(array(ARR, 1) for _ in range(20000))), extra_keys=1), "array of arrays"
    ),
    "unknown value type": (lambda: make(extra=pair("x", 13, b"1234"), extra_keys=1), "type 13"),
    "unknown element type": (lambda: make(extra=pair("x", ARR, array(99, 1, b"1")), extra_keys=1), "type 99"),
    "a truth value of 7": (lambda: make(extra=pair("x", BOOL, 7), extra_keys=1), "truth"),
    "an empty key": (lambda: make(extra=pair("", U8, 1), extra_keys=1), "key"),
    "a key of 2^50 bytes": (lambda: make(extra=struct.pack("<Q", 2**50), extra_keys=1), "key"),
    "a key that is no UTF-8": (lambda: make(extra=pair(b"\xff\xfe", U8, 1), extra_keys=1), "UTF-8"),
    "duplicate keys": (lambda: make(extra=pair("llama.block_count", U32, 2), extra_keys=1), "twice"),
    "2^64 - 1 keys": (lambda: make(count=2**64 - 1), "keys"),
    "one key too many": (lambda: make(count=len(KEYS) + 1), "bytes"),
    "one key too few": (lambda: make(count=len(KEYS) - 1), "type 8192"),
    "2^64 - 1 tensors": (lambda: make(tensors=2**64 - 1), "tensors"),
    "one tensor too many": (lambda: make(tensors=len(SHAPES) + 1), "0 bytes"),
    "no tensors": (lambda: make(tensors=0), "token_embd"),
    "alignment 0": (lambda: make({"general.alignment": (U32, 0)}), "alignment 0"),
    "alignment 3": (lambda: make({"general.alignment": (U32, 3)}), "alignment 3"),
    "alignment 2^31": (lambda: make({"general.alignment": (U32, 2**31)}), "alignment"),
    "alignment as a string": (lambda: make({"general.alignment": (STR, "32")}), "alignment"),
    "a million dimensions": (lambda: make(infos={Q: info(Q, [32, 32], 0, 0, rank=10**6)}), "1000000 dimensions"),
    "2^32 - 1 dimensions": (lambda: make(infos={Q: info(Q, [32, 32], 0, 0, rank=2**32 - 1)}), "dimensions"),
    "no dimensions": (lambda: make(infos={Q: info(Q, [], 0, 0)}), "0 dimensions"),
    "five dimensions": (lambda: make(infos={Q: info(Q, [32, 1, 1, 1, 32], 0, 0)}), "5 dimensions"),
    "a dimension of 0": (lambda: make(infos={Q: info(Q, [32, 0], 0, 0)}), "no weights"),
    "dimensions that wrap to 0": (lambda: make(infos={Q: info(Q, [2**32, 2**32], 0, 0)}), "weights"),
    "dimensions that wrap to 32": (lambda: make(infos={Q: info(Q, [2**63 + 16, 2], 0, 0)}), "weights"),
    "an exabyte tensor": (lambda: make(infos={Q: info(Q, [2**30, 2**30], 0, 0)}), "weights"),
    "a tensor larger than the file": (lambda: make(infos={EMB: info(EMB, [32, 10**6], 0, 0)}), "inside|ends at"),
    "an unknown tensor type": (lambda: make(infos={Q: info(Q, [32, 32], 77, 0)}), "type 77"),
    "a removed tensor type": (lambda: make(infos={Q: info(Q, [32, 32], 4, 0)}), "type 4"),
    "an integer tensor": (lambda: make(infos={Q: info(Q, [32, 32], 26, 0)}), "type 26"),
    "half a block": (lambda: make(infos={Q: info(Q, [32, 32], 12, 6592)}), "multiple of a Q4_K block"),
    "an offset out of line": (lambda: make(infos={Q: info(Q, [32, 32], 0, 33)}), "multiple of the alignment"),
    "an offset past the end": (lambda: make(infos={Q: info(Q, [32, 32], 0, 2**40)}), "ends at"),
    "an offset that wraps": (lambda: make(infos={Q: info(Q, [32, 32], 0, 2**64 - 32)}), "ends at"),
    "overlapping tensors": (lambda: make(infos={Q: info(Q, [32, 32], 0, 0)}), "inside"),
    "duplicate tensors": (lambda: make(more=[info(Q, [32, 1], 0, 2**10 * 64)], cut=0), "twice"),
    "duplicate tensor names in the file": (lambda: make(infos={"blk.0.attn_k.weight": info(Q, [32, 16], 0, 10944)}), "twice"),
    "a name of 300 bytes": (lambda: make(infos={Q: info("x" * 300, [32, 32], 0, 0)}), "300 bytes"),
    "a name that is no UTF-8": (lambda: make(infos={Q: info(b"\xff", [32, 32], 0, 0)}), "UTF-8"),
    "a cut file": (lambda: make(cut=5000), "ends at"),
    "cut in the header": (lambda: make()[:400], "bytes"),
    "no architecture": (lambda: make({"general.architecture": pair("other", U8, 1)}), "architecture"),
    "architecture as a number": (lambda: make({"general.architecture": (U32, 5)}), "architecture"),
    "an unknown architecture": (lambda: make({"general.architecture": (STR, "rwkv99")}), "rwkv99"),
    "an adapter": (lambda: make({"general.type": (STR, "adapter")}), "adapter"),
    "10^9 blocks": (lambda: make({"llama.block_count": (U32, 10**9)}), "block_count"),
    "more blocks than tensors": (lambda: make({"llama.block_count": (U32, 9000)}), "block"),
    "blocks as an array": (lambda: make({"llama.block_count": (ARR, array(U32, 1, b"\1\0\0\0"))}), "block_count"),
    "negative heads": (lambda: make({"llama.attention.head_count": (I32, -4)}), "head_count"),
    "heads that do not fit": (lambda: make({"llama.attention.head_count": (U32, 3)}), "heads"),
    "a head of 2^30": (lambda: make({"llama.rope.dimension_count": (U32, 2**30)}), "heads"),
    "an epsilon of nan": (lambda: make({"llama.attention.layer_norm_rms_epsilon": (F32, float("nan"))}), "epsilon"),
    "a hidden size of another": (lambda: make({"llama.embedding_length": (U32, 64)}), "token_embd"),
    "no embedding": (lambda: make(without=(EMB,)), "token_embd"),
    "an unknown tensor": (lambda: make(shapes={"blk.0.surprise.weight": [32]}), "surprise"),
    "a block number of 10^5": (lambda: make(shapes={"blk.99999.attn_q.weight": [32]}), "block"),
    "10^9 experts": (
        lambda: make(
            {"llama.expert_count": (U32, 10**9), "llama.expert_used_count": (U32, 2)},
            shapes={"blk.0.ffn_gate_inp.weight": [32, 8]},
        ),
        "expert_count",
    ),
    "part 2 of a split file": (lambda: make({"split.count": (U32, 3)}), "part"),
    "a split of 10^9": (lambda: make({"split.count": (U32, 10**9)}), "split"),
    "unknown rope scaling": (lambda: make({"llama.rope.scaling.type": (STR, "magic")}), "magic"),
}  # fmt: skip


def test_the_small_file_itself_is_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(make())
    source = open_source(tmp_path)
    assert isinstance(source, GgufSource)
    assert len(source.entries) == len(SHAPES)
    assert source.load("model.layers.0.self_attn.k_proj.weight").shape == (16, 32)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_quickly(case, tmp_path, bounded):
    content, match = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content())
    assert len(HOSTILE) >= 40
    with bounded(), pytest.raises(SpqrError, match=match) as caught:
        convert(path, tmp_path / "out")
    assert caught.value.code == "E501"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("body", ["strings", "numbers"])
def test_a_large_header_stays_within_time_and_memory(body, tmp_path, bounded):
    """A file that really has the bytes that its counts promise."""
    path = tmp_path / "bad.gguf"
    content = array(STR, 2_999_999, bytes(8 * 2_999_999)) if body == "strings" else array(U8, 60_000_000, bytes(60_000_000))
    path.write_bytes(make(extra=pair("x", ARR, content), extra_keys=1, without=(EMB,)))
    del content
    with bounded(), pytest.raises(SpqrError, match="token_embd"):
        open_source(path)


def test_the_bound_itself_is_measured(bounded):
    """A block that takes more is seen, though the process held as much before."""
    np.ones(25_000_000)
    with bounded():
        np.ones(12_000_000)
    with pytest.raises(AssertionError, match="MB"), bounded():
        np.ones(25_000_000)
    with pytest.raises(AssertionError, match=" s"), bounded(seconds=0.01):
        sum(range(3_000_000))


def test_every_byte_of_the_header_may_be_anything(tmp_path):
    """Mutated headers are read, or refused with E501; nothing else comes out, and nothing takes long."""
    good = make()
    end = good.index(b"blk.0.ffn_down.weight") + 60
    rng = np.random.default_rng(1)
    path = tmp_path / "m.gguf"
    for _ in range(600):
        raw = bytearray(good)
        for position in rng.integers(0, end, rng.integers(1, 4)):
            raw[position] = rng.integers(0, 256)
        path.write_bytes(raw)
        started = time.process_time()
        try:
            source = open_source(path)
            for name in source.entries:
                source.load(name)
        except SpqrError as error:
            assert error.code == "E501"  # noqa: PT017
        assert time.process_time() - started < 1


# Types


def test_types_are_those_that_gguf_py_dequantizes():
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name in ("F32", "F16"):
            readable = True
        else:
            try:
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
                readable = True
            except NotImplementedError:
                readable = False
        assert (kind.name in TYPES) == readable, kind.name
        if readable:
            assert TYPES[kind.name] == (int(kind), block, size)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_comes_as_gguf_py_dequantizes_it(kind, tmp_path):
    number, _block, size = TYPES[kind]
    rng = np.random.default_rng(number)
    width = 512  # two pieces of rows
    row = width // TYPES[kind][1] * size
    raw = rng.integers(0, 256, (width, row), dtype=np.uint8)
    if kind in ("F32", "F16", "BF16"):
        raw = gguf.quantize(rng.normal(0, 1, (width, width)).astype(np.float32), gguf.GGMLQuantizationType[kind])
        raw = raw.view(np.uint8).reshape(width, -1)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "qwen3")
    for key, content in {"block_count": 1, "context_length": 64, "embedding_length": width}.items():
        writer.add_uint32(f"qwen3.{key}", content)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(64)
    typed = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("token_embd.weight", raw, raw_dtype=typed)
    writer.add_tensor("blk.0.attn_q.weight", raw[::-1].copy(), raw_dtype=typed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "t.gguf")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "t.gguf").tensors}
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.0.self_attn.q_proj", "blk.0.attn_q")):
        found = source.load(f"{ours}.weight")
        assert source.entries[f"{ours}.weight"].dtype == found.dtype
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(reader[f"{theirs}.weight"].data, typed)
        np.testing.assert_array_equal(found.float().numpy(), expected.astype(np.float32))
    assert source.quantized == (kind not in ("F32", "F16", "BF16"))
    if not source.quantized:
        assert source.matrix("model.layers.0.self_attn.q_proj.weight") is None
    else:
        with pytest.raises(SpqrError, match="without --lossless") as caught:
            source.matrix("model.layers.0.self_attn.q_proj.weight")
        assert caught.value.code == "E510"


# Names


@pytest.mark.parametrize("arch", FAMILIES)
def test_names_are_gguf_pys(arch):
    family = FAMILIES[arch]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(numbers["llama" if arch == "mixtral" else arch], 3)
    for ours, hf in TOP.items():
        assert theirs.get_name(hf) in ((ours, None) if hf == "lm_head" else (ours,))  # gemma's is always tied
    for part, hf in family.block.items():
        assert theirs.get_name(f"model.layers.2.{hf}") == f"blk.2.{part}", hf
        assert hf_name(family, f"blk.2.{part}.weight") == (f"model.layers.2.{hf}.weight", False)
        assert gguf_name(family, f"model.layers.2.{hf}.weight") == f"blk.2.{part}.weight"
    for part, hf in family.experts.items():
        stacked = hf.replace("{}.", "") if arch != "mixtral" else hf.format(0).replace("experts.0.", "experts.")
        assert theirs.get_name(f"model.layers.2.{stacked}") == f"blk.2.{part}", stacked
        assert hf_name(family, f"blk.2.{part}.weight") == (f"model.layers.2.{hf}.weight", True)


def test_rows_of_q_and_k_are_llama_cpps():
    """The reshaping as llama.cpp's converter writes it down (LlamaModel.permute)."""
    weight = np.arange(24 * 5).reshape(24, 5)
    theirs = weight.reshape(3, 2, 24 // 3 // 2, 5).swapaxes(1, 2).reshape(24, 5)
    np.testing.assert_array_equal(permute(weight, 3), theirs)
    np.testing.assert_array_equal(unpermute(theirs, 3), weight)


def test_llama3_rotary_scaling_survives():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(64, 500000.0, scaling)
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain.numpy() / factors, theirs.numpy(), rtol=1e-5)
    assert llama3_scaling(factors, 500000.0) == {"rope_type": "llama3", **scaling}
    assert llama3_scaling(factors * 1.1, 500000.0) is None


# Whole models. The files are made by gguf-py's name map and writer, with the value edits of llama.cpp's converter.

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama with biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 32}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": None}),
}  # fmt: skip


def write_gguf(path: Path, arch: str, config: Any, state: dict[str, torch.Tensor]) -> None:
    """A file as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, arch)
    heads, kv, rope = config.num_attention_heads, config.num_key_value_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in state.items():
        array, (stem, leaf) = tensor.float().numpy(), name.rsplit(".", 1)
        if ".experts." in name:
            before, after = stem.split(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(array)
            continue
        if arch.startswith("gemma") and "norm" in name:
            array = array + 1
        if arch == "llama" and ".q_proj." in name:
            array = array.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if arch == "llama" and ".k_proj." in name:
            array = array.reshape(kv, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        stored = names.get_name(stem)
        assert stored, name
        writer.add_tensor(f"{stored}.{leaf}", array.squeeze(0) if "shared_expert_gate" in name else array)
    for stem, arrays in stacks.items():
        writer.add_tensor(f"{names.get_name(stem)}.weight", np.stack(arrays))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", MODELS)
def test_whole_models(case, tmp_path):
    """Tensors equal the ones that went in; the model of our config.json gives the same logits."""
    import transformers
    from safetensors.torch import load_file, save_file

    kind, options = MODELS[case]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    settings = {**COMMON, **options}
    if kind == "Gemma3ForCausalLM":
        model_class.config_class = transformers.Gemma3TextConfig
    model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randint(-8, 8, parameter.shape) / 16)  # norms that + 1 - 1 does not round
            elif "experts" in name or "gate" in name:
                parameter.normal_(0, 0.3)
    model.eval().save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    arch = {"mistral": "llama", "mixtral": "llama"}.get(case.split()[0], case.split()[0])
    write_gguf(tmp_path / "m.gguf", arch, model.config, state)

    source = open_source(tmp_path / "m.gguf")
    assert source.entries.keys() == state.keys()
    for name, tensor in state.items():
        assert source.entries[name].shape == tuple(tensor.shape), name
        assert torch.equal(source.load(name), tensor), name
    again = tmp_path / "again"
    again.mkdir()
    save_file({name: source.load(name).contiguous() for name in source.entries}, again / "model.safetensors", {"format": "pt"})
    (again / "config.json").write_text(json.dumps(source.config))
    ids = torch.tensor([list(range(1, 40))])
    found = transformers.AutoModelForCausalLM.from_pretrained(again).eval()
    assert type(found).__name__ == (kind if case != "mistral" else "LlamaForCausalLM")
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_split_files_are_joined(tmp_path):
    names = list(SHAPES)
    for number, part in enumerate((names[:4], names[4:]), 1):
        keys = {"split.count": (U32, 2), "split.no": (U32, number - 1)}
        raw = make(keys, without=tuple(set(names) - set(part)))
        (tmp_path / f"a-{number:05d}-of-00002.gguf").write_bytes(raw)
    source = open_source(tmp_path)
    assert len(source.entries) == len(SHAPES)
    assert len(source.fingerprint()) == 2
    assert source.load("model.layers.0.mlp.down_proj.weight").shape == (32, 64)
    (tmp_path / "a-00002-of-00002.gguf").unlink()
    with pytest.raises(SpqrError, match="missing"):
        open_source(tmp_path)


def test_several_files_in_a_folder_are_not_guessed_between(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(make())
    with pytest.raises(SpqrError, match="path of one"):
        open_source(tmp_path)
    assert open_source(tmp_path / "b.gguf").files == ["b.gguf"]


def test_companions_go_away_with_the_source(tmp_path):
    (tmp_path / "a.gguf").write_bytes(make())
    source = open_source(tmp_path)
    folder = source.companions()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert any("no vocabulary" in note for note in source.notes())
    del source
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["gguf_f16", "gguf_q4_k_m"])
def test_files_of_llama_cpp_itself(kind, shared):
    """llama.cpp's converter and quantizer made them; transformers dequantized them."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder = shared / "checkpoints" / kind
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    source = open_source(folder)
    expected = load_file(folder / "expected.safetensors")
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(source.load(name).float(), tensor.float()), name
    figures = json.loads((folder / "expected.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(source.companions())
    text = tokenizer.decode(figures["hf_tokenizer_ids"], skip_special_tokens=True)
    assert tokenizer(text).input_ids == figures["hf_tokenizer_ids"]
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "eos_token_id"):
        assert source.config[key] == figures["config"][key], key


def test_a_gguf_converts_as_its_dense_original_does(tmp_path):
    """The same weights in both forms become the same bytes, and what comes along is there."""
    import transformers
    from safetensors.torch import load_file

    from spqr_converters import convert

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", "llama", config, state)
    convert(tmp_path / "m.gguf", tmp_path / "ours", device="cpu")
    convert(tmp_path / "hf", tmp_path / "theirs", device="cpu")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    section = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert list(section["provenance"]["source_sha256"]) == ["m.gguf"]


# The way out


@pytest.mark.parametrize("case", MODELS)
def test_an_export_is_the_file_that_llama_cpps_converter_would_write(case, tmp_path, tiny_llama):
    """Tensor for tensor as gguf-py reads them, against a file that is made by gguf-py's own map of names; and our source
    reads the same model back."""
    kind, extra = MODELS[case]
    config = getattr(transformers, kind.replace("ForCausalLM", "Config" if "Gemma3" not in kind else "TextConfig"))(
        **{**COMMON, **extra, "vocab_size": 4096}
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    stored = json.loads((tmp_path / "dense" / "config.json").read_text())
    with CheckpointWriter(tmp_path / "spqr", config=stored) as writer:
        for name, tensor in state.items():
            if ".experts." in name or name.endswith("_proj.weight"):
                matrix = datafree.quantize(tensor, SolverOptions(rounds=1, sweeps=0))
                writer.add_matrix(name.removesuffix(".weight"), matrix)
                state[name] = torch.from_numpy(matrix.dequantize())
            else:
                writer.add_dense(name, tensor)
        writer.finish()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / "spqr")
    export(tmp_path / "spqr", tmp_path / "out", to="gguf", dtype="float32")
    found = gguf.GGUFReader(tmp_path / "out" / "model-F32.gguf")
    arch = found.fields["general.architecture"].contents()
    write_gguf(tmp_path / "expected.gguf", arch, config, state)
    expected = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "expected.gguf").tensors}
    tensors = {tensor.name: tensor.data for tensor in found.tensors}
    assert tensors.keys() == expected.keys()
    for name, data in expected.items():
        np.testing.assert_array_equal(tensors[name], data, err_msg=name)
    wanted = gguf.GGUFReader(tmp_path / "expected.gguf").fields
    for key, entry in wanted.items():
        if key.startswith(f"{arch}."):
            assert found.fields[key].contents() == entry.contents(), key
    source = open_source(tmp_path / "out")
    assert source.config["model_type"] == ("llama" if case == "mistral" else config.model_type)  # GGUF has one for both
    assert source.entries.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(source.load(name).float(), tensor.float(), rtol=0, atol=1e-7 if "norm" in name else 0)
    assert AutoTokenizer.from_pretrained(source.companions())("The old man").input_ids


def test_a_model_that_llama_cpp_computes_otherwise_is_not_exported(tmp_path, tiny_llama):
    config = transformers.Qwen3MoeConfig(**{**COMMON, **MOE, "norm_topk_prob": False, "vocab_size": 4096})
    stored = {**config.to_dict(), "model_type": "qwen3_moe"}
    with CheckpointWriter(tmp_path / "spqr", config=stored) as writer:
        writer.add_dense("model.norm.weight", torch.ones(32))
        writer.finish()
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "spqr")
    with pytest.raises(SpqrError, match=r"SPQR-E505 export: norm_topk_prob = False"):
        export(tmp_path / "spqr", tmp_path / "out", to="gguf", dtype="float32")
    assert not (tmp_path / "out").exists()

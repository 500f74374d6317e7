"""A broken checkpoint is refused with its code, and no kernel runs on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spqr_kernels.dispatch
import spqr_loaders
from spqr_format.errors import SpqrError
from spqr_format.validate import validate

from .conftest import MODULE, How, Quantized, join, poke, position_out_of_range, shard_of, split, write_model


def truncated(folder: Path) -> None:
    path = shard_of(folder, f"{MODULE}.weight")
    path.write_bytes(path.read_bytes()[:-1000])


def flipped_header_byte(folder: Path) -> None:
    path = shard_of(folder, f"{MODULE}.weight")
    raw = bytearray(path.read_bytes())
    raw[8] ^= 1
    path.write_bytes(raw)


def flipped_digit_of_a_shape(folder: Path) -> None:
    path = shard_of(folder, f"{MODULE}.weight")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"shape":[16,384]', b'"shape":[16,385]', 1))


def falling_pointer(folder: Path) -> None:
    poke(folder, "outlier_ptr", "<i4", lambda x: x.__setitem__(slice(10, 12), (150, 5)))


def nan_statistic(folder: Path) -> None:
    poke(folder, "tile_stats", "<f2", lambda x: x.__setitem__(7, np.nan))


def without(folder: Path, name: str) -> None:
    """Removes a tensor by writing its shard again."""
    path = shard_of(folder, name)
    header, data = split(path)
    begin, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    metadata = header["__metadata__"]
    hashes = json.loads(metadata.get("spqr_sha256", "{}"))
    if hashes.pop(name, None):
        metadata["spqr_sha256"] = json.dumps(hashes)
    join(path, header, data[:begin] + data[end:])


def missing_tensor(folder: Path) -> None:
    name = f"{MODULE}.outliers"
    without(folder, name)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))


def edit_config(folder: Path, **section: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= section
    path.write_text(json.dumps(config))


def edit_metadata(folder: Path, **metadata: str) -> None:
    for path in folder.glob("*.safetensors"):
        header, data = split(path)
        header["__metadata__"] |= metadata
        join(path, header, data)


def unknown_version_in_config(folder: Path) -> None:
    edit_config(folder, format_version="2.0")


def unknown_version_in_shards(folder: Path) -> None:
    edit_metadata(folder, spqr_version="2.0")


def unknown_feature_in_config(folder: Path) -> None:
    edit_config(folder, features=["bilevel", "telepathy"])


def unknown_feature_in_shards(folder: Path) -> None:
    edit_metadata(folder, spqr_features='["telepathy"]')


def unknown_key_in_config(folder: Path) -> None:
    edit_config(folder, secret=1)


def config_and_shards_disagree(folder: Path) -> None:
    edit_config(folder, features=["bilevel"])


BROKEN = {
    truncated: "E001",
    flipped_header_byte: "E003",
    flipped_digit_of_a_shape: "E004",
    position_out_of_range: "E304",
    falling_pointer: "E302",
    nan_statistic: "E201",
    missing_tensor: "E107",
    unknown_version_in_config: "E102",
    unknown_version_in_shards: "E102",
    unknown_feature_in_config: "E103",
    unknown_feature_in_shards: "E103",
    unknown_key_in_config: "E111",
    config_and_shards_disagree: "E105",
}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a kernel is asked for anything."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel ran on a broken checkpoint")

    for name in ("linear", "dequantize"):
        monkeypatch.setattr(spqr_kernels.dispatch, name, refuse)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, spqr_loaders.from_pretrained], ids=["plain", "ours"])
@pytest.mark.parametrize("breaking", BROKEN, ids=lambda function: function.__name__)
@pytest.mark.usefixtures("no_kernels")
def test_broken_checkpoint_is_refused_with_its_code(copied: Path, breaking: Callable[[Path], None], load: Any) -> None:
    breaking(copied)
    with pytest.raises(SpqrError) as error:
        load(copied)
    assert error.value.code == BROKEN[breaking]
    assert [finding.code for finding in validate(copied).findings] == [BROKEN[breaking]]


@pytest.mark.usefixtures("no_kernels")
def test_broken_payload_is_refused_where_it_is_offloaded_or_dequantized(copied: Path, tmp_path: Path) -> None:
    position_out_of_range(copied)
    with pytest.raises(SpqrError, match="E304"):
        AutoModelForCausalLM.from_pretrained(copied, quantization_config=spqr_loaders.SpqrFormatConfig(dequantize=True))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(SpqrError, match="E304"):
        AutoModelForCausalLM.from_pretrained(
            copied, device_map=device_map | {"model.layers": "disk"}, offload_folder=tmp_path / "offload"
        )


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"])
def test_missing_dense_tensor(copied: Path, name: str) -> None:
    without(copied, name)
    with pytest.raises(SpqrError, match=r"E508.*random") as error:
        AutoModelForCausalLM.from_pretrained(copied)
    assert error.value.where == name


@pytest.mark.parametrize(
    ("leaf", "code"), [(f"{MODULE}.stat_codes", "E107"), ("model.layers.1.input_layernorm.weight", "E508")]
)
def test_tensor_that_is_renamed_away(tiny: Quantized, leaf: str, code: str) -> None:
    """A key_mapping is applied behind our back: what it loses is found after loading."""
    with pytest.raises(SpqrError, match=f"{code} {leaf}.*random"):
        AutoModelForCausalLM.from_pretrained(tiny.folder, key_mapping={leaf: leaf.replace("layers.1", "layers.2")})


def test_dense_tensor_of_another_shape(copied: Path) -> None:
    path = shard_of(copied, "model.norm.weight")
    header, data = split(path)
    header["model.norm.weight"]["shape"] = [1, 256]
    join(path, header, data)
    with pytest.raises(SpqrError, match=r"E508 model.norm.weight.*\[1, 256\].*\[256\]"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_bias_that_is_not_finite(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True))
    quantized = write_model(tmp_path, model, How())
    name = "model.layers.0.self_attn.q_proj.bias"
    path = quantized.folder / "model.safetensors"
    header, data = split(path)
    begin, end = header[name]["data_offsets"]
    path.write_bytes(path.read_bytes()[: -len(data)] + data[:begin] + b"\xff" * (end - begin) + data[end:])
    with pytest.raises(SpqrError, match=f"E204 {name}"):
        AutoModelForCausalLM.from_pretrained(quantized.folder)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("intermediate_size", 704, "256 x 688.*256 x 704"),
        ("num_hidden_layers", 3, "no linear layer model.layers.3"),
    ],
)
def test_config_of_another_model(copied: Path, key: str, value: int, what: str) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SpqrError, match=f"E508.*{what}"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(("stored", "asked"), [(True, False), (False, True)])
def test_biases_that_only_one_side_has(tmp_path: Path, stored: bool, asked: bool) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=stored))
    quantized = write_model(tmp_path, model, How())
    path = quantized.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": asked}))
    with pytest.raises(SpqrError, match=r"E508 model\.layers\.0\.self_attn\.\w_proj\.bias"):
        AutoModelForCausalLM.from_pretrained(quantized.folder)


def test_a_state_dict_has_no_headers(tiny: Quantized) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny.folder).config
    with pytest.raises(SpqrError, match="E508"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"a": torch.zeros(1)})

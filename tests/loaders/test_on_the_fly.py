"""A dense model is quantized while it loads, as the converter alone would do it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spqr_converters.datafree import quantize
from spqr_converters.options import SolverOptions
from spqr_format.errors import SpqrError
from spqr_format.validate import validate
from spqr_loaders import SpqrFormatConfig

from .conftest import layers

IDS = torch.tensor([[1, 2, 3, 60]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param, attention_bias=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    "asked",
    [{}, {"weight_bits": 4, "group_size": 16, "statistics": "direct"}, {"outlier_share": 0.01}],
    ids=["default", "direct", "outliers"],
)
def test_equals_the_converter(dense: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=SpqrFormatConfig(**asked))
    weights = state(dense)
    assert len(layers(model)) == 14
    assert type(model.lm_head) is torch.nn.Linear
    for name, layer in layers(model).items():
        expected = quantize(weights[f"{name}.weight"], SolverOptions(**asked))
        assert layer.layout == expected.layout
        for leaf, array in expected.pack().items():
            assert torch.equal(getattr(layer, leaf), torch.from_numpy(array)), (name, leaf)
        assert torch.equal(layer.dequantize().weight, torch.from_numpy(expected.dequantize()))
    logits = model(IDS).logits
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    report = validate(tmp_path, deep=True)
    assert report.ok, report.findings
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["modules_to_not_convert"] == ["lm_head"]
    assert section["provenance"]["source"] == str(dense)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize(
    ("dtype", "device_map"), [(torch.float16, None), (torch.bfloat16, "auto"), (torch.bfloat16, {"": "cpu"})]
)
def test_half_precision_and_device_maps(dense: Path, dtype: torch.dtype, device_map: Any) -> None:
    """Before 5.23 transformers casts to the placeholder's dtype first: were it an integer, all codes would be 0."""
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=dtype, device_map=device_map, quantization_config=SpqrFormatConfig()
    )
    weights = state(dense)
    for name, layer in layers(model).items():
        expected = quantize(weights[f"{name}.weight"].to(dtype), SolverOptions())
        assert torch.equal(layer.weight, torch.from_numpy(expected.pack()["weight"]))
    assert model(IDS).logits.dtype == dtype


def test_modules_to_not_convert(dense: Path, tmp_path: Path) -> None:
    config = SpqrFormatConfig(modules_to_not_convert=["lm_head", "q_proj", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    names = ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.rpartition(".")[2] for name in layers(model)} == set(names)
    assert all(name.startswith("model.layers.0.") for name in layers(model))
    model.save_pretrained(tmp_path)
    assert validate(tmp_path).ok
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in section["modules_to_not_convert"]


def test_nothing_left_to_quantize(dense: Path) -> None:
    with pytest.raises(SpqrError, match="E504"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=SpqrFormatConfig(modules_to_not_convert=[".*"]))


def test_weights_on_disk_cannot_be_quantized(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(SpqrError, match="E505 device_map"):
        AutoModelForCausalLM.from_pretrained(
            dense, device_map={"": "disk"}, offload_folder=tmp_path, quantization_config=SpqrFormatConfig()
        )


def test_a_weight_that_is_not_finite_is_named(dense: Path, tmp_path: Path) -> None:
    """transformers collects what an operation raises and shows none of its codes."""
    weights = state(dense)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].clone()
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    with pytest.raises(SpqrError, match=r"E502 .*model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SpqrFormatConfig())


def test_missing_weight(dense: Path, tmp_path: Path) -> None:
    weights = state(dense)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    with pytest.raises(SpqrError, match=r"E508 model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SpqrFormatConfig())


def test_without_the_converter(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SpqrError, match=r"E505.*spqr_converters"):
        LlamaForCausalLM.from_pretrained(dense, quantization_config=SpqrFormatConfig())

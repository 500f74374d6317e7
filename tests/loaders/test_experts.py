"""Mixture-of-experts models: each expert's matrices keep their hub names, and outliers differ from expert to expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_loaders import SpqrFormatConfig
from spqr_loaders.experts import SplitExperts

from .conftest import How, Quantized, layers, write

IDS = torch.tensor([[1, 2, 3, 60, 4, 9, 33, 12]])
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))


def qwen() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, mlp_only_layers=[], **SIZES))


@pytest.fixture(scope="module", params=[mixtral, qwen], ids=["mixtral", "qwen"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    model = request.param()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def quantized(dense: Path, folder: Path, left: str = "nothing") -> tuple[Quantized, Any]:
    """The checkpoint with every matrix quantized whose name does not hold `left`, and the dense model it stands for."""
    state = load_file(dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    modules = {
        name.removesuffix(".weight"): How(share=0.002 * (i % 5))
        for i, (name, tensor) in enumerate(state.items())
        if tensor.ndim == 2 and ("attn" in name or "experts." in name) and left not in name
    }
    result = write(folder / "spqr", config, state, modules)
    # The oracle goes through transformers' own conversion from single experts to fused ones.
    from safetensors.torch import save_file

    (folder / "oracle").mkdir()
    save_file(result.dense, folder / "oracle" / "model.safetensors", {"format": "pt"})
    (folder / "oracle" / "config.json").write_text(json.dumps(config))
    oracle = AutoModelForCausalLM.from_pretrained(folder / "oracle", dtype=torch.float32)
    return result, oracle


@pytest.mark.parametrize("left", ["nothing", "experts.1.", "layers.0."])
def test_quantized_experts(dense: Path, tmp_path: Path, left: str) -> None:
    stored, oracle = quantized(dense, tmp_path, left)
    model = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32)
    assert len(layers(model)) == len(stored.matrices)
    torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    report = validate(tmp_path / "again", deep=True)
    assert report.ok, report.findings
    with Checkpoint.open(tmp_path / "again") as again, Checkpoint.open(stored.folder) as first:
        assert again.modules == first.modules
        assert again.place.keys() == first.place.keys()
        assert all((again.read(name) == first.read(name)).all() for name in first.place)


def test_dequantized_experts_are_fused_again(dense: Path, tmp_path: Path) -> None:
    stored, oracle = quantized(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32)
    model.dequantize()
    assert not any(isinstance(module, SplitExperts) for module in model.modules())
    assert torch.equal(model(IDS).logits, oracle(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.dense.keys()
    assert all(torch.equal(again[name], stored.dense[name]) for name in again)
    runtime = SpqrFormatConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32, quantization_config=runtime)
    assert torch.equal(loaded(IDS).logits, oracle(IDS).logits)


def test_experts_are_quantized_while_loading(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=SpqrFormatConfig(weight_bits=4))
    assert len(layers(model)) == 2 * (4 + 4 * 3)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    report = validate(tmp_path, deep=True)
    assert report.ok, report.findings
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, logits)
    model.dequantize()
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_experts_of_another_kind_stay_dense(tmp_path: Path) -> None:
    """GPT-OSS stores its experts fused, transposed and with biases."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(num_local_experts=4, **SIZES))
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SpqrFormatConfig())
    assert len(layers(model)) == 2 * 4
    assert model(IDS).logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert validate(tmp_path / "again").ok

"""Saving, dequantizing and compute that is not inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_loaders import SpqrFormatConfig

from .conftest import IDS, TINY, Quantized, dense_of, layers, split


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("size", ["1MB", "5GB"])
def test_round_trip_keeps_every_byte(tiny: Quantized, tmp_path: Path, size: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (3 if size == "1MB" else 1)
    before, after = tensors(tiny.folder), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    report = validate(tmp_path, deep=True)
    assert report.ok, report.findings
    assert section(tmp_path) == section(tiny.folder)
    with Checkpoint.open(tmp_path) as again, Checkpoint.open(tiny.folder) as first:
        assert again.modules == first.modules
        assert {f"{module}.{leaf}" for module in again.modules for leaf in again.tensors(module)} == again.sha256.keys()


def test_saved_again_after_a_second_load(tiny: Quantized, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny.folder).save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    (one, one_data), (two, two_data) = (split(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one == two  # as JSON: safetensors writes the metadata in random order
    assert one_data == two_data


def test_dequantize(tiny: Quantized, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    reference = dense_of(tiny)
    model.dequantize()
    assert not layers(model)
    assert not hasattr(model.config, "quantization_config")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, reference(IDS).logits)


def test_dequantize_after_a_save(tiny: Quantized, tmp_path: Path) -> None:
    """save_pretrained leaves the dtype's name in the config, and transformers hands that to us."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    model.save_pretrained(tmp_path)
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_load_dequantized(tiny: Quantized, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny.folder, dtype=torch.float32, quantization_config=SpqrFormatConfig(dequantize=True)
    )
    assert not layers(model)
    assert torch.equal(model(IDS).logits, dense_of(tiny)(IDS).logits)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_another_methods_config_is_refused(tiny: Quantized) -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="SpqrFormatConfig"):
        AutoModelForCausalLM.from_pretrained(tiny.folder, quantization_config=BitsAndBytesConfig())


def test_adapters_of_transformers_are_saved_without_our_metadata(tiny: Quantized, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as adapter:
        assert not any(key.startswith("spqr") for key in adapter.metadata())


def test_lora_trains_saves_and_loads(tiny: Quantized, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    before = model(IDS).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 4
    optimizer = torch.optim.SGD(trainable, lr=0.3)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(IDS).logits
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(IDS).logits, trained)


def test_prepared_for_training_with_checkpointed_activations(tiny: Quantized) -> None:
    """PEFT's preparation casts every half precision tensor to fp32, which must not reach ours."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    before = {name: layer.dequantize().weight for name, layer in layers(model).items()}
    model = peft.prepare_model_for_kbit_training(model)
    assert all(torch.equal(layer.dequantize().weight, before[name]) for name, layer in layers(model).items())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.train()
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_trainer_accepts_an_adapted_model(tiny: Quantized) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()


def test_disagreeing_request_is_an_error(tiny: Quantized) -> None:
    """`dequantize` is a request to a stored model. One that is not quantized yet cannot be dequantized."""

    with pytest.raises(SpqrError, match="E505 dequantize"):
        AutoModelForCausalLM.from_pretrained(TINY, quantization_config=SpqrFormatConfig(dequantize=True))

"""A stored model loads through transformers and computes what the format says.

Logits are compared within torch's own tolerance of float32 where few rows meet packed codes: the kernels of a CPU sum in
another order than the dense product. Weights are compared bit for bit.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import spqr_loaders
from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_loaders import SpqrLinear

from .conftest import IDS, How, Quantized, dense_of, layers, write_model


@pytest.fixture(scope="module")
def loaded(tiny: Quantized) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)


def test_modules_are_those_of_the_checkpoint(tiny, loaded):
    assert {name: layer.layout for name, layer in layers(loaded).items()} == {
        name: matrix.layout for name, matrix in tiny.matrices.items()
    }
    for layer in layers(loaded).values():
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert loaded.config.quantization_config.features == ["bilevel", "direct", "outliers", "perm"]


def test_weights_are_the_oracles_exactly(tiny, loaded):
    for name, layer in layers(loaded).items():
        assert torch.equal(layer.dequantize().weight, tiny.dense[f"{name}.weight"]), name


def test_greedy_text_equals_that_of_the_dequantized_model(tiny, loaded):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    batch = tokenizer(["The history of the town begins", "In the winter of that year"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    reference = dense_of(tiny)
    kwargs = {"max_new_tokens": 32, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(loaded.generate(**batch, **kwargs), reference.generate(**batch, **kwargs))
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)


def test_base_model_without_its_head(tiny):
    model = AutoModel.from_pretrained(tiny.folder, dtype=torch.float32)
    assert len(layers(model)) == len(tiny.matrices)
    assert torch.equal(model(IDS).last_hidden_state, dense_of(tiny).model(IDS).last_hidden_state)


def test_config_of_a_loaded_model(tiny, loaded):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, config=loaded.config, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(tiny, loaded, device_map):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, device_map=device_map)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_bfloat16_and_casts_leave_the_packed_tensors_alone(tiny, loaded):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    assert model.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    model = model.to(torch.float32)
    for name, layer in layers(model).items():
        for leaf, tensor in layers(loaded)[name].tensors().items():
            assert torch.equal(tensor, getattr(layer, leaf))


def test_disk_offload_reads_the_shards_in_place(tiny, loaded, tmp_path):
    device_map = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tiny.folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    with pytest.raises(SpqrError, match=r"E508.*offloaded"):
        model.dequantize()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_config_without_a_dtype(tiny, copied):
    """transformers then takes the dtype of the first floating tensor in the first shard; here there is none."""
    path = copied / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(copied)
    assert model.dtype.is_floating_point
    assert model(IDS).logits.isfinite().all()


def test_sharding_is_refused(tiny, loaded):
    from transformers.distributed.configuration_utils import DistributedConfig

    config = copy.deepcopy(loaded.config)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(SpqrError, match="E508 distributed_config: tp_size = 2"):
        AutoModelForCausalLM.from_pretrained(tiny.folder, config=config)


def test_compiles_to_one_graph(loaded):
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits)


def test_static_cache(loaded):
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    static = loaded.generate(IDS, cache_implementation="static", **kwargs)
    assert torch.equal(static, loaded.generate(IDS, **kwargs))


def test_without_the_plugin_nothing_loads(tiny):
    """transformers only warns of an unknown method, so the shape of `weight` has to stop it."""
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tiny.folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ignore_mismatched_sizes" in result.stderr


def test_from_pretrained_checks_the_folder_first(tiny, copied):
    assert spqr_loaders.from_pretrained(tiny.folder, dtype=torch.float32).dtype == torch.float32
    index = copied / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].popitem()
    index.write_text(json.dumps(content))
    with pytest.raises(SpqrError, match="E403"):
        spqr_loaders.from_pretrained(copied)


def test_biases_stay_dense(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    quantized = write_model(tmp_path, model, How(share=0.01))
    loaded = AutoModelForCausalLM.from_pretrained(quantized.folder)
    q_proj = loaded.model.layers[0].self_attn.q_proj
    assert torch.equal(q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    assert not q_proj.bias.requires_grad
    ids = torch.tensor([[1, 2, 3, 60]])
    torch.testing.assert_close(loaded(ids).logits, dense_of(quantized, tmp_path / "dense")(ids).logits)


def small_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **changes))


def test_a_quantized_head(tmp_path):
    quantized = write_model(tmp_path, small_llama(), How(share=0.01), also="lm_head")
    model = AutoModelForCausalLM.from_pretrained(quantized.folder)
    ids = torch.tensor([[1, 2, 3, 60]])
    assert isinstance(model.lm_head, SpqrLinear)
    torch.testing.assert_close(model(ids).logits, dense_of(quantized, tmp_path / "dense")(ids).logits)
    base = AutoModel.from_pretrained(quantized.folder)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    path = quantized.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(SpqrError, match=r"E508 lm_head: .*tie_word_embeddings"):
        AutoModelForCausalLM.from_pretrained(quantized.folder)


def test_a_base_model_grows_its_head(tmp_path):
    """A base model is stored without the prefix of its place in a larger one."""
    quantized = write_model(tmp_path, small_llama(tie_word_embeddings=True), How())
    base = AutoModel.from_pretrained(quantized.folder)
    base.save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj" in Checkpoint.open(tmp_path / "base").modules
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[1, 2, 3, 60]])
    torch.testing.assert_close(model(ids).logits, dense_of(quantized, tmp_path / "dense")(ids).logits)


def test_copies_of_a_model(loaded):
    again = copy.deepcopy(loaded)
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert pickle.loads(pickle.dumps(layers(loaded)["model.layers.0.mlp.up_proj"])).layout.weight_bits == 3


def test_renamed_modules_of_a_vision_model(tmp_path):
    """Llava stores `language_model.model.layers`, and its modules are `model.language_model.layers`."""
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    quantized = write_model(tmp_path, model, How(share=0.01))
    assert "language_model.model.layers.0.mlp.up_proj" in quantized.matrices
    loaded = AutoModelForImageTextToText.from_pretrained(quantized.folder)
    assert "model.language_model.layers.0.mlp.up_proj" in layers(loaded)
    assert len(layers(loaded)) == len(quantized.matrices)
    loaded.save_pretrained(tmp_path / "again")
    with Checkpoint.open(tmp_path / "again") as again:
        assert again.modules == {name: matrix.layout for name, matrix in quantized.matrices.items()}
    ids = torch.tensor([[1, 2, 3, 60]])
    reference = AutoModelForImageTextToText.from_pretrained(quantized.folder, quantization_config=runtime())
    assert not layers(reference)
    torch.testing.assert_close(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)


def runtime() -> spqr_loaders.SpqrFormatConfig:
    return spqr_loaders.SpqrFormatConfig(dequantize=True)


def test_our_from_pretrained_loads_a_dense_model_and_quantizes_one(tiny_llama):
    dense = spqr_loaders.from_pretrained(tiny_llama)
    assert not any(isinstance(module, spqr_loaders.SpqrLinear) for module in dense.modules())
    quantized = spqr_loaders.from_pretrained(tiny_llama, quantization_config=spqr_loaders.SpqrFormatConfig(group_size=32))
    assert any(isinstance(module, spqr_loaders.SpqrLinear) for module in quantized.modules())

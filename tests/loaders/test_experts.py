"""Mixture-of-experts models: each expert's matrices keep their hub names, and outliers differ from expert to expert."""

from __future__ import annotations

import copy
import json
import pickle
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


# One launch for all pairs


def test_a_pool_computes_what_single_experts_do(dense: Path, tmp_path: Path) -> None:
    stored, oracle = quantized(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32)
    split = [module for module in model.modules() if isinstance(module, SplitExperts)]
    assert not any(module.pooled for module in split), "on a CPU tensors stay in the file"
    with torch.no_grad():
        single = model(IDS).logits
        for module in split:
            module.join()
        assert all(module.pooled for module in split)
        assert calls(model) == {"spqr::experts": 4, "spqr::linear_forward": 8}
        torch.testing.assert_close(model(IDS).logits, single, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits, rtol=1e-4, atol=1e-5)


def calls(model: Any) -> dict[str, int]:
    """Calls of the operators in a forward pass, those in others not counted."""
    counted: dict[str, int] = {}
    with torch.no_grad(), Counter(counted):
        model(IDS)
    return counted


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, counted: dict[str, int]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("spqr::"):
            self.counted[name] = self.counted.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pooled(dense: Path, tmp_path: Path) -> Any:
    stored, _ = quantized(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.join()
    return model


def test_copies_moves_and_files_of_a_pool(pooled: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = pooled(IDS).logits
        torch.save(pooled, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for model in (copy.deepcopy(pooled), pickle.loads(pickle.dumps(pooled)), loaded, pooled.to(torch.float32)):
            assert torch.equal(model(IDS).logits, expected)
            assert "spqr::experts" in calls(model)
    apart = copy.deepcopy(pooled)  # each layer with memory of its own
    assert len(pickle.dumps(pooled)) < 1.1 * len(pickle.dumps(apart)), "no layer brings all of the pool"


def test_a_layer_that_left_the_pool_is_seen(pooled: Any) -> None:
    split = next(module for module in pooled.modules() if isinstance(module, SplitExperts))
    gate = getattr(getattr(split, "0"), split.projections[0])
    gate.weight = torch.nn.Parameter(torch.zeros_like(gate.weight), requires_grad=False)
    with torch.no_grad():
        new = pooled(IDS).logits
        split.pooled = False
        torch.testing.assert_close(new, pooled(IDS).logits, rtol=1e-5, atol=1e-5)


class Adapter(torch.nn.Module):
    """As PEFT has it: in the place of a layer, which it calls."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) + 100 * x.sum(-1, keepdim=True)


def test_a_layer_with_an_adapter_is_not_passed_over(pooled: Any) -> None:
    split = next(module for module in pooled.modules() if isinstance(module, SplitExperts))
    x, index, weights = torch.randn(2, 32), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
    with torch.no_grad():
        without = split(x, index, weights)
        expert, name = getattr(split, "1"), split.projections[2]
        layer = getattr(expert, name)
        setattr(expert, name, Adapter(layer))
        compiled = torch.compile(split)(x, index, weights)  # first of all: nothing has looked yet
        adapted = split(x, index, weights)
        assert not torch.allclose(adapted[0], without[0])
        torch.testing.assert_close(adapted[1], without[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled, adapted, rtol=1e-5, atol=1e-5)
        setattr(expert, name, layer)
        torch.testing.assert_close(split(x, index, weights), without, rtol=1e-5, atol=1e-6)
        split.join()
        assert split.pooled


def test_slots_that_the_router_left_empty(pooled: Any) -> None:
    split = next(module for module in pooled.modules() if isinstance(module, SplitExperts))
    x, index = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [2, 1]])
    weights = torch.tensor([[0.5, float("nan")], [1.0, 1.0], [0.25, 0.75]])
    with torch.no_grad():
        result = split(x, index, weights)
        split.pooled = False
        torch.testing.assert_close(result, split(x, index, weights), rtol=1e-5, atol=1e-6)
    assert (result[1] == 0).all()


def test_gradients_pass_through_single_experts(pooled: Any) -> None:
    split = next(module for module in pooled.modules() if isinstance(module, SplitExperts))
    x = torch.randn(2, 32, requires_grad=True)
    split(x, torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_step_compiles_into_one_graph(pooled: Any) -> None:
    with torch.no_grad():
        expected = pooled(IDS[:, :1], use_cache=False).logits
        compiled = torch.compile(pooled, fullgraph=True)
        torch.testing.assert_close(compiled(IDS[:, :1], use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


# Blocks of rows, which have kernels on Hopper: here they are multiplied one by one


@pytest.fixture
def in_blocks(pooled: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("spqr_loaders.experts.takes_blocks", lambda *_: True)
    model = pooled.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.join()
    return model


def test_many_rows_are_multiplied_in_blocks(in_blocks: Any) -> None:
    assert calls(in_blocks) == {"spqr::experts_in_blocks": 4, "spqr::linear_forward": 8}
    with torch.no_grad():
        together = in_blocks(IDS).logits
        for module in in_blocks.modules():
            if isinstance(module, SplitExperts):
                module.pooled = False
        single = in_blocks(IDS).logits
    assert (together - single).norm() < 0.02 * single.norm()


@pytest.mark.parametrize("dense", [mixtral], ids=["mixtral"], indirect=True)
def test_blocks_compile_into_one_graph(in_blocks: Any) -> None:
    with torch.no_grad():
        expected = in_blocks(IDS).logits
        compiled = torch.compile(in_blocks, fullgraph=True)(IDS, use_cache=False).logits
    assert (compiled - expected).norm() < 0.02 * expected.norm()


def test_very_many_rows_take_turns(in_blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = in_blocks(IDS).logits
        monkeypatch.setattr("spqr_loaders.experts.MOST", 3)  # 12 pairs, 6 tokens
        assert calls(in_blocks) == {"spqr::experts_in_blocks": 4, "spqr::experts": 4, "spqr::linear_forward": 8}
        result = in_blocks(IDS).logits
    assert (result - expected).norm() < 0.02 * expected.norm()


def test_slots_left_empty_and_ids_that_are_no_expert_in_blocks(in_blocks: Any) -> None:
    split = next(module for module in in_blocks.modules() if isinstance(module, SplitExperts))
    x = torch.randn(5, 32).bfloat16()
    index, weights = torch.tensor([[0, 4], [4, 4], [2, 1], [0, 1], [-1, 2]]), torch.rand(5, 2)
    weights[0, 1] = float("nan")
    with torch.no_grad():
        result = split(x, index, weights)
        assert (result[1] == 0).all()
        assert torch.isnan(result[4]).all()
        split.pooled = False
        torch.testing.assert_close(result[:4], split(x[:4], index[:4], weights[:4]), rtol=2e-2, atol=2e-2)

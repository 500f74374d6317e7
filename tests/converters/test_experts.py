"""Mixture-of-experts sources: under the hub's names, or stacked as transformers 5 holds them; transformers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert, predict
from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

from .conftest import MOE_SIZES

QUICK = SolverOptions(rounds=1, sweeps=0)
TWO_LAYERS = MOE_SIZES | {"num_hidden_layers": 2}
MODELS = {
    "mixtral": (lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **TWO_LAYERS)), ("w1", "w3", "w2")),
    "qwen3": (
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, mlp_only_layers=[], **TWO_LAYERS)),
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folders(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """One model twice: as save_pretrained writes it, with single experts, and with the model's own stacked tensors."""
    torch.manual_seed(0)
    model = MODELS[kind][0]().half()
    model.save_pretrained(tmp_path / "hub")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, stacked / "model.safetensors")
    (stacked / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    return tmp_path / "hub", stacked


@pytest.mark.parametrize("calibrated", [False, True])
def test_experts_are_quantized(kind, folders, tmp_path, monkeypatch, calibration_text, calibrated) -> None:
    """Every expert is a matrix of its own; stacked ones give what single ones give, and the loader takes both."""
    import spqr_loaders  # noqa: F401 - registers the format

    monkeypatch.setattr(job, "load_tokenizer", lambda folder: lambda text, **_: {"input_ids": [ord(c) % 64 for c in text]})
    data = Calibration(calibration_text, tokens=256, seqlen=32) if calibrated else None
    found = {}
    for name, folder in zip(("hub", "stacked"), folders, strict=True):
        assert predict(folder, calibration=data).modules == 2 * (4 + 4 * 3)
        report = convert(folder, tmp_path / f"{name}-out", calibration=data, solver=QUICK, device="cpu")
        assert validate(tmp_path / f"{name}-out", deep=True).ok
        assert len(report.modules) == 2 * (4 + 4 * 3)
        assert set(report.totals()["dense_parameters_by_reason"]) - {"embedding", "lm_head", "vector"} == {
            next(row["reason"] for row in report.dense.values() if "not a linear layer" in row["reason"])  # the router
        }
        checkpoint = Checkpoint.open(tmp_path / f"{name}-out")
        leaf = {module.rpartition(".")[2] for module in checkpoint.modules if ".experts." in module}
        assert leaf == set(MODELS[kind][1])
        short = {module.replace("block_sparse_moe", "mlp"): checkpoint.matrix(module) for module in checkpoint.modules}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out", dtype=torch.float32)
        found[name] = short, model(torch.arange(20)[None]).logits.detach()
    (hub, one), (stacked, two) = found["hub"], found["stacked"]
    assert hub.keys() == stacked.keys()
    assert all((hub[module].dequantize() == stacked[module].dequantize()).all() for module in hub)
    assert torch.equal(one, two)


def test_the_rows_are_those_that_transformers_splits(kind, folders) -> None:
    """Against save_pretrained's own splitting, tensor by tensor."""
    from spqr_converters.blocks import build
    from spqr_converters.experts import unstack
    from spqr_converters.sources import open_source

    hub, stacked = load_file(folders[0] / "model.safetensors"), open_source(folders[1])
    unstack(build(stacked.config, str(stacked.folder)), stacked)
    assert {name.replace("block_sparse_moe", "mlp") for name in hub} == set(stacked.entries)
    for name, tensor in hub.items():
        assert torch.equal(stacked.load(name.replace("block_sparse_moe", "mlp")), tensor), name


def test_stacks_of_another_order_are_refused(tmp_path) -> None:
    """GPT-OSS stores its experts transposed, interleaved and with biases: nothing is guessed."""
    GptOssForCausalLM(GptOssConfig(num_local_experts=4, **TWO_LAYERS)).half().save_pretrained(tmp_path / "x")
    with pytest.raises(SpqrError, match=r"SPQR-E504 model\.layers\.0\.mlp\.experts\.gate_up_proj: experts stacked"):
        convert(tmp_path / "x", tmp_path / "out", solver=QUICK)


def test_a_stack_beside_its_own_experts(kind, folders, tmp_path) -> None:
    tensors = load_file(folders[1] / "model.safetensors")
    gate = MODELS[kind][1][0]
    tensors[f"model.layers.0.mlp.experts.1.{gate}.weight"] = torch.zeros(2, 2).half()
    save_file(tensors, folders[1] / "model.safetensors")
    with pytest.raises(SpqrError, match=r"SPQR-E501.*stands beside"):
        convert(folders[1], tmp_path / "out", solver=QUICK)
    assert json.loads((folders[1] / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize("keep", [[], ["*.experts.0.*"]], ids=["all", "one-dense"])
def test_what_is_tuned_is_the_model_that_is_stored(kind, folders, tmp_path, keep) -> None:
    """Stacked experts, all of them quantized or one kept dense: the logits that tuning starts from are the loader's."""
    import spqr_loaders  # noqa: F401 - registers the format
    from spqr_converters.blocks import plan
    from spqr_converters.experts import unstack
    from spqr_converters.sources import open_source
    from spqr_converters.student import Student

    out, cpu = tmp_path / "out", torch.device("cpu")
    convert(folders[0], out, solver=QUICK, outlier_share=0.02, keep=keep, device="cpu")
    ids = torch.arange(20)[None]
    source = open_source(folders[0])
    original = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval().requires_grad_(False)
    unstack(original, source)
    with Checkpoint.open(out) as checkpoint, torch.no_grad():
        student = Student(checkpoint, original, plan(original, source), "all", cpu)
        found = student.logits(ids, student.weights())
    stored = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found, stored(ids).logits, rtol=0, atol=1e-5)
    assert (student.target(ids) - found).abs().max() > 1e-3

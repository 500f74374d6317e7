"""Experts calibrated with their own tokens. The oracle routes by hand, in float64, from the router's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, calibrated, convert, datafree
from spqr_converters.hessian import Accumulator, tree_sum
from spqr_converters.report import STARVED
from spqr_converters.routing import ExpertInputs, Part, Routed, solve_experts
from spqr_converters.sensitivity import _ExpertWatch
from spqr_format.reader import Checkpoint
from spqr_format.writer import CheckpointWriter

from .conftest import MOE_SIZES

QUICK = SolverOptions(rounds=1, sweeps=1)
KINDS = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}, ("w1", "w3", "w2")),
    "qwen3": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
        ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip


class Tokens:
    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 64 for sign in text]}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())


def make(folder: Path, kind: str = "qwen3", unloved: bool = False, **sizes: Any) -> Any:
    """A model whose hidden states lie mostly in a few directions. unloved: its last expert is never chosen."""
    config, model_class, own, _ = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config(**{**MOE_SIZES, **own, **sizes}))
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.mul_(50 * 0.8 ** torch.arange(embedding.shape[1]))
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=1.0)
            layer.mlp.experts.gate_up_proj.normal_(std=0.3)
            layer.mlp.experts.down_proj.normal_(std=0.3)
        if unloved:
            embedding[:, 0] = 3.0
            model.model.layers[0].mlp.gate.weight[-1] = -100.0 * torch.eye(embedding.shape[1])[0]
    model = model.half()
    model.save_pretrained(folder)
    return model.float().eval()


def moe_inputs(model: Any, ids: torch.Tensor) -> np.ndarray:
    """What the first layer's MoE block is given, float64 [tokens, hidden]."""
    caught = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return caught[0].double().numpy().reshape(ids.numel(), -1)


def route(model: Any, x: np.ndarray) -> np.ndarray:
    """The router's weights, float64 [tokens, experts], 0 where a token is not sent: the two likeliest, to a sum of 1."""
    logits = x @ model.model.layers[0].mlp.gate.weight.detach().double().numpy().T
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    odds[odds < np.sort(odds, 1)[:, -2:-1]] = 0
    return odds / odds.sum(1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def windows(text: Path, tokens: int) -> torch.Tensor:
    return Calibration(text, tokens=tokens, seqlen=32).windows(Tokens(), 64, 0)[0]


def expert_names(report: Any) -> list[str]:
    return [module.name for module in report.modules if ".experts." in module.name]


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_of_the_tokens_that_the_router_sends(kind, tmp_path, calibration_text, monkeypatch) -> None:
    """Gate and up share one, down has one behind the quantized gate and up; attention stays dense, so that the inputs are the
    original's."""
    model = make(tmp_path / "x", kind)
    found: dict[tuple[str, int], torch.Tensor] = {}
    real = calibrated.prepare

    def prepare(H: torch.Tensor, options: SolverOptions, name: str = "", tokens: int | None = None):
        found[name, len(H)] = H.double()
        return real(H, options, name, tokens)

    monkeypatch.setattr(calibrated, "prepare", prepare)
    data = Calibration(calibration_text, tokens=512, seqlen=32)
    report = convert(tmp_path / "x", tmp_path / "out", calibration=data, keep=["*.self_attn.*"], solver=QUICK, device="cpu")
    x = moe_inputs(model, windows(calibration_text, 512))
    weights = route(model, x)
    gate, up, _ = KINDS[kind][3]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        stored = {name.replace("block_sparse_moe", "mlp"): checkpoint.matrix(name).dequantize() for name in checkpoint.modules}
    rows = {module.name.replace("block_sparse_moe", "mlp"): module for module in report.modules}
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}"
        own, g = x[weights[:, expert] > 0], weights[weights[:, expert] > 0, expert, None]
        assert len(own) >= 48  # or nothing is tested
        h = silu(own @ stored[f"{name}.{gate}"].astype(np.float64).T) * (own @ stored[f"{name}.{up}"].astype(np.float64).T)
        for inputs, part in ((own, gate), (own, up), (h, KINDS[kind][3][2])):
            expected = (g * inputs).T @ (g * inputs) / len(own)
            H = found[name, inputs.shape[1]].numpy()
            assert np.abs(H - expected).max() < 1e-4 * np.abs(expected).max()
            assert (rows[f"{name}.{part}"].method, rows[f"{name}.{part}"].tokens) == ("calibrated", len(own))


def test_a_token_that_the_two_models_route_apart() -> None:
    """The quantized model's router decides; beside each of its tokens stands the original's input for the same token."""
    torch.manual_seed(0)
    config, _, own, _ = KINDS["qwen3"]
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    stack = Qwen3MoeExperts(config(**{**MOE_SIZES, **own})).requires_grad_(False)
    original = Qwen3MoeExperts(config(**{**MOE_SIZES, **own})).requires_grad_(False)
    for leaf in ("gate_up_proj", "down_proj"):
        getattr(stack, leaf).normal_()
        setattr(original, leaf, getattr(stack, leaf))
    before = stack.gate_up_proj.clone()

    def call() -> Routed:
        chosen = torch.rand(40, 4).argsort(1)[:, :2]
        return Routed(torch.randn(40, 32), chosen, torch.rand(40, 2))

    seen, meant = [call(), call()], [call(), call()]
    sums: dict[str, Accumulator] = {}

    def solve(matrices: dict[str, torch.Tensor], new: object, part: Part) -> list[torch.Tensor]:
        both = tree_sum(part, 0, 2)
        assert both is not None
        sums[" ".join(matrices)] = both
        return [0.5 * weight for weight in matrices.values()]

    names = [([f"{i}.gate", f"{i}.up"], [f"{i}.down"]) for i in range(4)]
    shards = [ExpertInputs([one], [other]) for one, other in zip(seen, meant, strict=True)]
    solve_experts(stack, original, shards, names, solve, "experts")
    assert torch.equal(original.gate_up_proj, before)
    assert torch.equal(stack.gate_up_proj, 0.5 * before)
    for expert in range(4):
        shapes = {"gate_up": (32, 32), "down": (48, 48)}
        H = {name: np.zeros(shape) for name, shape in shapes.items()}
        cross = {name: np.zeros(shape) for name, shape in shapes.items()}
        count = 0
        W = before[expert].double().numpy()
        for one, other in zip(seen, meant, strict=True):
            for token in range(40):
                for slot in range(2):
                    if one.chosen[token, slot] != expert:
                        continue
                    count += 1
                    g = float(one.weights[token, slot])
                    x, x_reference = (c.hidden[token].double().numpy() for c in (one, other))
                    h, h_reference = (
                        silu((share * W @ v)[:48]) * (share * W @ v)[48:] for share, v in ((0.5, x), (1, x_reference))
                    )
                    for name, a, b in (("gate_up", x, x_reference), ("down", h, h_reference)):
                        H[name] += g * g * np.outer(a, a)
                        cross[name] += g * g * np.outer(b - a, a)
        for name, key in (("gate_up", f"{expert}.gate {expert}.up"), ("down", f"{expert}.down")):
            assert sums[key].tokens == count
            assert sums[key].cross is not None
            np.testing.assert_allclose(sums[key].sum, H[name], rtol=0, atol=1e-4 * np.abs(H[name]).max())
            np.testing.assert_allclose(sums[key].cross, cross[name], rtol=0, atol=1e-4 * np.abs(cross[name]).max())


def test_starved_experts_are_data_free_and_reported(tmp_path, calibration_text) -> None:
    """Fewer tokens than columns, for each matrix by its own columns: the data-free result bit for bit, and named."""
    model = make(tmp_path / "x", unloved=True)
    data = Calibration(calibration_text, tokens=64, seqlen=32)
    report = convert(tmp_path / "x", tmp_path / "out", calibration=data, keep=["*.self_attn.*"], solver=QUICK, device="cpu")
    convert(tmp_path / "x", tmp_path / "free", keep=["*.self_attn.*"], solver=QUICK, device="cpu")
    counts = (route(model, moe_inputs(model, windows(calibration_text, 64))) > 0).sum(0)
    assert counts[3] == 0
    columns = {"gate_proj": 32, "up_proj": 32, "down_proj": 48}
    expected = {
        f"model.layers.0.mlp.experts.{expert}.{part}": int(counts[expert])
        for expert in range(4)
        for part, width in columns.items()
        if counts[expert] < width
    }
    assert 3 < len(expected) < 12  # some of both
    assert report.starved == expected
    assert {module.name for module in report.modules if module.method == "calibrated"} == {
        name for name in expert_names(report) if name not in expected
    }
    assert json.loads((tmp_path / "out" / "spqr_report.json").read_bytes())["starved"] == expected
    note = next(note for note in report.notes if "experts" in note)
    assert note.startswith(f"{len(expected)} of 12 ")
    assert "model.layers.0.mlp.experts.3.down_proj (0)" in note
    with Checkpoint.open(tmp_path / "out") as one, Checkpoint.open(tmp_path / "free") as other:
        for name in expert_names(report):
            found, free = (checkpoint.matrix(name) for checkpoint in (one, other))
            same = all(np.array_equal(getattr(found, part), getattr(free, part)) for part in ("codes", "tile_stats"))
            assert same == (name in expected), name
            if name in expected:
                weight = model.get_parameter("model.layers.0.mlp.experts." + PARTS[name.rpartition(".")[2]][0])
                row = weight[int(name.split(".")[5])][PARTS[name.rpartition(".")[2]][1]]
                assert np.array_equal(datafree.quantize(row, QUICK).dequantize(), found.dequantize())


PARTS = {
    "gate_proj": ("gate_up_proj", slice(0, 48)),
    "up_proj": ("gate_up_proj", slice(48, 96)),
    "down_proj": ("down_proj", slice(None)),
}


def test_calibration_lowers_the_error_on_other_tokens(tmp_path, calibration_text) -> None:
    """The output of the layer of experts, for tokens of another text."""
    model = make(tmp_path / "x")
    data = Calibration(calibration_text, tokens=2048, seqlen=32)
    options = {"keep": ["*.self_attn.*"], "device": "cpu"}
    convert(tmp_path / "x", tmp_path / "out", calibration=data, **options)
    convert(tmp_path / "x", tmp_path / "free", **options)
    text = (Path(__file__).parents[1] / "data" / "wikitext2_test.txt").read_text("utf-8")[5000:7048]
    x = moe_inputs(model, torch.tensor(Tokens()(text)["input_ids"]).view(-1, 32))
    weights = route(model, x)

    def output(folder: Path) -> np.ndarray:
        result = np.zeros_like(x)
        with Checkpoint.open(folder) as checkpoint:
            for expert in range(4):
                gate, up, down = (
                    checkpoint.matrix(f"model.layers.0.mlp.experts.{expert}.{part}").dequantize().astype(np.float64)
                    for part in KINDS["qwen3"][3]
                )
                result += weights[:, expert, None] * (silu(x @ gate.T) * (x @ up.T) @ down.T)
        return result

    with torch.no_grad():
        meant = model.model.layers[0].mlp(torch.from_numpy(x).float()[None])[0].double().numpy()
    data_free, with_data = (np.square(output(tmp_path / name) - meant).sum() for name in ("free", "out"))
    assert with_data < 0.7 * data_free


@pytest.mark.parametrize("keep", [[], ["*.experts.1.gate_proj", "*.experts.2.*"]], ids=["all", "some-dense"])
def test_taken_up_again_after_any_module(keep, tmp_path, calibration_text, monkeypatch) -> None:
    """Two layers, of which the second sees what the first one's experts became: the bytes of an unbroken run."""
    make(tmp_path / "x", num_hidden_layers=2)
    data = Calibration(calibration_text, tokens=96, seqlen=32)
    options: dict[str, Any] = {"calibration": data, "keep": keep, "solver": QUICK, "device": "cpu"}
    report = convert(tmp_path / "x", tmp_path / "whole", **options)
    assert {module.method for module in report.modules} == {"calibrated", STARVED}
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    real, count = CheckpointWriter.add, 0

    def add(self, packed, note=None):
        nonlocal count
        count += 1
        if count % 9 == 0:
            raise OSError("no space")
        real(self, packed, note)

    monkeypatch.setattr(CheckpointWriter, "add", add)
    for _ in range(20):
        try:
            convert(tmp_path / "x", tmp_path / "parts", **options)
            break
        except OSError:
            continue
    assert count > 18
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == whole


def test_the_importance_of_an_experts_weights() -> None:
    """A stack that is watched computes what it computes; with few tokens the importance is the sum of each token's squared
    gradient, by autograd; with many, output by output, it is that of the mean square times the pivots of their Hessian."""
    torch.manual_seed(0)
    config, _, own, _ = KINDS["qwen3"]
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    stack = Qwen3MoeExperts(config(**{**MOE_SIZES, **own}))
    with torch.no_grad():
        stack.gate_up_proj.normal_()
        stack.down_proj.normal_()
    hidden, direction = torch.randn(400, 32), torch.randn(400, 32)
    chosen, weights = torch.rand(400, 4).argsort(1)[:, :2], torch.rand(400, 2)
    chosen[10:] = chosen[10:].clamp(max=2)  # the last expert has few
    plain = stack(hidden, chosen, weights)
    squares = torch.zeros_like(stack.gate_up_proj)
    for token in range(400):
        one = stack(hidden[token, None], chosen[token, None], weights[token, None])
        squares += torch.autograd.grad((one * direction[token]).sum(), stack.gate_up_proj)[0].square()
    watch = _ExpertWatch(stack)
    watched = stack(hidden.requires_grad_(True), chosen, weights)
    watched.backward(direction)
    watch.end()
    torch.testing.assert_close(watched, plain)
    assert "forward" not in vars(stack)
    found = dict(watch.importances(400, "experts"))
    torch.testing.assert_close(found["gate_up_proj", 3], squares[3] / 400, rtol=1e-4, atol=1e-6)
    x = hidden.detach()[(chosen == 0).any(1)]
    H = (x.T @ x).double() / len(x)
    H += (0.01 + 3 * 32 / len(x)) * H.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    # The pivot of the column that is processed last is its diagonal, that of the first 1 / its inverse's diagonal.
    order = calibrated.order_columns((x.T @ x) / len(x), 16)
    first = int(order[0])
    importance = found["gate_up_proj", 0]
    rank_one = importance[:, :1] @ importance[:1] / importance[0, 0]
    torch.testing.assert_close(importance, rank_one)
    share = (importance[:, first] / importance.sum(1)).double()
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    pivots = U.diagonal().square().reciprocal()
    torch.testing.assert_close(share, (pivots[0] / pivots.sum()).expand(96), rtol=1e-4, atol=0)

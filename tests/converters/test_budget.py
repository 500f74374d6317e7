"""Budgets of bits: the knapsack against all its solutions, predictions against measured KL, plans against what is stored."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spqr_converters.job as job
import spqr_converters.prediction as prediction
from spqr_converters import Calibration, SolverOptions, calibrated, convert, predict
from spqr_converters.activations import Room
from spqr_converters.allocation import allocate
from spqr_converters.blocks import build, plan
from spqr_converters.calibration import Calibration as Text
from spqr_converters.evaluation import evaluate, windows_of
from spqr_converters.experts import unstack
from spqr_converters.presets import PRESETS, candidates
from spqr_converters.sensitivity import Sensitivity, losses
from spqr_converters.sources import open_source
from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

QUICK = SolverOptions(rounds=1, sweeps=0)
MEASURED = ("0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.v_proj", "2.mlp.gate_proj", "3.self_attn.o_proj")


class Tokens:
    """The random models have no tokenizer."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 300 for sign in text]}


def total(table, chosen) -> float:
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


# The knapsack


@pytest.mark.parametrize("seed", range(30))
def test_an_allocation_is_near_the_best_of_all(seed: int) -> None:
    """Five things of four choices, all 1024 combinations tried: it fits, no single change improves it, and the best one is
    lower by less than the largest step between two choices."""
    draw = random.Random(seed)
    costs = [[draw.randint(1, 40) for _ in range(4)] for _ in range(5)]
    table = [[draw.random() / cost for cost in row] for row in costs]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = draw.randint(least, most)
    chosen = allocate(costs, table, budget)
    every = [c for c in itertools.product(range(4), repeat=5) if total(costs, c) <= budget]
    best = min(total(table, c) for c in every)
    step = max(abs(a - b) for row in table for a, b in itertools.combinations(row, 2))
    assert total(costs, chosen) <= budget
    assert best <= total(table, chosen) < best + step
    near = [c for c in every if sum(a != b for a, b in zip(c, chosen, strict=True)) == 1]
    assert total(table, chosen) <= min((total(table, c) for c in near), default=1e9)


@pytest.mark.parametrize("seed", range(10))
def test_an_allocation_of_equal_convex_steps_is_the_best(seed: int) -> None:
    """Where every step costs the same and saves less than the one before, greedy is exact."""
    draw = random.Random(seed)
    costs = [[2, 3, 4, 5]] * 5
    table = [sorted((draw.random() for _ in range(4)), reverse=True) for _ in range(5)]
    for row in table:  # convex: sums of falling steps
        steps = sorted((draw.random() for _ in range(3)), reverse=True)
        row[:] = [sum(steps[i:]) for i in range(4)]
    for budget in range(10, 26):
        every = (c for c in itertools.product(range(4), repeat=5) if total(costs, c) <= budget)
        assert total(table, allocate(costs, table, budget)) == pytest.approx(min(total(table, c) for c in every))


def test_no_allocation_below_the_cheapest() -> None:
    assert allocate([[5, 3], [4, 9]], [[0, 1], [1, 0]], 7) == [1, 0]
    with pytest.raises(ValueError, match="cheapest"):
        allocate([[5, 3], [4, 9]], [[0, 1], [1, 0]], 6)


# The prediction


def test_a_part_of_the_rows_stands_for_all() -> None:
    """64 rows of 400, of unequal importance, against the loss of all rows."""
    torch.manual_seed(0)
    weight = torch.randn(400, 64) * torch.rand(400, 1)
    importance = torch.rand(400, 1).pow(4) * torch.rand(64)
    options = [SolverOptions(weight_bits=bits, rounds=1) for bits in (2, 3, 4)]
    exact = []
    for option in options:
        error = weight - torch.from_numpy(job.datafree.quantize(weight, option).dequantize())
        exact.append(0.5 * float((importance * error.square()).sum()))
    assert losses(weight, importance, options, "w") == pytest.approx(exact, rel=0.1)
    small = weight[:48]  # all of its rows are taken
    error = small - torch.from_numpy(job.datafree.quantize(small, options[0]).dequantize())
    expected = 0.5 * float((importance[:48] * error.square()).sum())
    assert losses(small, importance[:48], options[:1], "w")[0] == pytest.approx(expected, rel=1e-4)


def test_predicted_losses_are_the_measured_kl(tiny_llama: Path, calibration_text: Path) -> None:
    """Each of some modules quantized alone, and the KL of the whole model measured on other text, over losses that differ 50
    times and more. From so little calibration the prediction is low, but it is so by the same factor."""
    source = open_source(tiny_llama)
    model = build(source.config, str(tiny_llama))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    windows, _ = Text(calibration_text, tokens=4096, seqlen=256).windows(tokenizer, 512, 0)
    offered = [SolverOptions(weight_bits=2, rounds=1, sweeps=0), SolverOptions(weight_bits=4, rounds=1, sweeps=0)]
    names = [f"model.layers.{i}" for i in MEASURED]
    todo = replace(plan(model, source), matrices={f"{name}.weight": name for name in names})
    predicted = Sensitivity(model, todo, source, windows, Room("cpu")).measure(offered)
    assert all(parameter.is_meta for parameter in model.parameters())  # nothing is left in memory

    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    changed = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    text = (Path(__file__).parents[1] / "data" / "wikitext2_test.txt").read_text("utf-8")
    held_out = windows_of(text, tokenizer, 256, 2048)
    ratios, measured = [], []
    for name in names:
        layer = changed.get_submodule(name)
        seen: list[torch.Tensor] = []
        hook = dense.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            dense(windows)
        hook.remove()
        x = seen[0].flatten(0, 1)
        weight = layer.weight.data
        for options, kl in zip(offered, predicted[f"{name}.weight"], strict=True):
            matrix, _ = calibrated.solve(weight, x.T @ x / len(x), options)
            layer.weight.data = torch.from_numpy(matrix.dequantize())
            measured.append(evaluate(changed, held_out, reference=dense).kl.mean)
            ratios.append(kl / measured[-1])
        layer.weight.data = weight
    assert max(measured) > 50 * min(measured)
    assert max(ratios) < 2 * min(ratios)
    assert min(ratios) > 0.4
    assert max(ratios) < 1.2


def test_experts_have_their_own_importance(tmp_path: Path, calibration_text: Path) -> None:
    """Stacked experts are measured too, and one that no token is sent to gets a loss like the others', not none."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, mlp_only_layers=[],
        num_key_value_heads=2, num_experts_per_tok=1, num_experts=4, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:  # to expert 3 goes nothing: the others' scores are both signs of one
        layer.mlp.gate.weight.data[1] = -layer.mlp.gate.weight.data[0]
        layer.mlp.gate.weight.data[3] = 0
    model.save_pretrained(tmp_path / "moe")
    source = open_source(tmp_path / "moe")
    empty = build(source.config, str(tmp_path / "moe"))
    unstack(empty, source)
    windows = torch.randint(0, 64, (8, 32))
    todo = plan(empty, source)
    found = Sensitivity(empty, todo, source, windows, Room("cpu")).measure([SolverOptions(weight_bits=2), QUICK])
    assert found.keys() == todo.matrices.keys()
    assert all(two > three > 0 for two, three in found.values())


# Conversions


def test_a_budget_is_met_and_the_plan_is_what_is_stored(random_llama, tmp_path, monkeypatch, calibration_text) -> None:
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    monkeypatch.setattr(prediction, "load_tokenizer", lambda folder: Tokens())
    source = random_llama(hidden=96, mlp=192)
    data = Calibration(calibration_text, tokens=512, seqlen=64)
    options = {"bits_per_weight": 3.3, "calibration": data, "solver": QUICK, "device": "cpu"}
    report = convert(source, tmp_path / "out", **options)
    assert validate(tmp_path / "out", deep=True).ok
    assert 0.995 * 3.3 < report.bits <= 3.3
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    budget = section["provenance"]["budget"]
    assert budget["planned_bits"] == pytest.approx(report.bits, rel=1e-3)
    assert "weight_bits" not in section["provenance"]["solver"]
    stored = Checkpoint.open(tmp_path / "out").modules
    assert stored.keys() == budget["modules"].keys()
    for name, module in budget["modules"].items():
        layout = stored[name]
        assert (layout.weight_bits, layout.group_size) == (module["weight_bits"], module["group_size"])
        share = layout.outliers / (layout.out_features * layout.in_features)
        assert share == pytest.approx(module["outlier_share"], abs=1e-4)
    assert len({(m["weight_bits"], m["group_size"]) for m in budget["modules"].values()}) > 2
    weights: dict[tuple[int, int], int] = {}
    for layout in stored.values():
        key = (layout.weight_bits, layout.group_size)
        weights[key] = weights.get(key, 0) + layout.out_features * layout.in_features
    assert (section["weight_bits"], section["group_size"]) == max(weights, key=lambda key: weights[key])
    assert predict(source, **options).budget == budget
    assert 0 < budget["predicted_kl"] == pytest.approx(sum(m["predicted_loss"] for m in budget["modules"].values()))


def test_without_calibration_any_number_of_workers_plans_the_same(random_llama, tmp_path) -> None:
    source = random_llama(hidden=96, mlp=192)
    reports = [
        convert(source, tmp_path / f"out{workers}", bits_per_weight=3.9, solver=QUICK, workers=workers, device="cpu")
        for workers in (1, 3)
    ]
    assert 0.99 * 3.9 < reports[0].bits <= 3.9
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / f"out{w}").iterdir()} for w in (1, 3))
    assert one == three


def test_a_stopped_conversion_goes_on_with_the_same_plan_only(random_llama, tmp_path, monkeypatch, calibration_text) -> None:
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    options = {"calibration": Calibration(calibration_text, tokens=512, seqlen=64), "solver": QUICK, "device": "cpu"}
    source = random_llama()
    convert(source, tmp_path / "whole", bits_per_weight=3.8, **options)
    real = job._Job._solve_block

    def stop(self, block, prefix, index, *rest):
        if index:
            raise KeyboardInterrupt
        real(self, block, prefix, index, *rest)

    monkeypatch.setattr(job._Job, "_solve_block", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", bits_per_weight=3.8, **options)
    monkeypatch.setattr(job._Job, "_solve_block", real)
    with pytest.raises(SpqrError, match="E511"):
        convert(source, tmp_path / "out", bits_per_weight=4.4, **options)
    convert(source, tmp_path / "out", bits_per_weight=3.8, **options)
    whole, out = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == out


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"bits_per_weight": 1.5}, "bits_per_weight"),
        ({"bits_per_weight": 9.0}, "bits_per_weight"),
        ({"bits_per_weight": 0.0}, "bits_per_weight"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight"),
        ({"bits_per_weight": 3.9, "weight_bits": 4}, "weight_bits"),
        ({"bits_per_weight": 3.9, "outlier_share": 0.01}, "outlier_share"),
        ({"bits_per_weight": 3.9, "lossless": True}, "bits_per_weight"),
    ],
)
def test_impossible_budgets_are_refused(random_llama, tmp_path, options, where) -> None:
    source = random_llama()
    for attempt in (lambda: convert(source, tmp_path / "out", solver=QUICK, **options), lambda: predict(source, **options)):
        with pytest.raises(SpqrError) as caught:
            attempt()
        assert caught.value.code == "E505"
        assert caught.value.where == where
    assert not (tmp_path / "out").exists()


def test_presets_can_be_met_and_the_fast_kernels_are_used_where_they_can() -> None:
    for bits in PRESETS.values():
        layouts = [options.layout(4096, 4096) for options in candidates(bits, SolverOptions())]
        assert (
            min(layout.bits_per_weight() for layout in layouts)
            < bits
            < max(layout.bits_per_weight() for layout in layouts) + 0.3
        )
    assert {options.group_size for options in candidates(PRESETS["balanced"], SolverOptions())} == {16}

"""Whether the loss that a budget's plan minimises is the one that is measured: random plans, predicted and measured KL.

    python converters/benchmarks/budget_prediction.py [MODEL] [--calibration TEXT] [--text TEXT] [--plans 16]

Every matrix is solved at 2, 3 and 4 bits on the dense model's inputs; a plan takes one of the three for each of them by lot,
with odds that differ from plan to plan. Its KL to the dense model is measured on 4096 tokens of another text. Beside the
prediction that `spqr convert --bits-per-weight` makes stands the one without calibration, from relative weight errors alone.
The defaults are the model and the texts of the tests.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_converters import Calibration, SolverOptions, calibrated, sensitivity
from spqr_converters.activations import Room
from spqr_converters.blocks import build, plan
from spqr_converters.evaluation import evaluate, read_text, windows_of
from spqr_converters.hessian import Accumulator
from spqr_converters.sources import open_source

TESTS = Path(__file__).parents[2] / "tests"
OFFERED = [SolverOptions(weight_bits=bits, rounds=1, sweeps=0) for bits in (2, 3, 4)]


def solved(model: Any, names: list[str], windows: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """The dequantized weights of each module for each candidate, float32 [out, in]."""
    layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}
    hessians = {name: Accumulator(layer.in_features, name) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hessians[name].add(args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers.items():
        H = hessians[name].mean()
        matrices = [calibrated.solve(layer.weight, H, options, name)[0] for options in OFFERED]
        found[name] = [torch.from_numpy(matrix.dequantize()) for matrix in matrices]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=TESTS / "models" / "tiny-llama")
    parser.add_argument("--calibration", type=Path, default=TESTS / "data" / "calibration.txt")
    parser.add_argument("--text", type=Path, default=TESTS / "data" / "wikitext2_test.txt")
    parser.add_argument("--plans", type=int, default=16)
    arguments = parser.parse_args()

    source = open_source(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows, _ = Calibration(arguments.calibration, tokens=sensitivity.TOKENS, seqlen=512).windows(tokenizer, 512, 0)
    held_out = windows_of(read_text(arguments.text), tokenizer, 512, 4096)
    empty = build(source.config, str(arguments.model))
    todo = plan(empty, source)
    by_fisher = sensitivity.Sensitivity(empty, todo, source, windows, Room("cpu")).measure(OFFERED)
    by_weight = {tensor: sensitivity.data_free(source.load(tensor), OFFERED, tensor) for tensor in todo.matrices}

    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    changed = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    weights = solved(dense, list(todo.matrices.values()), windows)
    draw = random.Random(0)
    rows = []
    print("bits  predicted KL  measured KL  weight errors")
    for _ in range(arguments.plans):
        odds = [draw.random() for _ in OFFERED]
        chosen = {tensor: draw.choices(range(len(OFFERED)), odds)[0] for tensor in todo.matrices}
        for tensor, i in chosen.items():
            changed.get_submodule(todo.matrices[tensor]).weight.data = weights[todo.matrices[tensor]][i]
        kl = evaluate(changed, held_out, reference=dense).kl
        assert kl is not None
        sizes = {tensor: source.entries[tensor].numel for tensor in chosen}
        bits = sum(OFFERED[i].weight_bits * sizes[tensor] for tensor, i in chosen.items()) / sum(sizes.values())
        predicted, errors = (sum(table[tensor][i] for tensor, i in chosen.items()) for table in (by_fisher, by_weight))
        rows.append((predicted, kl.mean, errors))
        print(f"{bits:.2f}  {predicted:12.4f}  {kl.mean:11.4f}  {errors:13.0f}", flush=True)
    table = torch.tensor(rows, dtype=torch.float64).T
    logs = torch.corrcoef(table.log())
    ranks = torch.corrcoef(table.argsort(1).argsort(1).double())
    print(f"predicted over measured, geometric mean: {float((table[0] / table[1]).log().mean().exp()):.2f}")
    print(f"correlation with the measured KL, of logarithms and of ranks: {logs[0, 1]:.3f}, {ranks[0, 1]:.3f}")
    print(f"the same of weight errors: {logs[2, 1]:.3f}, {ranks[2, 1]:.3f}")


if __name__ == "__main__":
    main()

"""With how many tokens an expert is better calibrated than quantized from its weights alone.

    python converters/benchmarks/experts.py MODEL --calibration TEXT [--text TEXT] [--every 4]

Every fourth expert of a mixture-of-experts model is quantized with 3 bits in groups of 16, without data and with Hessians of
the first n of its own tokens in the calibration text, once with the usual damping and once with the one for few tokens.
Printed: the squared error of the projections' outputs on the tokens that the router sends it in another text, over that
without data (geometric mean and worst of the matrices), by tokens for each input column.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_converters import Calibration, SolverOptions, calibrated, datafree
from spqr_converters.evaluation import read_text, windows_of
from spqr_converters.experts import stacks
from spqr_converters.routing import Routed, intermediate

TEXT = Path(__file__).parents[2] / "tests" / "data" / "wikitext2_test.txt"
RATIOS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # tokens for each input column
SOLVER = SolverOptions()


def routed(model: Any, windows: torch.Tensor) -> dict[str, list[Routed]]:
    """What each stack is given."""
    found: dict[str, list[Routed]] = {name: [] for name, _ in stacks(model, "")}
    hooks = [
        stack.register_forward_pre_hook(lambda _, *call, name=name: found[name].append(Routed.of(*call)), with_kwargs=True)
        for name, stack in stacks(model, "")
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration")
    parser.add_argument("--held-out", type=int, default=16384, help="tokens of the other text")
    parser.add_argument("--every", type=int, default=4)
    chosen = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval().requires_grad_(False)
    windows, _ = Calibration(chosen.calibration, tokens=chosen.tokens, seqlen=512).windows(tokenizer, 512, 0)
    calls = routed(model, windows)
    others = routed(model, windows_of(read_text(chosen.text), tokenizer, 512, chosen.held_out))
    plain: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    damped: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    for number, (name, stack) in enumerate((n, s) for n, s in stacks(model, "")):
        for expert in range(number % chosen.every, len(stack.down_proj), chosen.every):
            x, held_out = (torch.cat([call.hidden[call.to(expert)[0]] for call in c[name]]) for c in (calls, others))
            gate_up = stack.gate_up_proj[expert]
            for weight, seen, unseen in (
                (gate_up, x, held_out),
                (stack.down_proj[expert], *(intermediate(stack, gate_up, part) for part in (x, held_out))),
            ):
                columns = weight.shape[1]
                free = error(weight, datafree.solve(weight, SOLVER)[0], unseen)
                for ratio in RATIOS:
                    n = int(ratio * columns)
                    if n <= len(seen):
                        H = seen[:n].T @ seen[:n] / n
                        for found, tokens in ((plain, None), (damped, n)):
                            factor = calibrated.prepare(H, SOLVER, tokens=tokens)
                            matrix = calibrated.solve(weight, H, SOLVER, factor=factor)[0]
                            found[ratio].append(error(weight, matrix, unseen) / free)
    print("| tokens a column | matrices | usual damping | worst | for few tokens | worst |\n|---:|---:|---:|---:|---:|---:|")
    for ratio in filter(plain.get, RATIOS):
        figures = [f"{figure:.3f}" for found in (plain[ratio], damped[ratio]) for figure in (mean(found), max(found))]
        print(f"| {ratio:g} | {len(plain[ratio])} | {' | '.join(figures)} |")


def mean(found: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, found)))


def error(weight: torch.Tensor, matrix: Any, x: torch.Tensor) -> float:
    """The sum of squared errors of the outputs for inputs x [n, in]."""
    return float((x @ (weight - torch.from_numpy(matrix.dequantize())).T).square().sum())


if __name__ == "__main__":
    main()

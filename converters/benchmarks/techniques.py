"""What each technique of the calibrated quantizer buys: one at a time is switched off, and the KL to the dense model measured.

    python converters/benchmarks/techniques.py [MODEL] --calibration TEXT --text TEXT [--text TEXT] [--only NAME]

Everything else stays as `spqr convert --weight-bits 3` has it. Techniques without an option are switched off by putting
something simpler in their place, here. A row is printed as soon as it is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_converters import Calibration, SolverOptions, calibrated, convert, statistics
from spqr_converters.evaluation import evaluate, read_text, windows_of
from spqr_format.reader import Checkpoint

TESTS = Path(__file__).parents[2] / "tests"
PAIRS = statistics.CODES**2
OUTLIERS = {"outlier_share": 0.003}


def nearest_pair(
    w: torch.Tensor, U: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, top: int, free: torch.Tensor | None,
    search: Any = statistics.feedback,
) -> torch.Tensor:  # fmt: skip
    """In place of the losses of the 64 pairs: how far each is from the row's own scale and zero, unrounded."""
    if scale.shape[1] != PAIRS:
        found: torch.Tensor = search(w, U, scale, zero, top, free)
        return found
    own_scale, own_zero, _ = statistics.search_rows(w, U, top, free)
    distances = [(grid - own[:, None]).abs() for grid, own in ((scale, own_scale), (zero, own_zero))]
    return sum(d / d.amax(1, keepdim=True).clamp_min(1e-30) for d in distances)  # type: ignore[return-value]


def without_feedback(self: Any) -> None:
    """In place of the pass of error feedback: every group is fitted to its own weights."""
    for number, span in self.spans:
        U = self.U[span, span]
        fit = calibrated.FITS[self.options.statistics](
            self.w[span], U, self.options.top, self._mask(span), rounds=self.options.rounds
        )
        self.fits[number] = fit
        self._store(span, self.w[span], fit, U)


# Name -> what is put in place of what, options of the solver, options of the conversion.
SWITCHED_OFF: dict[str, tuple[list[tuple[Any, str, Any]], dict[str, Any], dict[str, Any]]] = {
    "nothing": ([], {}, {}),
    "search of all 64 pairs of scale and zero codes (the nearest instead)": ([(statistics, "feedback", nearest_pair)], {}, {}),
    "rounds 2 and 3 of the joint search": ([], {"rounds": 1}, {}),
    "error feedback between groups": ([(calibrated._Solver, "_feed_back", without_feedback)], {}, {}),
    "coordinate descent": ([], {"sweeps": 0}, {}),
    "error feedback and coordinate descent": ([(calibrated._Solver, "_feed_back", without_feedback)], {"sweeps": 0}, {}),
    "drift correction": ([], {"drift": 0.0}, {}),
    "order of columns by their inputs": ([(calibrated, "order_columns", lambda H, size: torch.arange(len(H)))], {}, {}),
    "nothing, with 0.3 % outliers": ([], {}, OUTLIERS),
    "choice of outliers by leave-one-out (the largest weights instead)": (
        [(calibrated, "leave_one_out", lambda w, U, top: w.abs())], {}, OUTLIERS,
    ),
}  # fmt: skip


@contextmanager
def replaced(parts: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes set for as long as the block runs."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, value in parts:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=TESTS / "models" / "tiny-llama")
    parser.add_argument("--calibration", type=Path, default=TESTS / "data" / "calibration.txt")
    parser.add_argument("--text", type=Path, action="append", help="once for each text")
    parser.add_argument("--tokens", type=int, default=131072, help="of calibration")
    parser.add_argument("--measured", type=int, default=100_000, help="tokens of each text")
    parser.add_argument("--only", action="append", help="names of rows, or how they begin")
    chosen = parser.parse_args(arguments)
    texts = chosen.text or [TESTS / "data" / "wikitext2_test.txt"]
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    dense = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    windows = [windows_of(read_text(text), tokenizer, 512, chosen.measured) for text in texts]
    print("| switched off | bits | " + "".join(f"KL, {text.stem} | " for text in texts) + "processor time |")
    print("|---|---:|" + "---:|" * (len(texts) + 1), flush=True)
    for name, (parts, solver, options) in SWITCHED_OFF.items():
        if chosen.only and not name.startswith(tuple(chosen.only)):
            continue
        with tempfile.TemporaryDirectory() as folder, replaced(parts):
            out, begin = Path(folder) / "out", time.process_time()
            data = Calibration(chosen.calibration, chosen.tokens, 512)
            report = convert(
                chosen.model, out, calibration=data, solver=SolverOptions(**solver), device="cpu", workers=1, **options
            )
            seconds = time.process_time() - begin
            model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
            with Checkpoint.open(out) as checkpoint:
                for module in checkpoint.modules:
                    model.get_submodule(module).weight.data = torch.from_numpy(checkpoint.matrix(module).dequantize())
        divergences = [evaluate(model, part, reference=dense).kl for part in windows]
        shown = "".join(f"{kl.mean:.4f} ± {kl.error:.4f} | " for kl in divergences if kl)
        print(f"| {name} | {report.bits:.3f} | {shown}{seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()

"""The kernels of two checkouts in turns, in one process: what a change gains, on a machine whose clock is never the same.

    git worktree add ../before HEAD~1
    PYTHONPATH=.:kernels python kernels/benchmarks/beside.py ../before [--shapes 70b 4096x4096] [--batches 1 32]
        [--shares 0 0.01] [--bits 3] [--statistics direct] [--group 128] [--bf16] [--rounds 2]

Both multiply with the same stored matrices, so their format must be the same. Prints times in us of each round, and the median
of theirs over the median of ours: above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from linear import GROUPS, SHAPES, WRONG, cold_count, relative_error, shapes_of
from random_weights import random_tensors
from timing import graph_microseconds
from torch import Tensor

import spqr_kernels
from spqr_format.layout import Layout
from spqr_kernels import reference
from spqr_kernels.joined import join

Clock = Callable[[list[Callable[[], object]]], float]
Bind = Callable[[Tensor, Layout], Callable[[Tensor], Tensor]]


def kernels_of(package: Path, name: str) -> Bind:
    """What makes a product of a stored matrix, all its tensors in one: kernels in the folder `package`, imported as `name`.
    Their `__init__` is not run: operators of torch can be defined once."""
    if not (package / "dispatch.py").is_file():
        raise SystemExit(f"{package}: no kernels here")
    for known in [known for known in sys.modules if known.split(".")[0] == name]:
        del sys.modules[known]
    module = types.ModuleType(name)
    module.__path__ = [str(package)]
    sys.modules[name] = module
    dispatch, joined = (importlib.import_module(f"{name}.{part}") for part in ("dispatch", "joined"))

    def bind(whole: Tensor, layout: Layout) -> Callable[[Tensor], Tensor]:
        tensors = joined.Joined(whole, layout)
        return lambda x: dispatch.linear(x, tensors, layout, None)

    return bind


def line(
    kinds: dict[str, Bind], layout: Layout, batch: int, share: float, rounds: int, clock: Clock, device: str,
    dtype: torch.dtype = torch.float16,
) -> str:  # fmt: skip
    """A line of the table: every round's time of each kind, and what the first takes of the second's time. dtype: of x."""
    tensors, layout = random_tensors(layout, share, 0, device)
    whole = join(tensors, layout)
    copies = [whole.clone() for _ in range(cold_count(whole.nbytes, device))]
    x = torch.randn(batch, layout.in_features, device=device).to(dtype)
    exact = reference.dequantize(tensors, layout).double()
    products = {name: [bind(copy, layout) for copy in copies] for name, bind in kinds.items()}
    for name, made in products.items():
        error = relative_error(made[0], x, exact)
        if error > WRONG:
            raise SystemExit(f"{name}: {layout.out_features} x {layout.in_features}, batch {batch}: error {error:.2g}")
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, made in products.items():
            times[name].append(clock([lambda product=product: product(x) for product in made]))  # type: ignore[misc]
    before, now = (statistics.median(found) for found in times.values())
    cells = [" / ".join(f"{us:.2f}" for us in found) for found in times.values()]
    shape = f"{layout.out_features} x {layout.in_features}"
    return f"| {shape} | {batch} | {100 * share:g} | {' | '.join(cells)} | {before / now:.3f} |"


def main(words: list[str] | None = None, clock: Clock = graph_microseconds, device: str = "cuda") -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--shapes", nargs="+", default=[f"{out}x{inn}" for out, inn in SHAPES], help="as linear.py takes them")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.01], help="of outliers")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3)
    parser.add_argument("--statistics", choices=tuple(GROUPS), default="bilevel")
    parser.add_argument("--group", type=int, help="columns of a group; 16 if bilevel, 128 if direct")
    parser.add_argument("--bf16", action="store_true", help="x in bf16")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args(words)
    dtype = torch.bfloat16 if asked.bf16 else torch.float16
    kinds = {
        "before": kernels_of(asked.other / "kernels" / "spqr_kernels", "spqr_kernels_before"),
        "now": kernels_of(Path(spqr_kernels.__path__[0]), "spqr_kernels_now"),
    }
    print("| out x in | batch | outliers % | before us | now us | before / now |\n|---|---:|---:|---:|---:|---:|")
    for shape in shapes_of(asked.shapes):
        for batch in asked.batches:
            for share in asked.shares:
                layout = Layout(*shape, asked.bits, asked.group or GROUPS[asked.statistics], asked.statistics)
                print(line(kinds, layout, batch, share, asked.rounds, clock, device, dtype), flush=True)


if __name__ == "__main__":
    main()

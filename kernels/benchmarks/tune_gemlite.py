"""Tune gemlite on this GPU for what linear.py measures, and keep the outcome in results/: afterwards its runs start at once.

    PYTHONPATH=.:kernels python kernels/benchmarks/tune_gemlite.py [--shapes ...] [--batches ...] [--processes 14]

gemlite has some twenty candidates for each shape and batch size and compiles them one after the other when first called.
Here processes compile them side by side, without timing; then one process times them, from Triton's cache, on an idle GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from linear import options
from peers import PEERS, Case, gemlite_config, gemlite_load

Job = tuple[tuple[int, int], int]


def _clock_all(clock: Callable[..., object]) -> None:
    """Let gemlite's autotuners time their candidates by `clock`."""
    from gemlite.core import GEMLITE_TRITON_KERNELS

    for kind in GEMLITE_TRITON_KERNELS:
        for kernel in kind.kernel:
            kernel.do_bench = clock


def _once(call: Callable[[], object], quantiles: object = None) -> list[float]:
    call()
    return [1.0, 1.0, 1.0]


def run(job: Job) -> str:
    """Call gemlite once, with the clock that is set; says how long that took, or what went wrong."""
    shape, batch = job
    start = time.monotonic()
    try:
        matrix = PEERS["gemlite"].make(Case(shape), "cuda")
        matrix.bind(matrix.tensors)(torch.randn(batch, shape[1], device="cuda").half())
        torch.cuda.synchronize()
    except Exception as error:
        return f"{shape[0]} x {shape[1]}, batch {batch}: {type(error).__name__}: {error}"[:300]
    return f"{shape[0]} x {shape[1]}, batch {batch}: {time.monotonic() - start:.1f} s"


def compile_only(job: Job, config: Path) -> str:
    """Let gemlite compile its candidates, each called once; what it then chooses is dropped."""
    gemlite_load("cuda", config)
    _clock_all(_once)
    return run(job)


def main() -> None:
    """Compile, time, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[])
    parser.add_argument("--batches", nargs="+", default=[])
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--config", type=Path, help="where to keep the outcome")
    asked = parser.parse_args()
    words = (["--shapes", *asked.shapes] if asked.shapes else []) + (["--batches", *asked.batches] if asked.batches else [])
    chosen = options(words)
    config = asked.config or gemlite_config("cuda")
    largest_first = sorted(((shape, batch) for shape in chosen.shapes for batch in chosen.batches), key=lambda job: -job[1])
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.processes, mp_context=context) as pool:
        for said in pool.map(partial(compile_only, config=config), largest_first):
            print("compiled", said, flush=True)
    print(f"{time.monotonic() - start:.0f} s", flush=True)

    import gemlite
    from triton.testing import do_bench

    gemlite_load("cuda", config)
    _clock_all(lambda call, quantiles: do_bench(call, warmup=5, rep=25, quantiles=quantiles))
    config.parent.mkdir(parents=True, exist_ok=True)
    for job in reversed(largest_first):
        print("timed", run(job), flush=True)
        gemlite.cache_config(str(config))
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - start:.0f} s, kept in {config}")


if __name__ == "__main__":
    main()

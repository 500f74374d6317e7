"""Conversions by one process and by several ranks (Gloo), undisturbed, stopped, killed and taken up.

Run by test_ranks.py as a process of its own, which imports torch once and forks for each rank:
    python rank_conversions.py LLAMA MOE GPTQ FOLDER CALIBRATION_TEXT
Prints JSON: run -> for each rank what came of it: "done", the code of an SpqrError, or the kind of another error. What the runs
wrote is in folders of their names.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert
from spqr_format.errors import SpqrError
from spqr_format.writer import CheckpointWriter


class Tokens:
    """The random models have no tokenizer."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 300 for sign in text]}


def main(llama: Path, moe: Path, gptq: Path, folder: Path, text: Path) -> dict[str, list[str]]:
    job.load_tokenizer = lambda _: Tokens()
    # Ten windows in eight shards: two shards of two batches, six of one.
    data = Calibration(text, tokens=640, seqlen=64, batch=1)
    calibrated = {"calibration": data, "solver": SolverOptions(rounds=1, sweeps=0), "max_shard_bytes": 20_000}
    free = {"solver": SolverOptions(rounds=1, sweeps=0)}
    lossless = {"lossless": True, "max_shard_bytes": 6_000}
    results: dict[str, list[str]] = {}

    def run(name: str, size: int, source: Path, *, into: str | None = None, disturb: Any = None, **options: Any) -> None:
        """`size` ranks convert into the folder `into`; disturb(rank) is called in each of them before."""
        children = []
        if size == 1:  # here, so that what is imported on the way is imported once
            _rank(name, 0, 1, source, folder / (into or name), disturb, options)
            results[name] = [(folder / f"{name}.0.txt").read_text()]
            return
        for rank in range(size):
            child = os.fork()
            if child == 0:
                os._exit(_rank(name, rank, size, source, folder / (into or name), disturb, options))
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        said = [folder / f"{name}.{rank}.txt" for rank in range(size)]
        results[name] = [path.read_text() if path.exists() else "killed" for path in said]

    def _rank(name: str, rank: int, size: int, source: Path, target: Path, disturb: Any, options: dict[str, Any]) -> int:
        outcome = "done"
        try:
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=size)
            if disturb is not None:
                options = {**options, **(disturb(rank) or {})}
            convert(source, target, device="cpu", workers=2, **options)
        except SpqrError as error:
            outcome = str(error)
        except BaseException as error:
            outcome = type(error).__name__
            print(name, rank, repr(error), file=sys.stderr, flush=True)
        (folder / f"{name}.{rank}.txt").write_text(outcome)
        return 0

    for size in (1, 2, 3, 4):
        run(f"calibrated-{size}", size, llama, **calibrated)
    for size in (1, 2, 3):
        run(f"lossless-{size}", size, gptq, **lossless)
    for size in (1, 2):
        run(f"experts-{size}", size, moe, **calibrated)
        run(f"data-free-{size}", size, llama, **free)
        run(f"budget-{size}", size, llama, **calibrated, bits_per_weight=3.9, keep=["*.mlp.*", "*.[kvo]_proj"])

    def broken_weight(rank: int) -> None:
        def fail(weight: Any, options: Any, name: str) -> None:
            raise SpqrError("E502", name, "of rank 1")

        if rank == 1:
            job.datafree.solve = fail

    def broken_input(rank: int) -> None:
        def fail(self: Any, *_: Any) -> None:
            raise SpqrError("E503", "activation", f"of rank {rank}")

        if rank:
            job.Accumulator.add = fail

    def full_disk(rank: int) -> None:
        real, count = CheckpointWriter.add, 0

        def add(self: CheckpointWriter, packed: Any, note: Any = None) -> None:
            nonlocal count
            count += 1
            if count > 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, packed, note)

        CheckpointWriter.add = add  # type: ignore[method-assign]

    def killed(rank: int) -> None:
        real = job.calibrated.SharedInput.solve

        def solve(self: Any, weight: Any, options: Any, name: str) -> Any:
            if ".1." in name:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, weight, options, name)

        if rank == 1:
            job.calibrated.SharedInput.solve = solve

    run("broken-weight", 2, llama, disturb=broken_weight, **free)
    run("broken-input", 3, llama, disturb=broken_input, **calibrated)
    run("other-seed", 2, llama, disturb=lambda rank: {"seed": rank}, **calibrated)
    run("full-disk", 2, llama, disturb=full_disk, **calibrated)
    run("full-disk-resumed", 3, llama, into="full-disk", **calibrated)
    run("full-disk-lossless", 3, gptq, disturb=full_disk, **lossless)
    run("full-disk-lossless-resumed", 2, gptq, into="full-disk-lossless", **lossless)
    run("killed", 2, llama, disturb=killed, **calibrated)
    run("killed-resumed", 1, llama, into="killed", **calibrated)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*map(Path, sys.argv[1:6]))))

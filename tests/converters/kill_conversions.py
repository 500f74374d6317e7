"""Kills conversions at random moments and takes them up again, until enough kills landed in the middle of one.

Run by test_resume.py as a process of its own, which imports torch once and forks for each run:
    python kill_conversions.py SOURCE FOLDER METHOD KILLS CALIBRATION_TEXT
Prints JSON: kills (of them mid_run: while the journal was there) and wrong, the runs whose files are not those of an
unbroken one, with what differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert
from spqr_format.journal import JOURNAL
from spqr_format.validate import validate


class Tokens:
    """The random models have no tokenizer."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 300 for sign in text]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def fork(run: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def kill_after(child: int, folder: Path, delay: float) -> tuple[bool, bool]:
    """Kills a run some time after its journal appeared. Whether it was killed, and whether in the middle."""
    while not (folder / JOURNAL).exists():
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False, False
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("a run failed")
    return os.WIFSIGNALED(status), (folder / JOURNAL).exists()


def main(source: Path, folder: Path, method: str, wanted: int, text: Path) -> dict:
    job.load_tokenizer = lambda _: Tokens()
    options = {
        "lossless": {"lossless": True},
        "data-free": {"outlier_share": 0.01, "solver": SolverOptions(rounds=1, sweeps=0)},
        "calibrated": {"calibration": Calibration(text, tokens=256, seqlen=64), "solver": SolverOptions(rounds=1, sweeps=0)},
    }[method]

    def run(target: Path) -> None:
        convert(source, target, max_shard_bytes=3_000, workers=2, device="cpu", **options)

    run(folder / "whole")
    started = time.monotonic()
    whole = contents(folder / "whole")
    os.waitpid(fork(lambda: run(folder / "timed")), 0)
    length = time.monotonic() - started
    moments, kills, mid_run, round_ = random.Random(1), 0, 0, 0
    wrong: list[str] = []
    if contents(folder / "timed") != whole:
        wrong.append("two unbroken runs differ")
    while mid_run < wanted:
        target = folder / f"run{round_}"
        round_ += 1
        while True:
            killed, middle = kill_after(fork(lambda target=target: run(target)), target, moments.random() * length / 2)
            kills, mid_run = kills + killed, mid_run + middle
            found = contents(target)
            final = {name: raw for name, raw in found.items() if not name.endswith(".spqr-partial")}
            if not final.items() <= whole.items() or (target.exists() and validate(target).ok != (final == whole)):
                wrong.append(f"{target.name}: half of a checkpoint: {sorted(final)}")
            if not killed or final == whole:
                break
        if not middle and found != whole:
            names = sorted({*found, *whole})
            wrong.append(f"{target.name}: " + ", ".join(name for name in names if found.get(name) != whole.get(name)))
    return {
        "kills": kills,
        "mid_run": mid_run,
        "rounds": round_,
        "shards": sum("model-" in name for name in whole),
        "wrong": wrong,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))))

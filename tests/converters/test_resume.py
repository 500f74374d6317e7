"""Interrupted conversions: killed and taken up, refused when anything changed, the same bytes for any number of workers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, calibrated, convert, parallel
from spqr_converters.forward import Stream
from spqr_format.cli import main
from spqr_format.errors import SpqrError
from spqr_format.journal import JOURNAL
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

ROOT = Path(__file__).parents[2]
QUICK = SolverOptions(rounds=1, sweeps=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Tokens:
    """The random models have no tokenizer."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 300 for sign in text]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of a process")
@pytest.mark.parametrize(("method", "kills"), [("data-free", 14), ("lossless", 14), ("calibrated", 14)])
def test_kill_9_at_random_moments(random_llama, gptq_llama, tmp_path, calibration_text, method, kills) -> None:
    """SIGKILL again and again until a run gets through: the bytes of an unbroken run, and never half of a checkpoint that a
    reader takes for a whole one. (That a writer without a journal fails: tests/format/test_journal.py.)"""
    source = gptq_llama(layers=3) if method == "lossless" else random_llama(layers=3)
    (tmp_path / "runs").mkdir()
    script = Path(__file__).with_name("kill_conversions.py")
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "runs"), method, str(kills), str(calibration_text)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["mid_run"] >= kills
    assert result["mid_run"] >= 0.8 * result["kills"]
    assert result["shards"] >= 12


@pytest.fixture
def stopped(monkeypatch) -> Callable[..., None]:
    """Runs a conversion until the disk is full after some modules: stopped(source, destination, after=5, **options)."""

    def stop(source: Path, destination: Path, after: int = 5, **options) -> None:
        real, count = CheckpointWriter.add, 0

        def add(self, packed, note=None):
            nonlocal count
            count += 1
            if count > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, packed, note)

        with monkeypatch.context() as patched:
            patched.setattr(CheckpointWriter, "add", add)
            with pytest.raises(OSError, match="No space left"):
                convert(source, destination, **options)

    return stop


def added(monkeypatch) -> list[str]:
    """The modules that writers pack from here on."""
    names: list[str] = []
    real = CheckpointWriter.pack

    def pack(self, module, matrix, bias=None):
        names.append(module)
        return real(self, module, matrix, bias)

    monkeypatch.setattr(CheckpointWriter, "pack", pack)
    return names


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_is_not_done_again(random_llama, tmp_path, monkeypatch, stopped, workers) -> None:
    source = random_llama()
    whole = convert(source, tmp_path / "whole", solver=QUICK)
    stopped(source, tmp_path / "out", solver=QUICK, workers=workers)
    names, steps = added(monkeypatch), []
    report = convert(source, tmp_path / "out", solver=QUICK, workers=workers, progress=lambda *step: steps.append(step))
    assert len(names) == 14 - 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.modules == whole.modules
    assert report.dense == whole.dense
    assert len(steps) == 14
    assert steps[-1][1] == steps[-1][2] == report.quantised_parameters


def test_calibrated_blocks_are_not_solved_again(random_llama, tmp_path, monkeypatch, stopped, calibration_text) -> None:
    """Stopped in the first block, the third, and the last of four: what is solved anew are the matrices of the blocks that were
    not finished. The outputs of finished blocks are computed anew, once for each stream."""
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    data = Calibration(calibration_text, tokens=512, seqlen=64)
    options = {"calibration": data, "solver": QUICK, "device": "cpu"}
    source = random_llama(layers=4)
    convert(source, tmp_path / "whole", **options)
    solved: list[str] = []
    advanced: list[int] = []
    solve, advance = calibrated.solve_and_decode, Stream.advance
    for after, blocks in ((3, 4), (17, 2), (26, 1)):
        out = tmp_path / f"out{after}"
        stopped(source, out, after=after, **options)
        with monkeypatch.context() as patched:
            patched.setattr(calibrated, "solve_and_decode", lambda *given: [solved.append(given[3]), solve(*given)][1])
            patched.setattr(Stream, "advance", lambda self, block, index: [advanced.append(index), advance(self, block, index)])
            convert(source, out, **options)
        assert contents(out) == contents(tmp_path / "whole")
        assert len(solved) == len(set(solved)) == 7 * blocks
        assert all(f".{number}." in " ".join(solved) for number in range(4 - blocks, 4))
        assert advanced == [0, 0, 1, 1, 2, 2]
        solved.clear()
        advanced.clear()


def test_notes_of_the_source_are_those_of_an_unbroken_run(gptq_llama, tmp_path, stopped) -> None:
    """Ambiguous zeros are counted in the modules that the interrupted run converted, too."""
    source = gptq_llama(layers=2)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name][0, 0] = -1
    save_file(tensors, source / "model.safetensors")
    report = convert(source, tmp_path / "whole", lossless=True)
    assert any("in 14 modules are stored as 2**bits - 1" in note for note in report.notes)
    stopped(source, tmp_path / "out", lossless=True)
    assert convert(source, tmp_path / "out", lossless=True).notes == report.notes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _touch_weight(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def _change_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))


CHANGES: dict[str, tuple[dict, Callable[[Path], object] | None]] = {
    "provenance.source_sha256.model.safetensors": ({}, _touch_weight),
    "source_config_sha256": ({}, _change_config),
    "files_beside_sha256.tokenizer.json": ({}, lambda source: (source / "tokenizer.json").write_text("{ }")),
    "files_beside_sha256.LICENSE": ({}, lambda source: (source / "LICENSE").write_text("x")),
    "provenance.solver.weight_bits": ({"weight_bits": 4}, None),
    "provenance.solver.group_size": ({"group_size": 32}, None),
    "provenance.solver.statistics": ({"statistics": "direct"}, None),
    "provenance.solver.outlier_share": ({"outlier_share": 0.01}, None),
    "provenance.solver.outlier_threshold": ({"outlier_threshold": 0.5}, None),
    "provenance.solver.rounds": ({"solver": SolverOptions(rounds=2, sweeps=0)}, None),
    "provenance.seed": ({"seed": 1}, None),
    "max_shard_bytes": ({"max_shard_bytes": 10_000}, None),
    "provenance.calibration": ({"calibration": 8}, None),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_is_refused(random_llama, tmp_path, monkeypatch, stopped, calibration_text, key) -> None:
    options, change = CHANGES[key]
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    source = random_llama()
    (source / "tokenizer.json").write_text("{}")
    stopped(source, tmp_path / "out", solver=QUICK)
    left = contents(tmp_path / "out")
    if change is not None:
        change(source)
    if "calibration" in options:
        options = {"calibration": Calibration(calibration_text, tokens=256, seqlen=64, batch=options["calibration"])}
    with pytest.raises(SpqrError) as caught:
        convert(source, tmp_path / "out", **{"solver": QUICK, **options})
    assert caught.value.code == "E511"
    assert f" {key}" in caught.value.what
    assert "--restart" in caught.value.what
    assert contents(tmp_path / "out") == left
    convert(source, tmp_path / "out", **{"solver": QUICK, **options}, restart=True)
    assert validate(tmp_path / "out", deep=True).ok


def test_another_batch_is_refused(random_llama, tmp_path, monkeypatch, stopped, calibration_text) -> None:
    """It changes the order of sums, and so the last bit of a Hessian."""
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    options = [{"calibration": Calibration(calibration_text, tokens=256, seqlen=64, batch=batch)} for batch in (1, 2)]
    source = random_llama(layers=1)
    stopped(source, tmp_path / "out", solver=QUICK, **options[0])
    with pytest.raises(SpqrError, match=r"SPQR-E511 .*provenance.calibration.batch = 1, asked for is 2"):
        convert(source, tmp_path / "out", solver=QUICK, **options[1])


def test_another_version_is_refused(random_llama, tmp_path, monkeypatch, stopped) -> None:
    source = random_llama()
    stopped(source, tmp_path / "out", solver=QUICK)
    monkeypatch.setattr(job, "version", lambda package: "99")
    with pytest.raises(SpqrError, match=r"SPQR-E511 .*provenance.versions.spqr-format = .* asked for is '99'"):
        convert(source, tmp_path / "out", solver=QUICK)


def test_the_number_of_workers_changes_no_byte(random_llama, gptq_llama, tmp_path) -> None:
    """Nor does the number of threads that torch would use by itself."""
    import torch

    dense, coded = random_llama(hidden=96, mlp=160), gptq_llama(hidden=96, act=True)
    for source, options in ((dense, {"outlier_share": 0.01, "solver": QUICK}), (coded, {"lossless": True})):
        found = []
        for workers, threads in ((1, 1), (1, 2), (2, 1), (5, 2)):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            out = tmp_path / f"{source.name}-{workers}-{threads}"
            report = convert(source, out, workers=workers, **options)
            assert torch.get_num_threads() == threads
            torch.set_num_threads(before)
            found.append((contents(out), report.modules))
        assert found.count(found[0]) == 4
    with pytest.raises(SpqrError, match="SPQR-E505 workers"):
        convert(dense, tmp_path / "never", workers=0)


def test_workers_are_bounded_and_keep_the_order() -> None:
    """No more tasks are begun than workers, counting those whose results nobody took yet."""
    begun: list[int] = []
    lock = threading.Lock()

    def task(number: int) -> int:
        with lock:
            begun.append(number)
        return number

    results = parallel.in_order((lambda n=n: task(n) for n in range(20)), 3)
    assert next(results) == 0
    assert len(begun) <= 4
    assert list(results) == list(range(1, 20))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SpqrError("E502", "x", "stop")])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_ends_all_workers(error, workers) -> None:
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 4:
            raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        list(parallel.in_order((lambda n=n: task(n) for n in range(100)), workers))
    assert len(begun) <= 4 + workers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spqr-worker")]


def test_the_command_says_how_to_go_on(random_llama, tmp_path, monkeypatch) -> None:
    """Ctrl-C: nothing that loads, the same command finishes; --restart begins anew; two at once are refused."""
    source, out = random_llama(), tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--device", "cpu"]
    real, count = CheckpointWriter.add, 0

    def add(self, packed, note=None):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        if count == 6:
            again = CliRunner().invoke(main, arguments)
            assert again.exit_code == 1
            assert "SPQR-E512" in again.output
        real(self, packed, note)

    monkeypatch.setattr(CheckpointWriter, "add", add)
    interrupted = CliRunner().invoke(main, arguments)
    assert interrupted.exit_code == 1
    assert "the same command goes on" in interrupted.output
    assert (out / JOURNAL).exists()
    assert not validate(out).ok
    refused = CliRunner().invoke(main, [*arguments, "--weight-bits", "4"])
    assert refused.exit_code == 1
    assert "SPQR-E511" in refused.output
    assert CliRunner().invoke(main, [*arguments, "--workers", "2"]).exit_code == 0
    assert count == 3 + 1 + 11
    assert validate(out, deep=True).ok
    finished = CliRunner().invoke(main, arguments)
    assert "SPQR-E506" in finished.output

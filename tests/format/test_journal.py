"""A writer that is killed at any moment and taken up: the bytes of an unbroken run, and never a folder that looks complete."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spqr_format import SpqrError
from spqr_format.header import read_header
from spqr_format.journal import JOURNAL
from spqr_format.layout import Layout, TensorSpec
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

SETTINGS = {"weight_bits": 3, "group_size": 16, "statistics": "bilevel"}
CALLS = ("open", "write", "pwrite", "fsync", "rename", "unlink", "truncate")
EXTRA = {"tokenizer.json": b"{}" * 40}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")


@pytest.fixture(scope="module")
def matrices(random_matrix):
    return {f"layers.{k}.up": random_matrix(32, 64, outliers=0.05, seed=k) for k in range(5)}


@pytest.fixture(params=["copied", "laid out"])
def coming(request, matrices) -> list[tuple[str, Layout | TensorSpec]]:
    """What a writer is told to expect: nothing, so that it copies its spools, or all that comes."""
    return everything(matrices) if request.param == "laid out" else []


def everything(matrices) -> list[tuple[str, Layout | TensorSpec]]:
    return [*((module, matrix.layout) for module, matrix in matrices.items()), ("norm.weight", TensorSpec("F32", (64,)))]


def wrong_expectations(matrices) -> dict[str, list[tuple[str, Layout | TensorSpec]]]:
    right = everything(matrices)
    return {
        "all but the first": right[1:],  # the second would lie where the first does
        "every second": right[::2],
        "more than comes": [*right[:4], ("more", TensorSpec("U8", (8,))), *right[4:]],
        "another order": right[::-1],
        "fewer outliers": [(module, matrices[module].layout.with_outliers(7)) for module in matrices] + right[-1:],
        "another dtype": [*right[:-1], ("norm.weight", TensorSpec("F16", (128,)))],  # as many bytes elsewhere
    }


def write(folder: Path, matrices, coming=(), max_shard_bytes: int = 3000, identity: object = 1, **options) -> list[str]:
    """Five modules and a dense tensor in three shards. Returns what this run added itself."""
    added = []
    with CheckpointWriter(folder, max_shard_bytes=max_shard_bytes, config={"model_type": "llama"},
                          quantization_config=SETTINGS, resume={"job": identity}, **options) as writer:  # fmt: skip
        writer.expect(coming)
        for module, matrix in matrices.items():
            if module not in writer.notes:
                writer.add_matrix(module, matrix, note={"bits": 0.1})
                added.append(module)
            assert writer.notes[module] == {"bits": 0.1}
            np.testing.assert_array_equal(writer.read_matrix(module).codes, matrix.codes)
        if "norm.weight" not in writer.notes:
            writer.add_dense("norm.weight", np.ones(64, np.float32))
            added.append("norm.weight")
        writer.finish(EXTRA)
    return added


def naive(folder: Path, matrices) -> None:
    """What a writer without a journal tends to do: in place, and what exists is done."""
    folder.mkdir(exist_ok=True)
    for number, (module, matrix) in enumerate(matrices.items()):
        path = folder / f"model-{number}.safetensors"
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            for leaf, tensor in matrix.pack().items():
                os.write(descriptor, f"{module}.{leaf}".encode())
                os.write(descriptor, tensor.tobytes())
            os.close(descriptor)
    os.close(os.open(folder / "config.json", os.O_WRONLY | os.O_CREAT))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def killed(run: Callable[[], object], moment: int) -> bool:
    """Runs in a copy of this process that is killed by SIGKILL at its system call number `moment`: in the middle of it,
    where it writes. False when it ended before."""
    child = os.fork()
    if child == 0:
        try:
            _kill_at(moment)
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_at(moment: int) -> None:
    count = 0

    def patched(name: str):
        real = getattr(os, name)

        def call(first, *rest, **options):
            nonlocal count
            count += 1
            if count == moment:
                if "write" in name and len(rest[0]) > 1:
                    real(first, bytes(rest[0])[: len(rest[0]) // 2], *rest[1:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(first, *rest, **options)

        return call

    for name in CALLS:
        setattr(os, name, patched(name))


@needs_fork
def test_killed_at_every_call(tmp_path, matrices, coming):
    write(tmp_path / "whole", matrices)
    whole = contents(tmp_path / "whole")
    assert validate(tmp_path / "whole", deep=True).ok
    assert len(whole) == 3 + len(("index", "tokenizer", "config"))
    kills = 0
    for moment in range(1, 500):
        folder = tmp_path / f"run{moment}"
        if not killed(lambda folder=folder: write(folder, matrices, coming), moment):
            break
        kills += 1
        found = contents(folder)
        final = {name: raw for name, raw in found.items() if not name.endswith(".spqr-partial")}
        assert final.items() <= whole.items(), "a final name holds what an unbroken run writes, or nothing"
        assert not folder.exists() or validate(folder).ok == (final == whole)
        if found == whole:  # killed after the journal was gone: a checkpoint, which is not written over
            continue
        write(folder, matrices, coming)
        assert contents(folder) == whole, f"killed at call {moment}"
    assert 50 <= kills < 499


@needs_fork
def test_killed_again_and_again(tmp_path, matrices):
    """Runs that are killed at random calls until one gets through, each told to expect something else."""
    told = [everything(matrices), [], *wrong_expectations(matrices).values()]
    write(tmp_path / "whole", matrices)
    whole, source, kills = contents(tmp_path / "whole"), random.Random(1), 0
    for round_ in range(12):
        folder = tmp_path / f"run{round_}"
        while contents(folder) != whole and killed(
            lambda folder=folder: write(folder, matrices, source.choice(told)), source.randint(4, 60)
        ):
            kills += 1
            assert not (folder / "config.json").exists() or validate(folder).ok
        assert contents(folder) == whole
    assert kills >= 40


@needs_fork
def test_the_naive_writer_fails_the_same_test(tmp_path, matrices):
    naive(tmp_path / "whole", matrices)
    whole, kills, wrong = contents(tmp_path / "whole"), 0, 0
    for moment in range(1, 500):
        folder = tmp_path / f"run{moment}"
        if not killed(lambda folder=folder: naive(folder, matrices), moment):
            break
        kills += 1
        naive(folder, matrices)
        wrong += contents(folder) != whole
    assert kills > 30
    assert wrong > 0.5 * kills


@needs_fork
def test_what_is_done_is_not_done_again(tmp_path, matrices, coming):
    left = []
    for moment in (4, 22, 36, 72) if coming else (4, 30, 50, 100):
        folder = tmp_path / f"run{moment}"
        assert killed(lambda folder=folder: write(folder, matrices, coming), moment)
        left.append(len(write(folder, matrices, coming)))
    assert left[0] == 6
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == 4


@pytest.mark.parametrize("lost", ["end of the spool", "middle of the spool", "all of the spool", "half a line", "zeros"])
def test_what_a_power_cut_lost_is_found(tmp_path, matrices, coming, lost):
    """Bytes that never reached the disk are cut off with everything after them, and made again."""
    write(tmp_path / "whole", matrices)
    folder = tmp_path / "x"
    stop(folder, matrices, after=2, coming=coming)
    spool, journal = folder / "spool-00001.spqr-partial", folder / JOURNAL
    raw = spool.read_bytes()
    if lost == "end of the spool":
        spool.write_bytes(raw[:-5])
    elif lost == "middle of the spool":
        first = len(raw) - len(raw.lstrip(b"\0"))  # before it there may be room for the header
        spool.write_bytes(raw[:first] + b"\0" + raw[first + 1 :])
    elif lost == "all of the spool":
        spool.unlink()
    elif lost == "half a line":
        journal.write_bytes(journal.read_bytes()[:-7])
    else:
        journal.write_bytes(journal.read_bytes() + b"\0" * 100)
    again = {"end of the spool": 5, "middle of the spool": 6, "all of the spool": 6, "half a line": 5, "zeros": 4}[lost]
    assert len(write(folder, matrices, coming)) == again
    assert contents(folder) == contents(tmp_path / "whole")


def begin(folder: Path, matrices, after: int, error: Exception, coming=(), **options) -> None:
    """A run that ends with an error after some modules."""
    with CheckpointWriter(folder, config={"model_type": "llama"}, quantization_config=SETTINGS, **options) as writer:
        writer.expect(coming)
        for module in list(matrices)[:after]:
            writer.add_matrix(module, matrices[module], note={"bits": 0.1})
        raise error


def stop(folder: Path, matrices, after: int, coming=()) -> None:
    """The disk is full before the first shard is."""
    with pytest.raises(OSError, match="full"):
        begin(folder, matrices, after, OSError(errno.ENOSPC, "full"), coming, max_shard_bytes=3000, resume={"job": 1})


def test_another_identity_is_refused(tmp_path, matrices):
    stop(tmp_path, matrices, after=2)
    before = contents(tmp_path)
    with pytest.raises(SpqrError, match=r"SPQR-E511 .*job = 1, asked for is 2"):
        write(tmp_path, matrices, identity=2)
    assert contents(tmp_path) == before
    nested = {"solver": {"seed": 2, "bits": 3}}
    with pytest.raises(OSError, match="full"):
        begin(tmp_path, matrices, 1, OSError(errno.ENOSPC, "full"), resume={"job": nested}, restart=True)
    with pytest.raises(SpqrError, match=r"SPQR-E511 .*job.solver.seed = 2, asked for is 3"):
        write(tmp_path, matrices, identity={"solver": {"seed": 3, "bits": 3}})
    write(tmp_path, matrices, identity=2, restart=True)
    assert validate(tmp_path).ok


@pytest.mark.parametrize("damage", [b"[]\n", b"{}\n", b'{"identity":{"job":1}}\n{"tensors":[1]}\n',
                                    b'{"identity":{"job":1}}\n{"shard":1,"bytes":9}\n',
                                    b'{"identity":{"job":1}}\n{"shard":"x"}\n'])  # fmt: skip
def test_a_damaged_journal_is_refused_or_begun_anew(tmp_path, matrices, damage):
    tmp_path.joinpath(JOURNAL).write_bytes(damage)
    if damage == b"[]\n":  # no line of ours: as if there were none
        write(tmp_path, matrices)
    else:
        with pytest.raises(SpqrError, match="SPQR-E511"):
            write(tmp_path, matrices)
        write(tmp_path, matrices, restart=True)
    assert validate(tmp_path).ok


def test_two_writers_in_one_folder(tmp_path, matrices):
    first = CheckpointWriter(tmp_path, config={}, resume={"job": 1})
    for options in ({"resume": {"job": 1}}, {"resume": {"job": 1}, "restart": True}, {}):
        with pytest.raises(SpqrError, match="SPQR-E512"):
            CheckpointWriter(tmp_path, config={}, **options)
    first.add_matrix("a", matrices["layers.0.up"])
    first.finish()
    with pytest.raises(SpqrError, match="SPQR-E506"):
        CheckpointWriter(tmp_path, config={}, resume={"job": 1})
    assert Checkpoint.open(tmp_path).modules.keys() == {"a"}


def test_a_plain_writer_clears_what_a_journaled_one_left_but_no_checkpoint(tmp_path, matrices, monkeypatch):
    stop(tmp_path / "x", matrices, after=2)
    with CheckpointWriter(tmp_path / "x", config={}) as writer:
        writer.add_matrix("a", matrices["layers.0.up"])
        writer.finish()
    assert contents(tmp_path / "x").keys() == {"config.json", "model.safetensors"}
    whole = contents(tmp_path / "x")
    (tmp_path / "x" / JOURNAL).write_bytes(b'{"identity":{}}\n{"finishing":["config.json","model.safetensors"]}\n')
    with pytest.raises(SpqrError, match="SPQR-E506"):
        CheckpointWriter(tmp_path / "x", config={})
    assert contents(tmp_path / "x").items() >= whole.items()


@pytest.mark.parametrize(("call", "number"), [("write", errno.ENOSPC), ("pwrite", errno.EIO), ("fsync", errno.EIO),
                                              ("rename", errno.EIO), ("truncate", errno.EIO)])  # fmt: skip
def test_a_failing_disk_leaves_no_final_name_and_the_next_run_goes_on(tmp_path, matrices, coming, monkeypatch, call, number):
    """The k-th call fails, for every k."""
    write(tmp_path / "whole", matrices)
    whole, real = contents(tmp_path / "whole"), getattr(os, call)
    for k in range(200):
        count = 0

        def failing(first, *rest, k=k, **options):
            nonlocal count
            count += 1
            if count == k + 1:
                raise OSError(number, os.strerror(number))
            return real(first, *rest, **options)

        folder = tmp_path / f"run{k}"
        monkeypatch.setattr(os, call, failing)
        with contextlib.suppress(OSError):
            write(folder, matrices, coming)
        monkeypatch.setattr(os, call, real)
        if count <= k:
            break
        left = [name for name in contents(folder) if not name.endswith(".spqr-partial")]
        assert left == [] or contents(folder).items() >= whole.items()
        write(folder, matrices, coming)
        assert contents(folder) == whole
    assert (k >= 5) == (call != "truncate")


def test_a_broken_rule_leaves_nothing(tmp_path, matrices):
    with pytest.raises(SpqrError, match="E502"):
        begin(tmp_path, matrices, 5, SpqrError("E502", "x", "stop"), max_shard_bytes=1, resume={})
    assert contents(tmp_path) == {}


def test_the_journal_changes_no_byte(tmp_path, matrices, coming):
    """A checkpoint from a writer with a journal is that of one without."""
    write(tmp_path / "a", matrices, coming)
    with CheckpointWriter(tmp_path / "b", max_shard_bytes=3000, config={"model_type": "llama"},
                          quantization_config=SETTINGS) as writer:  # fmt: skip
        for module, matrix in matrices.items():
            writer.add_matrix(module, matrix)
        writer.add_dense("norm.weight", np.ones(64, np.float32))
        writer.finish(EXTRA)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_wrong_expectations_change_no_byte(tmp_path, matrices):
    write(tmp_path / "whole", matrices)
    for name, coming in wrong_expectations(matrices).items():
        write(tmp_path / name, matrices, coming)
        assert contents(tmp_path / name) == contents(tmp_path / "whole"), name


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_what_comes_as_expected_is_written_once(tmp_path, matrices, monkeypatch):
    """Bytes that are written to spools and shards. Where a module comes otherwise than expected, its shard alone is copied."""
    written: dict[str, int] = {}

    def count(name: str, call: str) -> None:
        real = getattr(os, call)

        def counted(descriptor, *rest):
            done = real(descriptor, *rest)
            if re.match(r"(model|spool)-\d{5}\.", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name):
                written[name] += done
            return done

        monkeypatch.setattr(os, call, counted)

    wrong = [
        (module, layout.with_outliers(7) if module == "layers.2.up" else layout) for module, layout in everything(matrices)
    ]
    for name, coming in (("all", everything(matrices)), ("nothing", []), ("wrong", wrong)):
        written[name] = 0
        count(name, "write")
        count(name, "pwrite")
        write(tmp_path / name, matrices, coming)
        monkeypatch.undo()
        assert contents(tmp_path / name) == contents(tmp_path / "all")
    shards = [read_header(path) for path in sorted((tmp_path / "all").glob("model-*.safetensors"))]
    data = [sum(tensor.nbytes for tensor in shard.tensors.values()) for shard in shards]
    whole = sum(shard.data_start for shard in shards) + sum(data)
    assert len(data) == 3
    assert written == {"all": whole, "nothing": whole + sum(data), "wrong": whole + data[1]}

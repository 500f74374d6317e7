"""The writer: what stands on disk, in which order it got there, and what is left when the disk fails."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spqr_format import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
SETTINGS = {"weight_bits": 3, "group_size": 16, "statistics": "bilevel", "provenance": {"seed": 1}}


@pytest.fixture(scope="module")
def matrices(random_matrix):
    return {f"layers.{k}.up": random_matrix(32, 64, outliers=0.05, seed=k) for k in range(4)}


def write(folder: Path, matrices, max_shard_bytes: int = 1500, **options) -> None:
    writer = CheckpointWriter(folder, max_shard_bytes=max_shard_bytes, config={"model_type": "llama"},
                              quantization_config=SETTINGS, **options)  # fmt: skip
    for module, matrix in matrices.items():
        writer.add_matrix(module, matrix)
    writer.add_dense("norm.weight", np.ones(64, np.float32))
    writer.finish({"tokenizer.json": b"{}"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(10**9, 1), (1500, 5), (1, 5)])
def test_what_is_written_is_read(tmp_path, matrices, max_shard_bytes, shards):
    write(tmp_path / "x", matrices, max_shard_bytes)
    report = validate(tmp_path / "x", deep=True)
    assert report.ok, report.findings
    assert (report.modules, report.hashes) == (4, "checked")
    with Checkpoint.open(tmp_path / "x") as checkpoint:
        assert len(checkpoint.headers) == shards
        assert checkpoint.dense == ["norm.weight"]
        assert checkpoint.config["model_type"] == "llama"
        section = checkpoint.config["quantization_config"]
        assert section == {
            **SETTINGS,
            "quant_method": "spqr_format",
            "format_version": "1.0",
            "features": ["bilevel", "outliers"],
        }
        for module, matrix in matrices.items():
            assert np.array_equal(checkpoint.matrix(module).dequantize(), matrix.dequantize())
            assert checkpoint.stored_bytes(module) == matrix.layout.stored_bytes()
    for path in checkpoint.headers:
        assert load_file(path)
        assert checkpoint.headers[path].data_start % 8 == 0
    assert (shards == 1) == (tmp_path / "x" / "model.safetensors").exists()


def test_same_calls_same_bytes(tmp_path, matrices):
    write(tmp_path / "a", matrices)
    write(tmp_path / "b", matrices)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_memory_holds_one_shard(tmp_path, matrices):
    with CheckpointWriter(tmp_path, max_shard_bytes=1500, config={}) as writer:
        for module, matrix in matrices.items():
            writer.add_matrix(module, matrix)
            assert len(writer._open_modules) == 1
        writer.finish()


def record_calls(monkeypatch) -> list[tuple[str, str]]:
    """Every os call that decides what survives a power cut, with the file's name."""
    calls: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "close")}

    def opened(path, *rest, **options):
        descriptor = real["open"](path, *rest, **options)
        names[descriptor] = Path(path).name
        return descriptor

    def written(descriptor, data):
        if calls[-1:] != [("write", names[descriptor])]:
            calls.append(("write", names[descriptor]))
        return real["write"](descriptor, data)

    def synced(descriptor):
        calls.append(("fsync", names[descriptor]))
        real["fsync"](descriptor)

    def renamed(source, target):
        calls.append(("rename", f"{Path(source).name} {Path(target).name}"))
        real["rename"](source, target)

    for name, replacement in {"open": opened, "write": written, "fsync": synced, "rename": renamed}.items():
        monkeypatch.setattr(os, name, replacement)
    return calls


def test_order_of_calls(tmp_path, matrices, monkeypatch):
    folder = tmp_path / "x"
    calls = record_calls(monkeypatch)
    two = dict(list(matrices.items())[:2])
    write(folder, two)
    monkeypatch.undo()
    expected = []
    for k in (1, 2, 3):
        expected += [("write", f"model-0000{k}.safetensors.spqr-partial"), ("fsync", f"model-0000{k}.safetensors.spqr-partial")]
    for k in (1, 2, 3):
        expected += [("rename", f"model-0000{k}.safetensors.spqr-partial model-0000{k}-of-00003.safetensors")]
    expected += [("fsync", "x")]
    for name in ("model.safetensors.index.json", "tokenizer.json", "config.json"):
        part = f"{name}.spqr-partial"
        expected += [("write", part), ("fsync", part), ("rename", f"{part} {name}"), ("fsync", "x")]
    assert calls == expected


FAILURES = [("write", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EIO), ("open", errno.ENOSPC)]


@pytest.mark.parametrize(("call", "number"), FAILURES)
def test_a_failing_disk_leaves_nothing(tmp_path, matrices, monkeypatch, call, number):
    """The k-th call fails, for every k: no file is left, and the next run writes what an undisturbed one writes."""
    write(tmp_path / "whole", matrices)
    whole, real = contents(tmp_path / "whole"), getattr(os, call)
    for k in range(200):
        count = 0

        def failing(path, *rest, k=k, **options):
            nonlocal count
            if call != "open" or "spqr-partial" in str(path):  # the interpreter opens files of its own
                count += 1
                if count == k + 1:
                    raise OSError(number, os.strerror(number))
            return real(path, *rest, **options)

        folder = tmp_path / f"run{k}"
        monkeypatch.setattr(os, call, failing)
        try:
            write(folder, matrices)
        except OSError as error:
            failed: int | None = error.errno
        else:
            failed = None
        monkeypatch.setattr(os, call, real)
        if failed is None:
            break
        assert failed == number
        assert contents(folder) == {}
        write(folder, matrices)
        assert contents(folder) == whole
    assert 8 <= k < 200


def test_short_writes_are_continued(tmp_path, matrices, monkeypatch):
    write(tmp_path / "whole", matrices)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    write(tmp_path / "slow", matrices)
    monkeypatch.undo()
    assert contents(tmp_path / "slow") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["after a shard", "renamed", "index written"])
def test_a_killed_run_never_looks_complete(tmp_path, matrices, monkeypatch, stage):
    """The state that kill -9 leaves at three moments is refused, and only our own leftovers are cleaned by the next run."""

    class Killed(BaseException):
        pass

    def die(*args, **options):
        raise Killed

    monkeypatch.setattr(CheckpointWriter, "abort", lambda self: self._lock.release())
    if stage == "after a shard":
        monkeypatch.setattr(CheckpointWriter, "finish", lambda self, extra: [self.abort(), die()])
    else:
        name = "model.safetensors.index.json" if stage == "renamed" else "config.json"
        real = CheckpointWriter._publish

        def publish(self, target, parts):
            return die() if target == name else real(self, target, parts)

        monkeypatch.setattr(CheckpointWriter, "_publish", publish)
    with pytest.raises(Killed):
        write(tmp_path, matrices)
    monkeypatch.undo()
    assert not validate(tmp_path).ok
    if stage == "after a shard":
        write(tmp_path, matrices)
        assert validate(tmp_path).ok


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, matrices, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "x", matrices)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o666 & ~umask}


def test_a_folder_that_is_not_empty(tmp_path, matrices):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious.partial").write_text("mine")
    with pytest.raises(SpqrError, match="E506"):
        write(tmp_path / "x", matrices)
    assert contents(tmp_path / "x") == {"precious.partial": b"mine"}
    with pytest.raises(SpqrError, match="E506"):
        write(tmp_path / "x" / "precious.partial", matrices)


def test_a_block_that_raises_leaves_nothing(tmp_path, matrices):
    def block():
        with CheckpointWriter(tmp_path, max_shard_bytes=1, config={}) as writer:
            for module, matrix in matrices.items():
                writer.add_matrix(module, matrix)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        block()
    assert contents(tmp_path) == {}


DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
          "complex64", "float8_e4m3fn", "float8_e5m2"]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_dense_torch_tensors_come_back_bit_for_bit(tmp_path, name):
    tensor = (torch.arange(12).reshape(3, 4).T * 0.5).to(getattr(torch, name))  # not contiguous
    with CheckpointWriter(tmp_path / "x", config={}) as writer:
        writer.add_dense("t", tensor)
        writer.add_dense("scalar", torch.tensor(1).to(getattr(torch, name)))
        writer.add_dense("none", torch.zeros(0, 3).to(getattr(torch, name)))
        writer.finish()
    assert validate(tmp_path / "x", deep=True).ok
    back = load_file(tmp_path / "x" / "model.safetensors")
    assert back["t"].dtype == tensor.dtype
    assert torch.equal(back["t"].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert back["none"].shape == (0, 3)
    assert back["scalar"].shape == ()


def test_raw_bf16_and_its_reading(tmp_path):
    raw = np.arange(6, dtype=np.uint16).reshape(2, 3)
    with CheckpointWriter(tmp_path / "x", config={}) as writer:
        writer.add_dense("t", raw, "BF16")
        writer.finish()
    with Checkpoint.open(tmp_path / "x") as checkpoint:
        assert checkpoint.dtype_of("t") == "BF16"
        assert checkpoint.read("t").dtype == np.uint16
        assert np.array_equal(checkpoint.read("t"), raw)
        with pytest.raises(ValueError, match="read-only"):
            checkpoint.read("t")[0, 0] = 1


def refused(code: str, action) -> None:
    with pytest.raises(SpqrError) as caught:
        action()
    assert caught.value.code == code


def test_what_the_writer_refuses(tmp_path, random_matrix):
    writer = CheckpointWriter(tmp_path, config={})
    matrix = random_matrix(4, 8)
    writer.add_matrix("a", matrix, bias=torch.zeros(4, dtype=torch.bfloat16))
    writer.add_dense("b.other", np.zeros(3))
    refused("E404", lambda: writer.add_matrix("a", matrix))
    refused("E404", lambda: writer.add_dense("a.bias", np.zeros(4, np.float32)))
    refused("E404", lambda: writer.add_dense("b.other", np.zeros(3)))
    refused("E108", lambda: writer.add_dense("a.scale", np.zeros(3)))
    refused("E108", lambda: writer.add_matrix("b", matrix))
    refused("E108", lambda: writer.add_dense("c.tile_stats", np.zeros(3)))
    refused("E109", lambda: writer.add_matrix("d", matrix, bias=np.zeros(4)))
    refused("E110", lambda: writer.add_matrix("d", matrix, bias=np.zeros(5, np.float32)))
    refused("E204", lambda: writer.add_matrix("d", matrix, bias=np.full(4, np.nan, np.float32)))
    refused("E204", lambda: writer.add_dense("e", np.array([1, np.inf], np.float16)))
    refused("E204", lambda: writer.add_dense("e", torch.tensor([1, float("nan")], dtype=torch.bfloat16)))
    refused("E109", lambda: writer.add_dense("e", np.array(["text"])))
    refused("E109", lambda: writer.add_dense("e", np.zeros(3, np.float32), "BF16"))
    refused("E006", lambda: writer.add_dense("n" * 513, np.zeros(3)))
    matrix.tile_stats[0, 0, 0] = np.inf
    refused("E201", lambda: writer.add_matrix("d", matrix))
    writer.add_dense("c.bias", np.zeros(3, np.float32))
    writer.finish()
    assert validate(tmp_path).ok
    refused("E111", lambda: CheckpointWriter(tmp_path / "y", config={}, quantization_config={"weight_bits": 5}))
    assert not (tmp_path / "y").exists()


def test_an_extra_file_cannot_replace_ours(tmp_path, random_matrix):
    for name in ("config.json", "model.safetensors", "../x", "a/b"):
        writer = CheckpointWriter(tmp_path / "x", config={})
        writer.add_matrix("a", random_matrix(4, 8))
        refused("E505", lambda writer=writer, name=name: writer.finish({name: b"x"}))
        assert contents(tmp_path / "x") == {}


def test_extra_files_are_copied(tmp_path, random_matrix):
    (tmp_path / "vocab.txt").write_bytes(b"a\nb")
    writer = CheckpointWriter(tmp_path / "x", config={"quantization_config": {"quant_method": "old"}}, provenance={"by": "me"})
    writer.add_matrix("a", random_matrix(4, 8))
    writer.finish([tmp_path / "vocab.txt"])
    assert (tmp_path / "x" / "vocab.txt").read_bytes() == b"a\nb"
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["quantization_config"]["provenance"] == {"by": "me"}
    assert config["quantization_config"]["quant_method"] == "spqr_format"


KILLED = """
import sys
sys.path[:0] = [sys.argv[2]]
from conftest import make_matrix
from spqr_format.writer import CheckpointWriter
matrix = make_matrix(256, 512, outliers=0.01)
writer = CheckpointWriter(sys.argv[1], max_shard_bytes=1, config={})
print("start", flush=True)
for k in range(60):
    writer.add_matrix(f"layers.{k}", matrix)
writer.finish({"tokenizer.json": b"{}"})
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    """No folder that a reader accepts is incomplete, no final name holds partial bytes, and the next run finishes."""
    command = [sys.executable, "-c", KILLED]
    tests = str(Path(__file__).parents[1])
    with subprocess.Popen([*command, str(tmp_path / "whole"), tests], stdout=subprocess.PIPE) as undisturbed:
        assert undisturbed.stdout is not None
        undisturbed.stdout.readline()
        start = time.perf_counter()
        undisturbed.wait()
    length = time.perf_counter() - start
    whole, source, mid_run = contents(tmp_path / "whole"), random.Random(1), 0
    for k in range(40):
        folder = tmp_path / f"run{k}"
        process = subprocess.Popen([*command, str(folder), tests], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(source.random() * length)
        process.kill()
        process.wait()
        found = contents(folder) if folder.exists() else {}
        mid_run += 0 < len(found) < len(whole)
        final = {name: raw for name, raw in found.items() if not name.endswith(".spqr-partial")}
        assert final.items() <= whole.items()
        assert folder.exists() is False or validate(folder).ok == (final == whole)
        if not final and k % 4 == 0:
            subprocess.run([*command, str(folder), tests], check=True, stdout=subprocess.DEVNULL)
            assert contents(folder) == whole
    assert mid_run >= 16  # of 40

"""The validator as its user meets it: the faults that everybody asks about, reports, hashes, memory, start-up time."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import make_vectors
import numpy as np
import pytest

from spqr_format import Layout
from spqr_format.validate import MAX_FINDINGS, validate
from spqr_format.writer import CheckpointWriter


@pytest.fixture
def checkpoint(tmp_path, random_matrix) -> Path:
    """Four shards written by the writer."""
    with CheckpointWriter(tmp_path / "model", max_shard_bytes=1, config={"model_type": "llama"}) as writer:
        for k in range(3):
            writer.add_matrix(f"layers.{k}.up", random_matrix(40, 50, outliers=0.1, seed=k), bias=np.zeros(40, np.float32))
        writer.add_dense("norm.weight", np.ones(50, np.float32))
        writer.finish()
    return tmp_path / "model"


def edit_shard(path: Path, change: Callable[[dict, bytearray], None]) -> None:
    """Changes header and data of a shard and drops its digests, as a tool that writes files of its own does."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    for key in ("spqr_sha256", "spqr_header_sha256"):
        header["__metadata__"].pop(key, None)
    change(header, data)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def element(header: dict, name: str, index: int, width: int) -> slice:
    begin = header[name]["data_offsets"][0] + index * width
    return slice(begin, begin + width)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flipped_header_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"layers.0.up.bias")] ^= 1
    path.write_bytes(raw)


def column_out_of_range(header: dict, data: bytearray) -> None:
    data[element(header, "layers.0.up.outliers", 5, 4)] = struct.pack("<He", 50, 1.0)


def falling_pointer(header: dict, data: bytearray) -> None:
    data[element(header, "layers.0.up.outlier_ptr", 2, 4)] = struct.pack("<i", 0)


def missing_tensor(header: dict, data: bytearray) -> None:
    header["layers.0.up.renamed.weight"] = header.pop("layers.0.up.stat_codes")


def unknown_version(header: dict, data: bytearray) -> None:
    header["__metadata__"]["spqr_version"] = "2.0"


def nan_statistic(header: dict, data: bytearray) -> None:
    data[element(header, "layers.0.up.tile_stats", 7, 2)] = struct.pack("<e", float("nan"))


FAULTS = [
    (truncated, "E001"), (flipped_header_byte, "E112"), (column_out_of_range, "E304"), (falling_pointer, "E302"),
    (missing_tensor, "E107"), (unknown_version, "E102"), (nan_statistic, "E201"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "code"), FAULTS)
def test_seven_faults_get_seven_codes(checkpoint, fault, code):
    assert validate(checkpoint).ok
    path = checkpoint / "model-00001-of-00004.safetensors"
    if fault in (truncated, flipped_header_byte):
        fault(path)
    else:
        edit_shard(path, fault)
    report = validate(checkpoint)
    assert [finding.code for finding in report.findings] == [code]
    assert not report.ok
    assert len({code for _, code in FAULTS}) == 7


def test_a_report_holds_all_findings_and_says_what_was_checked(checkpoint):
    seen: list[tuple[int, int]] = []
    report = validate(checkpoint, deep=True, progress=lambda done, total: seen.append((done, total)))
    assert report.as_dict() == {
        "ok": True, "findings": [], "modules": 3, "tensors": 3 * 6 + 1, "bytes": report.bytes,
        "hashes": "checked", "truncated": False,
    }  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == (2 * report.bytes, 2 * report.bytes)
    for k in range(3):
        edit_shard(checkpoint / f"model-0000{k + 1}-of-00004.safetensors", lambda header, data, k=k: data.__setitem__(
            element(header, f"layers.{k}.up.outliers", 7, 2), struct.pack("<e", float("inf"))))  # fmt: skip
    report = validate(checkpoint, deep=True)
    assert [(finding.code, finding.where) for finding in report.findings] == [
        ("E306", f"layers.{k}.up.outliers[3]") for k in range(3)
    ]
    assert report.hashes == "not covered"
    assert str(report.findings[0]) == "SPQR-E306 layers.0.up.outliers[3]: outlier bits 0x7c00001b, expected a finite number"
    assert json.dumps(report.as_dict())


def test_findings_are_bounded(tmp_path):
    nan = np.full(1, np.nan, np.float32)
    file = make_vectors.file()
    for k in range(MAX_FINDINGS + 20):
        file.add(f"t{k}", "F32", nan)
    (tmp_path / "x.safetensors").write_bytes(file.bytes())
    report = validate(tmp_path / "x.safetensors")
    assert len(report.findings) == MAX_FINDINGS
    assert report.truncated


def test_deep_finds_every_flipped_bit(tmp_path):
    """Structure cannot see a flipped code, for every code is legal; the digests do."""
    whole, source = make_vectors.hashed().bytes(), random.Random(8)
    start = len(whole) - len(make_vectors.hashed().data)
    path, unseen = tmp_path / "x.safetensors", 0
    for _ in range(1000):
        bit = source.randrange(8 * start, 8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        deep = validate(path, deep=True)
        assert "E205" in [finding.code for finding in deep.findings], bit
        unseen += validate(path).ok
    assert unseen > 300


def test_without_digests_the_report_says_so(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(make_vectors.base().bytes())
    assert validate(tmp_path / "x.safetensors").hashes == "not asked"
    assert validate(tmp_path / "x.safetensors", deep=True).hashes == "not covered"


@pytest.mark.parametrize("pad", [0, 5])
def test_a_sparse_file_of_64_gib(tmp_path, pad):
    """Memory does not grow with the tensors, and what needs no look is not read."""
    layout = Layout(2**17 - pad, 2**20 - pad, 4, 2**20, "direct")
    file, position = make_vectors.File(), 0
    file.metadata = {
        "format": "pt",
        "spqr_version": "1.0",
        "spqr_features": ["direct"],
        "spqr_modules": {"a": layout.as_dict()},
    }
    for leaf, spec in layout.tensors().items():
        offsets = [position, position + spec.nbytes]
        file.entries[f"a.{leaf}"] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    head = file.bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(head)
    os.truncate(path, len(head) + position)
    assert path.stat().st_size > 64 * 2**30
    program = (
        "import sys; from spqr_format.validate import validate; report = validate(sys.argv[1])\n"
        "assert report.ok and report.bytes > 64 * 2**30, report.findings\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) <= 200_000  # KiB


def test_the_validator_starts_fast():
    program = "import spqr_format.validate, spqr_format.metadata, jsonschema; spqr_format.metadata._validator('config')"
    best = 9.0
    for _ in range(3):
        start = os.times()
        subprocess.run([sys.executable, "-c", program], check=True)
        end = os.times()  # CPU time: the machine may be busy with other tests
        best = min(best, end.children_user + end.children_system - start.children_user - start.children_system)
    assert best < 0.5

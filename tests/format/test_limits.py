"""Limits that take files too large for a vector: each is refused by its code, in bounded time and memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import make_vectors
import pytest

from spqr_format import SpqrError, header, reader
from spqr_format.header import MAX_HEADER_BYTES, read_header
from spqr_format.reader import Checkpoint


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_TENSORS", 7)  # base has 8
    path = tmp_path / "x.safetensors"
    path.write_bytes(make_vectors.base().bytes())
    with pytest.raises(SpqrError, match=r"E006 .* tensors, the limit is 7"):
        read_header(path)


def test_too_many_lists(tmp_path):
    """A header of empty lists: small on disk, 25 times as large once parsed."""
    raw = b'{"a":[' + b"[]," * 4_000_001 + b"[]]}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(SpqrError, match=r"E006 .* lists in the header"):
        read_header(path)


def test_too_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_SHARDS", 1)
    folder = put(tmp_path / "x", make_vectors.sharded())
    with pytest.raises(SpqrError, match="E006"):
        Checkpoint.open(folder)
    with pytest.raises(SpqrError, match="E006"):
        Checkpoint.from_files([folder / name for name in make_vectors.NAMES])


def test_too_long_json(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_JSON_BYTES", 50)
    with pytest.raises(SpqrError, match="E006"):
        Checkpoint.open(put(tmp_path / "x", make_vectors.single()))


def test_a_folder_called_model_safetensors(tmp_path):
    folder = put(tmp_path / "x", {"config.json": make_vectors.single()["config.json"]})
    (folder / "model.safetensors").mkdir()
    with pytest.raises(SpqrError, match="E402"):
        Checkpoint.open(folder)


HOSTILE = {
    "commas": b'{"a":[' + b"1," * 10_000_000 + b"1]}",
    "strings": b'{"a":[' + b'"ab",' * 4_000_000 + b'""]}',
    "keys": b"{" + b",".join(b'"%x":0' % k for k in range(2_000_000)) + b"}",
    "brackets": b"[" * 20_000_000,
    "braces": b'{"":' * 5_000_000,
    "digits": b'{"a":' + b"1" * 20_000_000 + b"}",
    "escapes": b'{"' + b"\\u0041" * 3_000_000 + b'":0}',
    "spaces": b"{" + b" " * 20_000_000 + b"}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_of_20_mb(tmp_path, kind):
    """One code, in seconds, with at most 40 bytes of memory for each byte of the file."""
    raw, path = HOSTILE[kind], tmp_path / "x.safetensors"
    assert len(raw) < MAX_HEADER_BYTES
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    program = (
        "import json, sys; from spqr_format.validate import validate\n"
        "print(json.dumps(validate(sys.argv[1]).as_dict()['findings']))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=30)
    findings, memory = done.stdout.splitlines()
    assert json.loads(findings)[0]["code"] in ("E003", "E006", "E101")
    assert len(findings) < 2000
    assert int(memory) * 1024 < 150e6 + 40 * len(raw), memory


def test_a_large_index_of_modules(tmp_path):
    """50 shards that all list the same 2000 modules, as save_pretrained writes them: entries are parsed once."""
    import time

    one = make_vectors.file(("m", make_vectors.matrix(1, 1, 1)))
    entry = one.modules["m"]
    names = [f"model.layers.{k}.up_proj" for k in range(2000)]
    listed = json.dumps(dict.fromkeys(names, entry))
    paths = []
    for shard in range(50):
        file = make_vectors.File()
        file.metadata = {"format": "pt", "spqr_version": "1.0", "spqr_features": ["bilevel"], "spqr_modules": listed}
        for name in names[shard::50]:
            for leaf, record in one.entries.items():
                size = record["data_offsets"][1] - record["data_offsets"][0]
                begin = len(file.data)
                file.data += one.raw(leaf)
                file.entries[name + leaf[1:]] = {**record, "data_offsets": [begin, begin + size]}
        paths.append(tmp_path / f"{shard}.safetensors")
        paths[-1].write_bytes(file.bytes())
    start = time.process_time()
    with Checkpoint.from_files(paths) as checkpoint:
        assert len(checkpoint.modules) == 2000
    assert time.process_time() - start < 5

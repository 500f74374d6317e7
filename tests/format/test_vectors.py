"""Every conformance vector gets its verdict: from the package, and where it is valid from the reference decoder too."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import make_vectors
import pytest
import reference_decoder

from spqr_format.reader import Checkpoint, find_shards
from spqr_format.validate import validate

VECTORS = Path(make_vectors.VECTORS)
FROZEN = "9d1408ea46eecff2084acf2e3283b713923458e1f0bd68997a5852bfc0b97f76"  # of format 1.0, since 2026-11-22
RECORDS = sorted(VECTORS.glob("*/*.json"))


def content(record: Path) -> Path:
    folder = record.with_suffix("")
    return folder if folder.is_dir() else record.with_suffix(".safetensors")


def ids(record: Path) -> str:
    return f"{record.parent.name}/{record.stem}"


BAD = [record for record in RECORDS if record.parent.name != "ok"]
GOOD = [record for record in RECORDS if record.parent.name == "ok"]


def test_the_vectors_of_a_frozen_version_do_not_change():
    digest = hashlib.sha256()
    for path in sorted(path for path in VECTORS.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(VECTORS).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert digest.hexdigest() == FROZEN, "a change of 1.0: what is new needs a version, and vectors, of its own"


def test_vectors_are_what_the_script_makes():
    assert make_vectors.vectors() == {
        str(path.relative_to(VECTORS)): path.read_bytes() for path in VECTORS.rglob("*") if path.is_file()
    }


def test_counts_and_sizes():
    kinds = [record.parent.name for record in BAD]
    assert kinds.count("malformed") >= 60
    assert kinds.count("invalid") >= 120
    assert len(GOOD) >= 20
    for record in BAD:
        path = content(record)
        for file in path.iterdir() if path.is_dir() else [path]:
            assert file.stat().st_size <= 8192, file
        assert content(VECTORS / f"{json.loads(record.read_text())['twin']}.json").exists()
        assert (record.parent.name == "malformed") == json.loads(record.read_text())["code"].startswith("E0")


@pytest.mark.parametrize("record", BAD, ids=ids)
def test_a_bad_vector_gets_its_code(record):
    report = validate(content(record), deep=True)
    assert [finding.code for finding in report.findings] == [json.loads(record.read_text())["code"]], report.findings
    assert not report.ok


@pytest.mark.parametrize("record", GOOD, ids=ids)
def test_a_valid_vector_decodes_to_the_bit(record):
    path = content(record)
    report = validate(path, deep=True)
    assert report.ok, report.findings
    files = find_shards(path)[0] if path.is_dir() else [path]
    by_decoder = reference_decoder.decode_files(files)
    wanted = json.loads(record.read_text())["weights"]
    with Checkpoint.open(path) as checkpoint:
        assert wanted.keys() == checkpoint.modules.keys() == by_decoder.keys()
        for module, want in wanted.items():
            for weight in (checkpoint.matrix(module).dequantize(), by_decoder[module]):
                assert list(weight.shape) == want["shape"]
                raw = weight.astype("<f4").tobytes()
                found = {"hex": raw.hex()} if "hex" in want["float32"] else {"sha256": hashlib.sha256(raw).hexdigest()}
                assert found == want["float32"]


def test_all_of_them_in_little_memory():
    """Peak memory of a process that judges every vector: none of them makes the validator allocate what it claims."""
    program = (
        "import sys; from spqr_format.validate import validate\n"
        "for path in sys.argv[1:]: validate(path, deep=True)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    paths = [str(content(record)) for record in BAD]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 150_000  # KiB

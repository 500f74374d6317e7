"""Opening checkpoints: shards and links, files that change under the reader, versions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import make_vectors
import numpy as np
import pytest
import safetensors.numpy

from spqr_format import SpqrError
from spqr_format.header import read_header
from spqr_format.metadata import ShardMetadata, parse
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

INDEX = "model.safetensors.index.json"


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def code_of(path: Path) -> str | None:
    try:
        Checkpoint.open(path).close()
    except SpqrError as error:
        return error.code
    return None


@pytest.fixture
def sharded(tmp_path) -> Path:
    return put(tmp_path / "sharded", make_vectors.sharded())


def rename_in_index(folder: Path, new: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    old = make_vectors.NAMES[0]
    index["weight_map"] = {name: new if file == old else file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


OUTSIDE = ["../{}", "../sharded/{}", "./{}", "/etc/passwd", "{}/..", "sub/../{}", "..", ".", "\\\\host\\x.safetensors",
           "file:///x.safetensors", "x\0.safetensors", "../../../../etc/passwd.safetensors", "~/{}/x", "c:\\{}"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder(sharded, name):
    rename_in_index(sharded, name.format(make_vectors.NAMES[0]))
    assert code_of(sharded) == "E405"


def test_links(sharded, tmp_path):
    """A link out of the folder is refused; the links of a Hub cache, into its own blobs, are not."""
    first = sharded / make_vectors.NAMES[0]
    outside = put(tmp_path / "outside", {"x": first.read_bytes()}) / "x"
    first.unlink()
    first.symlink_to(outside)
    assert code_of(sharded) == "E405"
    first.unlink()
    first.symlink_to("missing.safetensors")
    assert code_of(sharded) == "E402"
    first.unlink()
    first.symlink_to(first.name)
    assert code_of(sharded) in ("E402", "E405")  # a loop
    first.unlink()
    first.mkdir()
    assert code_of(sharded) == "E402"
    first.rmdir()
    os.mkfifo(first)
    assert code_of(sharded) == "E402"  # and it does not wait for a writer

    cache = tmp_path / "models--x--y"
    revision = put(cache / "snapshots" / "abc", {})
    put(cache / "blobs", {f"hash{k}": content for k, content in enumerate(make_vectors.sharded().values())})
    for k, name in enumerate(make_vectors.sharded()):
        (revision / name).symlink_to(f"../../blobs/hash{k}")
    assert code_of(revision) is None
    (revision / make_vectors.NAMES[0]).unlink()
    (revision / make_vectors.NAMES[0]).symlink_to(outside)
    assert code_of(revision) == "E405"


def test_a_link_to_a_single_file(tmp_path):
    folder = put(tmp_path / "x", make_vectors.single())
    outside = put(tmp_path / "outside", {"m": (folder / "model.safetensors").read_bytes()}) / "m"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    assert code_of(folder) == "E405"


def test_a_folder_that_is_itself_a_link(sharded, tmp_path):
    (tmp_path / "link").symlink_to(sharded)
    assert code_of(tmp_path / "link") is None


def test_other_files_are_no_part_of_it(sharded):
    put(sharded, {"adapter.safetensors": b"junk", "notes.txt": b"", "original.bin": b""})
    assert code_of(sharded) is None


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def overwrite(path: Path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)


def replace(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)


OTHER = make_vectors.file(("a", make_vectors.matrix(99, 17, 33, outliers=7))).bytes()
CHANGES = {
    "replaced by another": (lambda path: replace(path, OTHER), True),
    "replaced by nothing": (lambda path: replace(path, b""), True),
    "deleted": (lambda path: path.unlink(), True),
    "moved": (lambda path: path.rename(path.with_name("old")), True),
    "folder moved": (lambda path: path.parent.rename(path.parent.with_name("away")), True),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + bytes(4096)), True),
    "cut to nothing": (lambda path: cut(path, 0), False),
    "cut in half": (lambda path: cut(path, path.stat().st_size // 2), False),
    "cut and refilled": (lambda path: (cut(path, 0), cut(path, 100_000)), None),
    "overwritten with ones": (lambda path: overwrite(path, b"\xff" * path.stat().st_size), False),
    "overwritten with zeros": (lambda path: overwrite(path, bytes(path.stat().st_size)), None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_the_check(tmp_path, change):
    """Old content, or a code; never a signal, another exception or an index out of range."""
    action, old_content = CHANGES[change]
    folder = put(tmp_path / "x", {"x.safetensors": make_vectors.base().bytes()})
    path = folder / "x.safetensors"
    with Checkpoint.open(path) as checkpoint:
        before = checkpoint.matrix("a").dequantize()
        action(path)
        try:
            weight = checkpoint.matrix("a").dequantize()
        except SpqrError:
            assert not old_content
        else:
            assert np.isfinite(weight).all()
            assert old_content is not False
            assert not old_content or np.array_equal(weight, before)


NEW = ["bilevel", "outliers", "new"]
VERSIONS = [
    ({}, None), ({"spqr_version": "1.1"}, None), ({"spqr_version": "1.999"}, None), ({"spqr_version": "2.0"}, "E102"),
    ({"spqr_version": "0.1"}, "E102"), ({"spqr_version": "1"}, "E104"), ({"spqr_version": "1.1", "spqr_features": NEW}, "E103"),
    ({"spqr_version": "2.0", "spqr_features": ["new"]}, "E102"), ({"spqr_note": "x"}, "E104"),
    ({"spqr_version": "1.1", "spqr_note": "x"}, "E104"), ({"note": "x"}, None), ({"entry": {"x_note": 1}}, None),
    ({"entry": {"note": 1}}, "E104"), ({"entry": {"must_understand": False}}, "E104"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "code"), VERSIONS)
def test_versions_features_and_unknown_keys(verdict, changes, code):
    changes = dict(changes)
    file = make_vectors.module(**changes.pop("entry", {}))
    file.metadata |= changes
    assert verdict(file.bytes()) == code


def test_metadata_strings_round_trip(random_matrix):
    layouts = {"b": random_matrix(3, 40).layout, "a": random_matrix(5, 5, statistics="direct", permuted=True).layout}
    metadata = ShardMetadata.of(layouts, {"a.weight": "0" * 64})
    strings = metadata.as_strings()
    assert parse(strings, "x") == metadata
    assert parse(strings, "x").as_strings() == strings


def test_files_of_save_file(tmp_path):
    """A shard that safetensors itself wrote, which has no digests and another order of tensors."""
    file = make_vectors.base()
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.bytes())
    with Checkpoint.open(path) as checkpoint:
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.place if checkpoint.dtype_of(name) != "BF16"}
        metadata = ShardMetadata.of(checkpoint.modules).as_strings()
        weight = checkpoint.matrix("a").dequantize()
    safetensors.numpy.save_file(tensors, tmp_path / "y.safetensors", metadata)
    with Checkpoint.from_files([tmp_path / "y.safetensors"]) as checkpoint:
        assert np.array_equal(checkpoint.matrix("a").dequantize(), weight)
    assert validate(tmp_path / "y.safetensors", deep=True).hashes == "not covered"


def test_the_same_header_as_safetensors_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(make_vectors.hashed().bytes())
    header = read_header(path)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(header.tensors)
        assert file.metadata() == header.metadata


def test_from_files_needs_no_config(tmp_path):
    folder = put(tmp_path / "x", make_vectors.sharded())
    with Checkpoint.from_files([folder / name for name in make_vectors.NAMES]) as checkpoint:
        assert set(checkpoint.modules) == {"a", "b"}
        assert checkpoint.config is None
        assert checkpoint.dense == ["norm.weight", "embed.weight"]
    (folder / "config.json").unlink()
    Checkpoint.open(folder, config=False).close()
    with pytest.raises(SpqrError, match="E107"):
        Checkpoint.from_files([folder / make_vectors.NAMES[0]])


def test_a_missing_path_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Checkpoint.open(tmp_path / "nothing")


def test_refusing_closes_every_file(tmp_path):
    folder = put(tmp_path / "x", make_vectors.sharded())
    rename_in_index(folder, make_vectors.NAMES[1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert code_of(folder) is not None
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_cannot_speak_to_the_terminal(tmp_path):
    file = make_vectors.base()
    file.entries["a.\x1b[31mred"] = file.entries.pop("norm.weight")
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.bytes())
    with pytest.raises(SpqrError) as caught:
        Checkpoint.open(path)
    assert "\x1b" not in str(caught.value)

# ruff: noqa: E501  (tables of cases, one a line)
"""Writes spec/vectors: small files that a reader must accept, with the expected result, or refuse, with the code.

    python spec/make_vectors.py            write them
    python spec/make_vectors.py --check    fail if one of them differs from what this script makes

Every bad vector is a valid one (its twin) with one fault. The files are put together here from raw bytes, since the
project's own writer refuses to write most of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import reference_decoder  # noqa: E402

from spqr_format.layout import Layout  # noqa: E402
from spqr_format.matrix import SpqrMatrix  # noqa: E402
from spqr_format.metadata import quantization_config  # noqa: E402

VECTORS = ROOT / "vectors"
INLINE = 4096  # decoded bytes that stand in the .json; longer results stand there as a sha256
SIZES = {"I32": 4, "I16": 2, "U8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "U16": 2, "U32": 4, "I64": 8}


class Random:
    """A small generator whose numbers depend on no library version (Knuth's MMIX constants)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit

    def array(self, shape: tuple[int, ...], limit: int, dtype: str) -> Any:
        return np.array([self.below(limit) for _ in range(int(np.prod(shape)))], dtype).reshape(shape)


def matrix(seed: int, out: int, inn: int, bits: int = 3, group: int = 16, statistics: str = "bilevel",
           outliers: int | None = 0, perm: bool = False, quick: bool = False) -> SpqrMatrix:  # fmt: skip
    """A matrix with these sizes and pseudo-random contents. `quick` leaves most codes 0, for files that compress well."""
    random = Random(seed)
    layout = Layout(out, inn, bits, group, statistics)  # type: ignore[arg-type]
    groups, fields = (out, layout.groups), {}
    if quick:
        codes = np.zeros((out, inn), np.uint8)
        codes[:, ::1001] = random.array(codes[:, ::1001].shape, 2**bits, "u1")
    else:
        codes = random.array((out, inn), 2**bits, "u1")
    if statistics == "bilevel":
        fields["scale_codes"], fields["zero_codes"] = random.array(groups, 8, "u1"), random.array(groups, 8, "u1")
        numbers = random.array((layout.tile_rows, layout.groups, 4), 4001, "f4")
        fields["tile_stats"] = ((numbers - 2000) / np.float32(1024) * np.float32([0.25, 1, 1, 1])).astype(np.float16)
    else:
        fields["group_scales"] = ((random.array(groups, 4001, "f4") + 1) / np.float32(65536)).astype(np.float16)
        fields["group_zeros"] = random.array(groups, 2**bits + 1, "u1")
    if outliers:
        places: set[int] = {out * inn - 1}
        while len(places) < outliers:
            places.add(random.below(out * inn))
        flat = np.array(sorted(places))
        fields["crow_indices"] = np.concatenate([[0], np.cumsum(np.bincount(flat // inn, minlength=out))])
        fields["col_indices"] = flat % inn
        fields["values"] = ((random.array((outliers,), 4001, "f4") - 2000) / np.float32(512)).astype(np.float16)
    if perm:
        order = list(range(inn))
        for i in range(inn - 1, 0, -1):
            j = random.below(i + 1)
            order[i], order[j] = order[j], order[i]
        fields["perm"] = np.array(order, np.int32)
    return SpqrMatrix(layout, codes, **fields)  # type: ignore[arg-type]


class File:
    """A safetensors file in parts: what a fault changes is changed here, then `bytes` puts it together."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.data = b""
        self.hash_header = False

    @property
    def modules(self) -> dict[str, Any]:
        return self.metadata["spqr_modules"]

    def add(self, name: str, dtype: str, array: Any) -> None:
        raw = np.ascontiguousarray(array).tobytes()
        self.entries[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(self.data), len(self.data) + len(raw)],
        }
        self.data += raw

    def add_module(self, name: str, matrix: SpqrMatrix) -> None:
        for leaf, array in matrix.pack().items():
            self.add(f"{name}.{leaf}", matrix.layout.tensors()[leaf].dtype, array)
        self.modules[name] = matrix.layout.as_dict()

    def raw(self, name: str) -> bytes:
        begin, end = self.entries[name]["data_offsets"]
        return self.data[begin:end]

    def poke(self, name: str, element: int, raw: bytes) -> None:
        """Overwrites one element."""
        place = self.entries[name]["data_offsets"][0] + element * len(raw)
        self.data = self.data[:place] + raw + self.data[place + len(raw) :]

    def drop(self, name: str) -> None:
        begin, end = self.entries.pop(name)["data_offsets"]
        self.data = self.data[:begin] + self.data[end:]
        for entry in self.entries.values():
            entry["data_offsets"] = [x - (end - begin) if x >= end else x for x in entry["data_offsets"]]

    def replace(self, name: str, dtype: str, shape: list[int]) -> None:
        """The same tensor with another dtype and shape, filled with its old bytes as far as they go."""
        raw = self.raw(name)
        self.drop(name)
        size = SIZES[dtype]
        for dimension in shape:
            size *= dimension
        self.entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(self.data), len(self.data) + size]}
        self.data += raw[:size].ljust(size, b"\0")

    def hash_tensors(self) -> None:
        self.metadata["spqr_sha256"] = {name: hashlib.sha256(self.raw(name)).hexdigest() for name in self.entries}

    def header(self) -> bytes:
        strings = {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in self.metadata.items()}
        if self.hash_header:
            strings["spqr_header_sha256"] = "0" * 64
        raw = json.dumps({"__metadata__": strings, **self.entries}, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        if self.hash_header:
            raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode())
        return raw

    def bytes(self) -> bytes:
        raw = self.header()
        return struct.pack("<Q", len(raw)) + raw + self.data


def features(*matrices: SpqrMatrix) -> list[str]:
    return quantization_config([m.layout for m in matrices])["features"]


def file(*matrices: tuple[str, SpqrMatrix], dense: bool = False, bias: str | None = None) -> File:
    """A valid file of these modules."""
    result = File()
    used = features(*(m for _, m in matrices))
    result.metadata = {"format": "pt", "spqr_version": "1.0", "spqr_features": used, "spqr_modules": {}}
    for name, m in matrices:
        result.add_module(name, m)
        if bias is not None:
            numbers = Random(7).array((m.layout.out_features,), 100, "f4")
            array = (
                numbers.astype({"F16": "f2", "F32": "f4"}[bias]) if bias != "BF16" else (numbers.view("u4") >> 16).astype("u2")
            )
            result.add(f"{name}.bias", bias, array)
    if dense:
        result.add("norm.weight", "F32", np.arange(1, 5, dtype="f4"))
        result.add("embed.weight", "BF16", (np.arange(6, dtype="f4").view("u4") >> 16).astype("u2").reshape(2, 3))
    return result


def base() -> File:
    """The twin of most bad vectors: a bilevel module with every kind of padding and outliers, a bias and dense tensors."""
    return file(("a", matrix(1, 17, 33, outliers=7)), dense=True, bias="F16")


def direct() -> File:
    return file(("d", matrix(2, 5, 20, 4, 16, "direct", 5, perm=True)), bias="BF16")


def hashed() -> File:
    result = base()
    result.hash_tensors()
    result.hash_header = True
    return result


def cells() -> File:
    return file(("a", matrix(45, 18, 300, 2, 512, "direct", 14)))


def panels() -> File:
    return file(("a", matrix(59, 17, 4300, 2, 4304, "direct", 40, quick=True)))


def dense_outliers() -> File:
    return file(("a", matrix(21, 3, 5, outliers=15)))


def set_value(f: File, name: str, element: int, raw: bytes) -> None:
    """Overwrites the fp16 value of one outlier."""
    f.poke(name, element, f.raw(name)[4 * element : 4 * element + 2] + raw)


def long_rows() -> File:
    return file(("w", matrix(3, 1, 65552, 2, 65552, "direct", 3, quick=True)))


Folder = dict[str, bytes]


def config(*files: File, **changes: Any) -> dict[str, Any]:
    layouts = [Layout(**entry) for f in files for entry in f.modules.values()]
    return {"model_type": "llama", "quantization_config": {**quantization_config(layouts), **changes}}


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def pair() -> tuple[File, File]:
    """Two shards. Module b has its tensors in both; both list it."""
    one, two = file(("a", matrix(4, 3, 16))), file(("b", matrix(5, 2, 16, outliers=2)), dense=True)
    one.metadata["spqr_features"] = ["bilevel", "outliers"]
    one.modules["b"] = copy.deepcopy(two.modules["b"])
    one.add("b.outliers", "I32", np.frombuffer(two.raw("b.outliers"), "<i4"))
    two.drop("b.outliers")
    return one, two


NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(one: File | None = None, two: File | None = None, cfg: Any = None, index: Any = None) -> Folder:
    a, b = pair()
    one, two = one or a, two or b
    weight_map = {name: NAMES[0] for name in one.entries} | {name: NAMES[1] for name in two.entries}
    return {
        "config.json": cfg if isinstance(cfg, bytes) else as_json(cfg or config(a, b)),
        "model.safetensors.index.json": index if isinstance(index, bytes) else as_json({"weight_map": index or weight_map}),
        NAMES[0]: one.bytes(),
        NAMES[1]: two.bytes(),
    }


def single(cfg: Any = None) -> Folder:
    f = file(("a", matrix(6, 2, 16)))
    return {"config.json": cfg if isinstance(cfg, bytes) else as_json(cfg or config(f)), "model.safetensors": f.bytes()}


OK: dict[str, tuple[str, Callable[[], File | Folder]]] = {
    "base": ("bilevel, 3 bits, 17 x 33, outliers, bias, dense tensors", base),
    "direct": ("direct statistics, 4 bits, permuted, outliers, bf16 bias", direct),
    "hashed": ("base with digests of tensors and header", hashed),
    "one_by_one": ("a single weight", lambda: file(("a", matrix(10, 1, 1)))),
    "one_outlier": ("a single weight that is an outlier", lambda: file(("a", matrix(11, 1, 1, outliers=1)))),
    "full_tile": ("nothing is padded", lambda: file(("a", matrix(12, 16, 16)))),
    "bits_2": ("2 bits, padded", lambda: file(("a", matrix(13, 9, 24, 2)))),
    "bits_4": ("4 bits, padded", lambda: file(("a", matrix(14, 23, 17, 4)))),
    "two_tiles": ("two full tiles, three blocks", lambda: file(("a", matrix(15, 32, 48)))),
    "group_32": ("group size 32, a short last group", lambda: file(("a", matrix(16, 4, 40, 3, 32)))),
    "group_over_row": ("group size above in_features", lambda: file(("a", matrix(17, 4, 40, 3, 1024)))),
    "permuted": ("bilevel with a permutation and outliers", lambda: file(("a", matrix(18, 6, 35, outliers=4, perm=True)))),
    "direct_2": ("direct, 2 bits", lambda: file(("a", matrix(19, 3, 50, 2, 32, "direct")))),
    "direct_3": ("direct, 3 bits, one group a row", lambda: file(("a", matrix(20, 18, 19, 3, 32, "direct", 9)))),
    "dense_outliers": ("every weight is an outlier", dense_outliers),
    "cells": ("outliers in four of six cells", cells),
    "panels": ("outliers on both sides of column 4096", panels),
    "empty_rows": ("outliers in the last row only", lambda: file(("a", matrix(22, 5, 16, outliers=1)))),
    "two_modules": ("both encodings in one file", lambda: file(("a", matrix(23, 2, 3)), ("b", matrix(24, 2, 3, 4, 16, "direct")))),
    "long_rows": ("257 chunks in 17 panels, outliers in the first and the last", long_rows),
    "many_outliers": ("pointers above 65535", lambda: file(("a", matrix(25, 257, 256, 2, 256, "direct", 65536, quick=True)))),
    "extremes": ("largest fp16 numbers, subnormals, minus zero", lambda: extremes()),
    "bias_f32": ("an F32 bias", lambda: file(("a", matrix(27, 2, 16)), bias="F32")),
    "dense_only": ("a shard without modules", lambda: file(dense=True)),
    "minor_newer": ("version 1.7 with known features and x_ keys", lambda: minor_newer()),
    "foreign_keys": ("free keys in __metadata__, x_ keys in an entry", lambda: foreign_keys()),
    "sharded": ("two shards, one module in both", sharded),
    "single": ("a folder with one shard", single),
    "config_extras": ("every optional key of the config", lambda: single(config(file(("a", matrix(6, 2, 16))),
        modules_to_not_convert=["lm_head"], provenance={"source": "x"}, x_note=[1]))),
    "superset": ("both shards list all modules", lambda: superset()),
    "chunk": ("a chunk of 256 columns and a set of 16 groups, no tail", lambda: file(("a", matrix(30, 17, 256)))),
    "chunk_short": ("the last block of a chunk is short", lambda: chunk_short()),
    "chunks_and_tail": ("two chunks and three blocks", lambda: file(("a", matrix(32, 19, 512 + 48, outliers=20)))),
    "chunk_2": ("2 bits, a chunk and a block, 17 groups", lambda: file(("a", matrix(33, 5, 272, 2)))),
    "chunks_4": ("4 bits, two chunks and a block, 33 groups", lambda: file(("a", matrix(34, 8, 528, 4)))),
    "set_32": ("group size 32, a set and two groups, the last one short", lambda: chunks_32()),
    "chunks_one_set": ("group size 32, a set over two chunks", lambda: file(("a", matrix(36, 7, 512, 3, 32)))),
    "chunk_direct": ("direct, 4 bits, a chunk and three blocks, permuted",
        lambda: file(("a", matrix(37, 6, 300, 4, 128, "direct", 4, perm=True)))),
}  # fmt: skip


def extremes() -> File:
    f = file(("a", matrix(26, 16, 16, outliers=4)))
    for k, raw in enumerate((b"\xff\x7b", b"\xff\xfb", b"\x01\x00", b"\x00\x80")):
        f.poke("a.tile_stats", k, raw)
        set_value(f, "a.outliers", k, raw)
    return f


def chunk_short() -> File:
    return file(("a", matrix(31, 20, 250)))


def chunks_32() -> File:
    return file(("a", matrix(35, 21, 32 * 17 + 9, 3, 32, outliers=3)))


def minor_newer() -> File:
    f = foreign_keys()
    f.metadata["spqr_version"] = "1.7"
    return f


def foreign_keys() -> File:
    f = file(("a", matrix(28, 2, 16)))
    f.modules["a"]["x_note"] = {"nested": [1, None]}
    f.metadata |= {"author": "someone", "sprq": "not ours"}
    return f


def superset() -> Folder:
    one, two = pair()
    for f in (one, two):
        f.metadata["spqr_features"] = ["outliers", "bilevel"]  # the order is free
    two.metadata["spqr_modules"] = {**one.modules, **two.modules}
    return sharded(one, two)


# name -> (code, reason, twin, content)
BAD: dict[str, tuple[str, str, str, bytes | Folder]] = {}


def bad(code: str, name: str, why: str, content: bytes | File | Folder, twin: str = "base") -> None:
    key = f"{code.lower()}_{name}"
    assert key not in BAD, key
    BAD[key] = (code, why, twin, content.bytes() if isinstance(content, File) else content)


def changed(change: Callable[[File], Any], start: Callable[[], File] = base) -> File:
    f = start()
    change(f)
    return f


def header_with(old: bytes, new: bytes, fit: bool = True) -> bytes:
    """base with `old` replaced in its header; `fit` corrects the length before it."""
    raw = base().header()
    assert raw.count(old) >= 1, old
    raw = raw.replace(old, new, 1)
    return (struct.pack("<Q", len(raw)) if fit else base().bytes()[:8]) + raw + base().data


def entry(name: str, **values: Any) -> File:
    """base with keys of one tensor's header entry changed, or removed where None."""
    f = base()
    for key, value in values.items():
        f.entries[name][key] = value
        if value is None:
            del f.entries[name][key]
    return f


def module(start: Callable[[], File] = base, **values: Any) -> File:
    """A file with keys of its module's entry changed, or removed where None."""
    f = start()
    (record,) = f.modules.values()
    for key, value in values.items():
        record[key] = value
        if value is None:
            del record[key]
    return f


def meta(**values: Any) -> File:
    f = base()
    for key, value in values.items():
        f.metadata[key] = value
        if value is None:
            del f.metadata[key]
    return f


def malformed() -> None:
    whole = base().bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    for name, size in {"empty": 0, "seven_bytes": 7, "no_header": 8, "half_header": 8 + n // 2, "header_minus_one": 7 + n,
                       "no_data": 8 + n, "half_data": 8 + n + 300, "minus_one": len(whole) - 1}.items():  # fmt: skip
        bad("E001", name, f"the first {size} bytes of base", whole[:size])
    cut = changed(lambda f: f.add("ids", "U8", np.arange(9, dtype="u1")))
    bad("E001", "cut_in_integers", "cut in a tensor that no payload rule looks at", cut.bytes()[:-1])
    for name, size in {"zero": 0, "one": 1, "over_limit": 100_000_001, "two_31": 2**31, "two_32": 2**32, "two_63": 2**63,
                       "two_64": 2**64 - 1}.items():  # fmt: skip
        bad("E002", name, f"N = {size}", struct.pack("<Q", size) + whole[8:])
    for name, why, old, new in [
        ("starts_with_space", "the header starts with a space", b"{", b" {"),
        ("list", "the header is a list", base().header(), b"[]"),
        ("not_json", "a comma is missing", b'},"', b'}"'),
        ("single_quotes", "a key in single quotes", b'"dtype"', b"'dtype'"),
        ("comment", "a comment", b'"dtype"', b'/**/"dtype"'),
        ("not_utf8", "a byte that is not UTF-8", b"norm.weight", b"norm.weigh\xff"),
        ("surrogate", "half a surrogate pair", b"norm.weight", b"norm.\\ud800"),
        ("nan", "NaN", b'"shape":[4]', b'"shape":[NaN]'),
        ("infinity", "Infinity", b'"shape":[4]', b'"shape":[Infinity]'),
        ("minus_zero", "-0 for an offset", b'"data_offsets":[0,', b'"data_offsets":[-0,'),
        ("long_number", "a number of 1000 digits", b'"shape":[4]', b'"shape":[' + b"4" * 1000 + b"]"),
        ("float", "4.0 for a size", b'"shape":[4]', b'"shape":[4.0]'),
        ("exponent", "4e0 for a size", b'"shape":[4]', b'"shape":[4e0]'),
        ("same_tensor_twice", "two entries of one name", b'"embed.weight"', b'"norm.weight"'),
        ("same_key_twice", "dtype twice", b'"dtype":"F32",', b'"dtype":"F32","dtype":"F32",'),
        ("metadata_twice", "__metadata__ twice", b"{", b'{"__metadata__":{},'),
        ("trailing", "a second value after the header", base().header().rstrip(), base().header().rstrip() + b"{}"),
        ("control", "a raw newline in a name", b"norm.weight", b"norm.\nweight"),
        ("byte_order_mark", "a byte order mark", b"{", b"\xef\xbb\xbf{"),
        ("empty_name", "a tensor without a name", b'"norm.weight"', b'""'),
        ("deep", "800 nested lists, which is no shape", b'"shape":[4]', b'"shape":' + b"[" * 800 + b"]" * 800),
    ]:  # fmt: skip
        bad("E003", name, why, header_with(old, new))
    for name, why, values in [
        ("no_dtype", "no dtype", {"dtype": None}), ("no_shape", "no shape", {"shape": None}),
        ("no_offsets", "no data_offsets", {"data_offsets": None}), ("extra_key", "an unknown key", {"strides": [1]}),
        ("dtype_unknown", "dtype F128", {"dtype": "F128"}), ("dtype_case", "dtype f32", {"dtype": "f32"}),
        ("dtype_half_byte", "dtype F4, which no file of this format may hold", {"dtype": "F4"}),
        ("dtype_number", "dtype 7", {"dtype": 7}), ("dtype_list", "a list for dtype", {"dtype": ["F32"]}),
        ("shape_text", "text for shape", {"shape": "4"}), ("shape_number", "a number for shape", {"shape": 4}),
        ("shape_negative", "a negative size", {"shape": [-4]}), ("shape_bool", "true for a size", {"shape": [True]}),
        ("shape_null", "null for a size", {"shape": [None]}), ("shape_nested", "a list for a size", {"shape": [[4]]}),
        ("offsets_one", "one offset", {"data_offsets": [0]}), ("offsets_three", "three offsets", {"data_offsets": [0, 16, 16]}),
        ("offsets_negative", "a negative offset", {"data_offsets": [-16, 0]}),
        ("offsets_text", "text for an offset", {"data_offsets": ["0", "16"]}),
    ]:  # fmt: skip
        bad("E003", name, why, entry("norm.weight", **values))
    bad("E003", "entry_list", "a list for an entry", changed(lambda f: f.entries.update({"norm.weight": []})))  # type: ignore[dict-item]
    bad("E003", "entry_null", "null for an entry", changed(lambda f: f.entries.update({"norm.weight": None})))  # type: ignore[dict-item]
    raw = base().header()
    start = raw.index(b'{"format"')
    end = json.JSONDecoder().raw_decode(raw.decode(), start)[1]
    for name, value in {"list": b"[]", "number": b'{"spqr_version":1}', "text": b'"x"', "null": b"null"}.items():
        bad("E003", f"metadata_{name}", f"__metadata__ is {value.decode()}", header_with(raw[start:end], value))
    offsets = base().entries["norm.weight"]["data_offsets"]
    for name, why, values in [
        ("shape_larger", "a shape above its range", {"shape": [5]}), ("shape_smaller", "a shape below its range", {"shape": [3]}),
        ("backwards", "a range that ends before it starts", {"data_offsets": offsets[::-1]}),
        ("one_more", "a range one byte too long", {"data_offsets": [offsets[0], offsets[1] + 1]}),
        ("nothing", "an empty range", {"data_offsets": [offsets[0]] * 2}), ("dtype_wider", "a wider dtype", {"dtype": "F64"}),
        ("dtype_narrower", "a narrower dtype", {"dtype": "F16"}), ("zero_size", "a size of 0", {"shape": [4, 0]}),
        ("wraps", "a product that wraps to 4 in 64 bits", {"shape": [2**34, 2**6]}),
        ("offset_two_64", "a range beyond 64 bits", {"data_offsets": [2**64 - 16, 2**64 - 1]}),
    ]:  # fmt: skip
        bad("E004", name, why, entry("norm.weight", **values))
    both = base().entries["norm.weight"]["data_offsets"]

    def shift(first: str, by: int) -> File:
        f = base()
        position = f.entries[first]["data_offsets"][0]
        for record in f.entries.values():
            if record["data_offsets"][0] >= position:
                record["data_offsets"] = [x + by for x in record["data_offsets"]]
        f.data = f.data + bytes(max(by, 0))
        return f

    bad("E005", "hole_at_start", "4 bytes before the first tensor", shift("a.weight", 4))
    bad("E005", "hole", "4 bytes between two tensors", shift("norm.weight", 4))
    bad("E005", "overlap", "the last tensors start 4 bytes early", shift("norm.weight", -4))
    bad("E005", "same_bytes", "two tensors share their bytes", changed(
        lambda f: f.entries.update(alias={"dtype": "F32", "shape": [4], "data_offsets": both})))  # fmt: skip
    bad("E005", "one_byte_more", "a byte after the last tensor", base().bytes() + b"\0")
    bad("E005", "zip_behind", "a zip archive after the last tensor", base().bytes() + b"PK\x05\x06" + bytes(18))
    bad("E005", "first_dropped", "the first tensor's entry is gone", changed(lambda f: f.entries.pop("a.weight")))
    bad("E005", "last_dropped", "the last tensor's entry is gone", changed(lambda f: f.entries.pop("embed.weight")))
    bad("E005", "far_away", "a tensor starts at 2^62", entry("embed.weight", data_offsets=[2**62, 2**62 + 12]))
    bad("E006", "long_name", "a name of 513 bytes", changed(lambda f: f.add("n" * 513, "F32", np.zeros(1, "f4"))))
    bad(
        "E006",
        "long_name_utf8",
        "257 characters of 2 bytes",
        changed(lambda f: f.add("\u00e9" * 257, "F32", np.zeros(1, "f4"))),
    )
    bad("E006", "rank_9", "rank 9", entry("norm.weight", shape=[1] * 8 + [4]))
    bad("E006", "dimension", "a size of 2^40 + 1", entry("norm.weight", shape=[2**40 + 1]))
    bad("E006", "dimension_empty", "a size of 2^41 beside a 0", entry("norm.weight", shape=[0, 2**41]))
    bad("E006", "elements", "2^41 elements", entry("norm.weight", shape=[2**20, 2**21]))
    bad("E006", "elements_two_64", "2^64 elements, 0 in 64 bits", entry("norm.weight", shape=[2**32, 2**32]))
    bad("E006", "out_features", "out_features 2^31", module(out_features=2**31))
    bad("E006", "in_features", "in_features 2^31", module(in_features=2**31))
    bad("E006", "weights", "2^41 weights", module(out_features=2**20, in_features=2**21))
    bad("E006", "outliers", "more outliers than weights", module(outliers=17 * 33 + 1))
    bad(
        "E006",
        "module_name",
        "a module name of 600 bytes",
        changed(lambda f: f.modules.update({"\u00e9" * 300: f.modules["a"]})),
    )
    for name, magic in {"pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c", "zip": b"PK\x03\x04\x14\0\0\0\x08\0", "gguf": b"GGUF\x03\0\0\0\1\0\0\0",
                        "hdf5": b"\x89HDF\r\n\x1a\n", "parquet": b"PAR1\x15\x04\x15\x10", "pickle_2": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."}.items():  # fmt: skip
        bad("E007", name, f"starts like {name}", magic + bytes(64))
    folder = single()
    del folder["model.safetensors"]
    bad(
        "E007",
        "bin_folder",
        "a folder with pytorch_model.bin only",
        {**folder, "pytorch_model.bin": b"PK\x03\x04"},
        "single",
    )


def invalid_metadata() -> None:
    bad("E101", "no_metadata", "no __metadata__", changed(lambda f: f.metadata.clear()))
    bad(
        "E101",
        "format_only",
        "metadata of an ordinary file",
        changed(lambda f: setattr(f, "metadata", {"format": "pt"})),
    )
    bad("E101", "no_version", "no spqr_version", meta(spqr_version=None))
    one, two = pair()
    two.metadata = {"format": "pt"}
    bad("E101", "second_shard", "the second shard has no SpQR metadata", sharded(one, two), "sharded")
    for version in ("2.0", "0.9", "10.0", "3.1"):
        bad("E102", "version_" + version.replace(".", "_"), f"version {version}", meta(spqr_version=version))
    bad(
        "E102",
        "config",
        "format_version 2.0 in config.json",
        single(config(file(("a", matrix(6, 2, 16))), format_version="2.0")),
        "single",
    )
    bad("E103", "feature", "a feature of the future", meta(spqr_features=["bilevel", "outliers", "wavelets"]))
    bad("E103", "empty", "a feature without a name", meta(spqr_features=["bilevel", "outliers", ""]))
    bad("E103", "case", "Bilevel", meta(spqr_features=["Bilevel", "outliers"]))
    bad(
        "E103",
        "minor_newer",
        "version 1.1 with a feature of its own",
        meta(spqr_version="1.1", spqr_features=["bilevel", "outliers", "bits_5"]),
    )
    bad(
        "E103",
        "config",
        "an unknown feature in config.json",
        single(config(file(("a", matrix(6, 2, 16))), features=["bilevel", "wavelets"])),
        "single",
    )
    for name, version in {
        "one": "1",
        "three": "1.0.0",
        "zeros": "01.0",
        "text": "one",
        "space": "1.0 ",
        "newline": "1.0\n",
        "minus": "1.-1",
        "empty": "",
    }.items():
        bad("E104", f"version_{name}", f"version {version!r}", meta(spqr_version=version))
    for name, why, values in [
        ("no_format", "no format", {"format": None}), ("format_np", "format np", {"format": "np"}),
        ("no_features", "no spqr_features", {"spqr_features": None}), ("no_modules", "no spqr_modules", {"spqr_modules": None}),
        ("unknown_key", "an unknown spqr_ key", {"spqr_extra": "1"}), ("features_text", "features are not JSON", {"spqr_features": "bilevel"}),
        ("features_object", "features are an object", {"spqr_features": {"bilevel": True}}),
        ("features_twice", "a feature twice", {"spqr_features": ["bilevel", "outliers", "bilevel"]}),
        ("features_numbers", "a number for a feature", {"spqr_features": [1]}),
        ("feature_missing", "a feature that is used and not listed", {"spqr_features": ["bilevel"]}),
        ("feature_unused", "a feature that is listed and not used", {"spqr_features": ["bilevel", "outliers", "perm"]}),
        ("modules_text", "modules are not JSON", {"spqr_modules": "{"}), ("modules_list", "modules are a list", {"spqr_modules": []}),
        ("modules_nan", "NaN in modules", {"spqr_modules": '{"a":NaN}'}), ("module_null", "null for an entry", {"spqr_modules": {"a": None}}),
        ("module_nameless", "an entry without a name", {"spqr_modules": {"": {}}}),
        ("module_twice", "an entry twice", {"spqr_modules": '{"a":{},"a":{}}'}), ("modules_deep", "nested too deeply", {"spqr_modules": "[" * 1500}),
        ("sha256_text", "digests are not JSON", {"spqr_sha256": "x"}), ("sha256_list", "digests are a list", {"spqr_sha256": []}),
        ("sha256_short", "a digest of 63 digits", {"spqr_sha256": {"norm.weight": "0" * 63}}),
        ("sha256_upper", "a digest in upper case", {"spqr_sha256": {"norm.weight": "A" * 64}}),
        ("sha256_stranger", "a digest of no tensor", {"spqr_sha256": {"nothing": "0" * 64}}),
    ]:  # fmt: skip
        bad("E104", name, why, meta(**values))
    for key in ("out_features", "in_features", "weight_bits", "group_size", "statistics", "outliers", "permuted"):
        bad("E104", f"no_{key}", f"an entry without {key}", module(**{key: None}))
    for name, values in {
        "bits_1": {"weight_bits": 1}, "bits_5": {"weight_bits": 5}, "bits_float": {"weight_bits": 3.0}, "bits_text": {"weight_bits": "3"},
        "bits_true": {"weight_bits": True}, "group_0": {"group_size": 0}, "group_8": {"group_size": 8}, "group_24": {"group_size": 24},
        "group_negative": {"group_size": -16}, "group_float": {"group_size": 16.0}, "group_huge": {"group_size": 2**31},
        "statistics_other": {"statistics": "trilevel"},
        "statistics_number": {"statistics": 2}, "out_0": {"out_features": 0}, "out_negative": {"out_features": -17}, "in_0": {"in_features": 0},
        "in_float": {"in_features": 33.5}, "outliers_negative": {"outliers": -1}, "outliers_text": {"outliers": "7"}, "permuted_1": {"permuted": 1},
        "extra_key": {"zero_points": 1},
    }.items():  # fmt: skip
        bad("E104", name, f"an entry with {values}", module(**values))


def invalid_structure() -> None:
    plain = file(("a", matrix(6, 2, 16)))
    bad("E105", "version", "config.json says 1.1, the shard 1.0", single(config(plain, format_version="1.1")), "single")
    bad(
        "E105",
        "feature_more",
        "config.json lists a feature that no shard uses",
        single(config(plain, features=["bilevel", "perm"])),
        "single",
    )
    bad("E105", "feature_less", "config.json lacks a feature", single(config(plain, features=[])), "single")
    bad(
        "E105",
        "not_converted",
        "a quantized module in modules_to_not_convert",
        single(config(plain, modules_to_not_convert=["a"])),
        "single",
    )

    def pair_with(change: Callable[[File, File], Any], **more: Any) -> Folder:
        one, two = pair()
        change(one, two)
        return sharded(one, two, **more)

    bad(
        "E106",
        "bits",
        "two shards say different weight_bits",
        pair_with(lambda a, b: a.modules["b"].update(weight_bits=4)),
        "sharded",
    )
    bad(
        "E106",
        "columns",
        "two shards say different in_features",
        pair_with(lambda a, b: a.modules["b"].update(in_features=15)),
        "sharded",
    )
    bad(
        "E106",
        "version",
        "two shards of 1.0 and 1.1",
        pair_with(lambda a, b: b.metadata.update(spqr_version="1.1")),
        "sharded",
    )
    bad("E106", "digest", "two shards say different digests", pair_with(lambda a, b: (
        a.metadata.update(spqr_sha256={"norm.weight": "0" * 64}), b.metadata.update(spqr_sha256={"norm.weight": "1" * 64}))), "sharded")  # fmt: skip

    def unlist(a: File, b: File) -> None:
        del a.modules["b"]
        a.metadata["spqr_features"] = ["bilevel"]

    bad("E106", "not_listed", "a shard holds a module's tensor without its entry", pair_with(unlist), "sharded")
    for start, twin, name in ((base, "base", "a"), (direct, "direct", "d")):
        for leaf in Layout(**start().modules[name]).tensors():
            bad(
                "E107",
                f"{twin}_{leaf}",
                f"no {leaf}",
                changed(lambda f, leaf=leaf, name=name: f.drop(f"{name}.{leaf}"), start),
                twin,
            )
    bad("E107", "whole_module", "an entry without any tensor", changed(lambda f: f.modules.update(b=f.modules["a"])))
    bad(
        "E107",
        "renamed",
        "weights instead of weight",
        changed(lambda f: f.entries.update({"a.weights": f.entries.pop("a.weight")})),
    )
    for leaf in ("weight_scale", "g_idx", "qweight", "group_sc", "perm", "x_note"):
        bad(
            "E108",
            leaf,
            f"a.{leaf} beside a bilevel module",
            changed(lambda f, leaf=leaf: f.add(f"a.{leaf}", "I32", np.zeros(1, "i4"))),
        )
    bad(
        "E108",
        "tile_stats_direct",
        "tile_stats in a direct module",
        changed(lambda f: f.add("d.tile_stats", "I16", np.zeros((1, 8), "i2")), direct),
        "direct",
    )
    bad("E108", "outliers", "outliers of a module whose entry has none", changed(
        lambda f: (f.modules["a"].update(outliers=0), f.metadata.update(spqr_features=["bilevel"]))))  # fmt: skip
    bad("E108", "no_perm", "perm of a module whose entry is not permuted", changed(
        lambda f: (f.modules["d"].update(permuted=False), f.metadata.update(spqr_features=["direct", "outliers"])), direct), "direct")  # fmt: skip
    bad("E108", "no_entry", "a module's tensors without its entry", changed(
        lambda f: (f.modules.clear(), f.metadata.update(spqr_features=[]))))  # fmt: skip
    bad(
        "E108",
        "stray_stats",
        "stat_codes of no module",
        changed(lambda f: f.add("lost.stat_codes", "I32", np.zeros((1, 3), "i4"))),
    )
    for start, twin, leaf, dtype in [
        (base, "base", "a.weight", "F32"), (base, "base", "a.weight", "U32"), (base, "base", "a.stat_codes", "U32"),
        (base, "base", "a.tile_stats", "F16"), (base, "base", "a.tile_stats", "U16"), (base, "base", "a.outlier_ptr", "U32"),
        (base, "base", "a.outlier_ptr", "I16"), (base, "base", "a.outlier_ptr", "I64"), (base, "base", "a.outliers", "U32"),
        (base, "base", "a.outliers", "F32"), (base, "base", "a.outliers", "F16"), (base, "base", "a.bias", "I16"), (base, "base", "a.bias", "F64"),
        (direct, "direct", "d.group_sc", "F16"), (direct, "direct", "d.group_sc", "F32"), (direct, "direct", "d.group_zp", "I8"),
        (direct, "direct", "d.group_zp", "I32"), (direct, "direct", "d.perm", "I64"), (direct, "direct", "d.perm", "I16"),
    ]:  # fmt: skip
        shape = start().entries[leaf]["shape"]
        content = changed(lambda f, leaf=leaf, dtype=dtype, shape=shape: f.replace(leaf, dtype, shape), start)
        bad("E109", f"{leaf[2:]}_{dtype.lower()}", f"{leaf} as {dtype}", content, twin)
    for start, twin, leaf, shape in [
        (base, "base", "a.weight", [48, 3]), (base, "base", "a.weight", [144]), (base, "base", "a.weight", [2, 73]), (base, "base", "a.weight", [1, 72]),
        (base, "base", "a.stat_codes", [6, 3]), (base, "base", "a.stat_codes", [2, 9, 1]), (base, "base", "a.tile_stats", [2, 3, 4]),
        (base, "base", "a.tile_stats", [1, 24]), (base, "base", "a.outlier_ptr", [2]), (base, "base", "a.outlier_ptr", [18]),
        (base, "base", "a.outlier_ptr", [3, 1]), (base, "base", "a.outliers", [6]), (base, "base", "a.outliers", [8]), (base, "base", "a.outliers", [1, 7]),
        (base, "base", "a.outliers", [0]),
        (base, "base", "a.bias", [1, 17]), (base, "base", "a.bias", [16]), (direct, "direct", "d.group_sc", [2, 5]), (direct, "direct", "d.group_sc", [16, 2]),
        (direct, "direct", "d.group_zp", [5, 1]), (direct, "direct", "d.group_zp", [10]), (direct, "direct", "d.perm", [19]), (direct, "direct", "d.perm", [32]),
    ]:  # fmt: skip
        dtype = start().entries[leaf]["dtype"]
        content = changed(lambda f, leaf=leaf, dtype=dtype, shape=shape: f.replace(leaf, dtype, shape), start)
        bad("E110", f"{leaf[2:]}_" + "x".join(map(str, shape)), f"{leaf} with shape {shape}", content, twin)
    more_weights = changed(lambda f: f.modules["a"].update(out_features=33))
    bad("E110", "more_rows", "an entry with 33 rows over tensors of 17", more_weights)
    bad("E110", "fewer_outliers", "an entry with 6 outliers over tensors of 7", module(outliers=6))
    bad("E110", "other_bits", "an entry with 4 bits over tensors of 3", module(weight_bits=4))
    bad("E110", "other_group", "an entry with group size 32 over tensors of 16", module(group_size=32))

    def section(**values: Any) -> bytes:
        content = config(plain)
        for key, value in values.items():
            content["quantization_config"][key] = value
            if value is None:
                del content["quantization_config"][key]
        return as_json(content)

    alone = single()
    del alone["config.json"]
    bad("E111", "missing", "no config.json", alone, "single")
    for name, text in {"not_json": b"{", "list": b"[]", "no_section": b'{"model_type":"llama"}', "text": b'"quantization_config"', "section_list": b'{"quantization_config":[]}',
                       "section_null": b'{"quantization_config":null}', "empty": b"", "twice": b'{"quantization_config":{},"quantization_config":{}}',
                       "not_utf8": b'{"x":"\xff"}', "nan": b'{"x":NaN}'}.items():  # fmt: skip
        bad("E111", name, f"config.json is {text!r}", single(text), "single")
    for name, values in {
        "no_method": {"quant_method": None}, "other_method": {"quant_method": "spqr"}, "other_method_and_version": {"quant_method": "gptq", "format_version": "2.0"}, "no_version": {"format_version": None},
        "version_number": {"format_version": 1.0}, "version_text": {"format_version": "1"}, "no_features": {"features": None},
        "features_text": {"features": "bilevel"}, "features_twice": {"features": ["bilevel", "bilevel"]}, "no_bits": {"weight_bits": None}, "bits_5": {"weight_bits": 5},
        "no_group": {"group_size": None}, "group_8": {"group_size": 8}, "no_statistics": {"statistics": None}, "statistics": {"statistics": "x"},
        "unknown_key": {"desc_act": False}, "not_convert_text": {"modules_to_not_convert": "lm_head"}, "not_convert_numbers": {"modules_to_not_convert": [1]},
        "provenance_text": {"provenance": "me"},
    }.items():  # fmt: skip
        bad("E111", name, f"quantization_config with {values}", single(section(**values)), "single")

    whole = hashed().bytes()
    for name, why, old, new in [
        ("tensor_renamed", "one bit of a dense tensor's name", b'"norm.weight":', b'"norm.weighu":'),
        ("rows", "out_features 17 became 19, which pads alike", b'out_features\\":17', b'out_features\\":19'),
        ("shape", "1 x 6 instead of 2 x 3", b'"shape":[2,3]', b'"shape":[1,6]'),
    ]:  # fmt: skip
        assert whole.count(old) == 1, old
        bad("E112", name, why, whole.replace(old, new), "hashed")
    bad("E112", "not_hex", "a digest that is none", meta(spqr_header_sha256="sha256"))
    bad("E112", "zeros", "64 zeros for a digest", meta(spqr_header_sha256="0" * 64))
    bad("E112", "upper", "a digest in upper case", meta(spqr_header_sha256="AB" * 32))


NAN, INF, MINUS_INF = b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"


def invalid_payload() -> None:
    def poke(name: str, element: int, raw: bytes, start: Callable[[], File] = base) -> File:
        return changed(lambda f: f.poke(name, element, raw), start)

    for k, which in enumerate(("ss", "sz", "zs", "zz")):
        bad("E201", f"nan_{which}", f"{which} is NaN", poke("a.tile_stats", k, NAN))
    bad("E201", "inf", "the last statistic is infinite", poke("a.tile_stats", 23, INF))
    bad("E201", "minus_inf", "a statistic is -infinite", poke("a.tile_stats", 9, MINUS_INF))
    bad("E201", "signalling_nan", "a signalling NaN", poke("a.tile_stats", 5, b"\x01\x7c"))
    bad("E201", "direct_nan", "a direct scale is NaN", poke("d.group_sc", 9, NAN, direct), "direct")
    bad("E201", "direct_inf", "a direct scale is infinite", poke("d.group_sc", 0, INF, direct), "direct")

    def flip(name: str, element: int, bit: int, start: Callable[[], File] = base) -> File:
        f = start()
        word = int.from_bytes(f.raw(name)[4 * element : 4 * element + 4], "little") ^ (1 << bit)
        f.poke(name, element, word.to_bytes(4, "little"))
        return f

    # base: 17 x 33, so tile 1 has one real row (row 0 of lane 0) and block 2 one real column. No full chunk: word k of lane l
    # of block b is element 72 * tile + (8 * k + l) * 3 + b.
    bad("E202", "row", "a code in row 17", flip("a.weight", 72 + 1 * 3, 1))
    bad("E202", "row_8", "a code in row 24, in lane 0 beside a real row", flip("a.weight", 72 + 16 * 3, 1))
    bad("E202", "row_spread", "the spread bit of row 24", flip("a.weight", 72, 0))
    bad("E202", "column", "a code in column 34", flip("a.weight", 8 * 3 + 2, 1))
    bad("E202", "column_odd", "a code in column 33", flip("a.weight", 2, 17))
    bad("E202", "corner", "the last bit of the last word", flip("a.weight", 143, 31))
    bad("E202", "stat_row", "statistics codes of row 17", flip("a.stat_codes", 9, 12))
    bad("E202", "stat_last", "the last bit of the statistics codes", flip("a.stat_codes", 17, 31))
    bad("E202", "bits_2", "a code in row 9 of 9", flip("a.weight", 2 * 1, 8, OK["bits_2"][1]), "bits_2")  # type: ignore[arg-type]
    bad("E202", "bits_4", "a column of block 1", flip("a.weight", 1, 31, OK["bits_4"][1]), "bits_4")  # type: ignore[arg-type]
    bad("E202", "direct", "a padded row of a direct module", flip("d.weight", 2 * 7, 0, direct), "direct")
    # chunk_short: 20 x 250, one full chunk, so row 4 and 12 of lane 4 of tile 1 are padded, and columns 10 .. 15 of block 15
    tile = 8 * 3 * 16
    for name, why, element, bit in (
        ("chunk_row", "a code in row 20, block 6", tile + 4 * 16 + 2 * 4 + 1, 1),
        ("chunk_row_spread", "the spread bit of row 28, block 0, column 3", tile + 2 * 128 + 4 * 16, 16),
        ("chunk_column", "a code in column 250, tile 0", 128 + 7 * 16 + 15, 7),
        ("chunk_column_last", "a code in column 255, tile 1", tile + 128 + 3 * 16 + 15, 16 + 10),
    ):
        bad("E202", name, why, flip("a.weight", element, bit, chunk_short), "chunk_short")
    # set_32: 21 x 553 in groups of 32, so a set and two groups; row 21 is the first padded one, row 5 of lane 5 of tile 1
    tile = 3 * 18
    for name, why, element, bit in (
        ("set_row", "statistics codes of row 21, group 1", tile + 4 * 5, 12),
        ("set_high_bits", "statistics codes of row 29, group 10", tile + 32 + (4 * 5 + 1) // 2, 16),
        ("set_tail", "statistics codes of row 21, group 17", tile + 48 + 12 * 5 // 32 * 2 + 1, 12 * 5 % 32),
    ):
        bad("E202", name, why, flip("a.stat_codes", element, bit, chunks_32), "set_32")
    row = flip("a.weight", 8 * 3 * 35 + 384 + 5 * 16 + 4, 1, chunks_32)
    bad("E202", "chunks_row", "a code in row 21, chunk 1, block 1 of it", row, "set_32")
    column = flip("a.weight", 2 * 384 + 2 * 3 + 2, 16 + 7, chunks_32)
    bad("E202", "tail_column", "a code in column 553, tile 0", column, "set_32")
    for name, element, value in (
        ("above", 3, 20),
        ("negative", 0, -1),
        ("huge", 19, 2**31 - 1),
        ("most_negative", 7, -(2**31)),
    ):
        bad(
            "E203",
            name,
            f"perm[{element}] = {value}",
            poke("d.perm", element, struct.pack("<i", value), direct),
            "direct",
        )
    twice = direct().raw("d.perm")[:4]
    bad("E203", "twice", "perm[12] = perm[0]", poke("d.perm", 12, twice, direct), "direct")
    bad(
        "E203",
        "zeros",
        "all zeros",
        changed(lambda f: [f.poke("d.perm", k, bytes(4)) for k in range(20)], direct),
        "direct",
    )
    bad("E204", "bias_nan", "an F16 bias is NaN", poke("a.bias", 3, NAN))
    bad("E204", "bias_inf", "an F16 bias is infinite", poke("a.bias", 16, INF))
    bad("E204", "bias_bf16", "a BF16 bias is NaN", poke("d.bias", 0, b"\xc0\x7f", direct), "direct")
    bad("E204", "dense_f32", "an F32 tensor is NaN", poke("norm.weight", 3, struct.pack("<f", float("nan"))))
    bad("E204", "dense_bf16", "a BF16 tensor is -infinite", poke("embed.weight", 5, b"\x80\xff"))
    # name -> byte of the tensor: of an outlier that of its value, where every bit is legal
    for name, byte in {
        "a.weight": 0,
        "a.tile_stats": 2,
        "a.outliers": 26,
        "norm.weight": 12,
        "a.bias": 0,
        "embed.weight": 2,
    }.items():

        def nudge(f: File, name: str = name, byte: int = byte) -> None:
            place = f.entries[name]["data_offsets"][0] + byte
            f.data = f.data[:place] + bytes([f.data[place] ^ 1]) + f.data[place + 1 :]

        f = hashed()
        head = f.bytes()[: len(f.bytes()) - len(f.data)]
        nudge(f)
        bad("E205", name.replace(".", "_"), f"one bit of {name}", head + f.data, "hashed")


def invalid_outliers() -> None:
    def poke(name: str, element: int, raw: bytes, start: Callable[[], File] = cells) -> File:
        return changed(lambda f: f.poke(name, element, raw), start)

    def pointer(element: int, value: int) -> File:
        return poke("a.outlier_ptr", element, struct.pack("<i", value))

    def moved(element: int, position: int, start: Callable[[], File] = cells, name: str = "a") -> File:
        """The outlier at another position, with its value."""
        value = start().raw(f"{name}.outliers")[4 * element + 2 : 4 * element + 4]
        return poke(f"{name}.outliers", element, struct.pack("<H", position) + value, start)

    def swapped(f: File, element: int) -> None:
        words = f.raw("a.outliers")[4 * element : 4 * element + 8]
        f.poke("a.outliers", element, words[4:])
        f.poke("a.outliers", element + 1, words[:4])

    # cells: 18 x 300, so two tiles of three cells, with rows 16 and 17 in tile 1 and columns 256 .. 299 in the last cell
    assert np.frombuffer(cells().raw("a.outlier_ptr"), "<i4").tolist() == [0, 4, 8, 12, 12, 12, 14]
    last_tile = changed(lambda f: [f.poke("a.outlier_ptr", k, struct.pack("<i", 11)) for k in (3, 4, 5)], cells)
    for code, name, why, fault in (
        ("E301", "one", "outlier_ptr starts at 1", pointer(0, 1)),
        ("E301", "negative", "outlier_ptr starts at -1", pointer(0, -1)),
        ("E301", "most", "outlier_ptr starts at 2^31 - 1", pointer(0, 2**31 - 1)),
        ("E302", "middle", "outlier_ptr rises to 2^31 - 1 and falls", pointer(1, 2**31 - 1)),
        ("E302", "by_one", "outlier_ptr falls by one", pointer(4, 11)),
        ("E302", "negative", "a pointer is -1", pointer(2, -1)),
        ("E302", "last", "outlier_ptr falls at its end", pointer(6, 11)),
        ("E302", "over_the_end", "outlier_ptr rises above the outliers and falls back", pointer(5, 15)),
        ("E303", "short", "outlier_ptr ends one early", pointer(6, 13)),
        ("E303", "long", "outlier_ptr ends one late", pointer(6, 15)),
        ("E303", "most", "outlier_ptr ends at 2^31 - 1", pointer(6, 2**31 - 1)),
        ("E303", "zeros", "outlier_ptr is all 0", changed(lambda f: [f.poke("a.outlier_ptr", k, bytes(4)) for k in range(7)], cells)),
        ("E304", "column", "column 300 of 300", moved(11, 4096 * 10 + 300)),
        ("E304", "last_column", "the last column of the last cell", moved(13, 4096 + 383)),
        ("E304", "row", "row 18 of 18", moved(13, 4096 * 2 + 256)),
        ("E304", "last_row", "the last row of the last cell", moved(13, 4096 * 15 + 299)),
        ("E304", "column_before", "the last column of the cell before", moved(8, 4096 + 255)),
        ("E304", "column_behind", "the first column of the cell behind", moved(3, 4096 * 10 + 128)),
        ("E304", "column_in_cell", "a column counted from its cell's first", moved(11, 4096 * 9 + 38)),
        ("E304", "most", "position 65535", moved(11, 65535)),
        ("E304", "next_cell", "an outlier counted to the next cell", pointer(1, 3)),
        ("E304", "next_tile", "an outlier of tile 0 counted to tile 1", last_tile),
        ("E305", "equal", "a position twice in a cell", moved(9, 4096 + 270)),
        ("E305", "falls", "two outliers change places", changed(lambda f: swapped(f, 2), cells)),
        ("E305", "last_cell", "a position twice in the last cell", moved(13, 4096 + 260)),
    ):  # fmt: skip
        bad(code, name, why, fault, "cells")
    bad("E304", "base", "column 33 of 33", moved(6, 33, base))
    bad("E304", "direct", "row 5 of 5", moved(4, 4096 * 5, direct, "d"), "direct")
    bad("E305", "columns", "columns fall within a row", changed(lambda f: swapped(f, 0), dense_outliers), "dense_outliers")
    bad("E305", "rows", "rows fall", changed(lambda f: swapped(f, 4), dense_outliers), "dense_outliers")
    for name, raw in {"nan": NAN, "inf": INF, "minus_inf": MINUS_INF, "minus_nan": b"\xff\xff"}.items():
        bad("E306", name, f"a value is {name}", changed(lambda f, raw=raw: set_value(f, "a.outliers", 4, raw)))
    bad("E306", "direct", "the last value is NaN", changed(lambda f: set_value(f, "d.outliers", 4, NAN), direct), "direct")


def invalid_index() -> None:
    good = sharded()
    one, two = pair()
    weight_map = json.loads(good["model.safetensors.index.json"])["weight_map"]

    def without(*names: str) -> Folder:
        return {name: content for name, content in good.items() if name not in names}

    def index(content: Any) -> Folder:
        return sharded(index=content if isinstance(content, bytes) else as_json(content))

    bad("E401", "missing", "two shards and no index", without("model.safetensors.index.json"), "sharded")
    for name, text in {"not_json": b"{", "list": b"[]", "empty": b"", "no_map": b"{}", "empty_map": b'{"weight_map":{}}', "map_list": b'{"weight_map":[]}',
                       "number": b'{"weight_map":{"a.weight":1}}', "no_name": b'{"weight_map":{"a.weight":""}}', "nan": b'{"metadata":{"x":NaN},"weight_map":{}}',
                       "deep": b"[" * 1500}.items():  # fmt: skip
        bad("E401", name, f"the index is {text[:40]!r}", index(text), "sharded")
    bad("E401", "extra_key", "an unknown key", index({"weight_map": weight_map, "shards": 2}), "sharded")
    bad("E401", "metadata_text", "text for metadata", index({"weight_map": weight_map, "metadata": "x"}), "sharded")
    bad(
        "E401",
        "two_ways",
        "model.safetensors beside an index",
        {**good, "model.safetensors": single()["model.safetensors"]},
        "sharded",
    )
    bad(
        "E401",
        "same_key_twice",
        "a tensor twice in the index",
        index(b'{"weight_map":{"a.weight":"x.safetensors","a.weight":"y.safetensors"}}'),
        "sharded",
    )
    bad(
        "E401",
        "other_suffix",
        "a shard that is a .bin",
        index({"weight_map": {**weight_map, "a.weight": "model.bin"}}),
        "sharded",
    )
    bad("E402", "second", "the second shard is missing", without(NAMES[1]), "sharded")
    bad("E402", "first", "the first shard is missing", without(NAMES[0]), "sharded")
    bad("E402", "nothing", "no shard at all", {"config.json": good["config.json"]}, "sharded")
    bad(
        "E403",
        "wrong_shard",
        "the index names the other shard",
        sharded(index={**weight_map, "a.weight": NAMES[1]}),
        "sharded",
    )
    bad(
        "E403",
        "nowhere",
        "the index names a tensor that no shard has",
        sharded(index={**weight_map, "c.weight": NAMES[0]}),
        "sharded",
    )
    bad(
        "E403",
        "unlisted",
        "a tensor that the index does not list",
        sharded(index={k: v for k, v in weight_map.items() if k != "norm.weight"}),
        "sharded",
    )
    one.add("norm.weight", "F32", np.ones(4, "f4"))
    bad("E404", "dense", "a dense tensor in both shards", sharded(one, None, index=weight_map), "sharded")
    one, two = pair()
    two.add("b.outliers", "I32", np.frombuffer(one.raw("b.outliers"), "<i4"))
    bad("E404", "module", "a module's tensor in both shards", sharded(None, two, index=weight_map), "sharded")
    for name, target in {"parent": "../model.safetensors", "absolute": "/etc/model.safetensors", "sub": "sub/model.safetensors", "dots": "..",
                         "dot": ".", "backslash": "..\\model.safetensors", "drive": "c:model.safetensors", "nul": "a\0.safetensors"}.items():  # fmt: skip
        bad("E405", name, f"a shard called {target!r}", sharded(index={**weight_map, "a.weight": target}), "sharded")


def expected(content: File | Folder) -> dict[str, Any]:
    """Module -> shape and fp32 bytes of W, by the reference decoder."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = {"x.safetensors": content.bytes()} if isinstance(content, File) else content
        paths = []
        for name, raw in files.items():
            (Path(folder) / name).write_bytes(raw)
            paths += [Path(folder) / name] if name.endswith(".safetensors") else []
        result = {}
        for name, weight in sorted(reference_decoder.decode_files(sorted(paths)).items()):
            raw = weight.astype("<f4").tobytes()
            value = {"hex": raw.hex()} if len(raw) <= INLINE else {"sha256": hashlib.sha256(raw).hexdigest()}
            result[name] = {"shape": list(weight.shape), "float32": value}
        return result


def vectors() -> dict[str, bytes]:
    """Path under spec/vectors -> bytes, of every file."""
    result: dict[str, bytes] = {}

    def put(stem: str, content: bytes | Folder, record: dict[str, Any]) -> None:
        result[f"{stem}.json"] = (json.dumps(record, indent=1) + "\n").encode()
        if isinstance(content, bytes):
            result[f"{stem}.safetensors"] = content
        else:
            result.update({f"{stem}/{name}": raw for name, raw in content.items()})

    for name, (why, make) in OK.items():
        content = make()
        put(
            f"ok/{name}",
            content.bytes() if isinstance(content, File) else content,
            {"why": why, "weights": expected(content)},
        )
    BAD.clear()
    for group in (malformed, invalid_metadata, invalid_structure, invalid_payload, invalid_outliers, invalid_index):
        group()
    for name, (code, why, twin, content) in BAD.items():
        folder = "malformed" if code.startswith("E0") else "invalid"
        assert twin in OK, twin
        put(f"{folder}/{name}", content, {"code": code, "why": why, "twin": f"ok/{twin}"})
    return result


def main() -> int:
    """0 if the vectors are up to date (or were written), 1 if --check finds a difference."""
    wanted = vectors()
    if "--check" in sys.argv:
        found = {str(path.relative_to(VECTORS)): path.read_bytes() for path in VECTORS.rglob("*") if path.is_file()}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        print("\n".join(f"differs: {name}" for name in wrong) or f"{len(wanted)} files are up to date")
        return bool(wrong)
    shutil.rmtree(VECTORS, ignore_errors=True)
    for name, raw in wanted.items():
        (VECTORS / name).parent.mkdir(parents=True, exist_ok=True)
        (VECTORS / name).write_bytes(raw)
    codes = sorted({re.match(r"\w+/(e\d+)", name)[1] for name in wanted if name[:2] != "ok"})  # type: ignore[index]
    print(f"{len(wanted)} files: {len(OK)} valid, {len(BAD)} broken in {len(codes)} codes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page, the code and the vectors say the same: codes, layout table, worked examples, limits, links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import spqr_format
from spqr_format import CODES, header, layout, metadata
from spqr_format.packing import FIELDS, SPREAD, pack_codes, pack_outliers, pack_stat_codes, to_grid

PACKAGE = Path(spqr_format.__file__).parent


@pytest.fixture(scope="module")
def page(spec) -> str:
    return (spec / "spqr-1.0.md").read_text("utf-8")


def test_codes_of_page_package_and_vectors_are_the_same(spec, page):
    rules = re.findall(r"^\| (E\d{3}) \|", page, re.MULTILINE)
    assert rules == list(CODES), "one row for each code, in order"
    covered = [json.loads(path.read_text())["code"] for path in spec.glob("vectors/*alid/*.json")]
    covered += [json.loads(path.read_text())["code"] for path in spec.glob("vectors/malformed/*.json")]
    assert set(covered) == {code for code in CODES if code < "E5"}
    assert min(covered.count(code) for code in set(covered)) >= 2


def test_every_code_is_raised_somewhere():
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py") if path.name != "errors.py")
    assert [code for code in CODES if code < "E5" and f'"{code}"' not in source] == []


def test_field_table(page):
    rows = re.findall(r"^\| ([234]) \| (l|l \+ 8) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for bits, row, cells in rows:
        fields = [(0, SPREAD) if cell == "`*`" else tuple(map(int, cell.split(", "))) for cell in cells.split(" | ")]
        assert fields == list(FIELDS[int(bits)][row != "l"])


def words(page: str, fence: str) -> list[list[int]]:
    (block,) = re.findall(rf"```{fence}\n(.+?)```", page, re.DOTALL)
    return [[int(word, 16) for word in line.split()] for line in block.strip().splitlines()]


def test_worked_examples(page):
    assert "q[r][c] = (r * r + 3 * c + (r * c) // 4) mod 2^weight_bits" in page
    assert "sq[r] = (3 * r + 1) mod 8 and zq[r] = (5 * r * r + 2) mod 8" in page
    r, c = np.indices((16, 16))
    for bits in (2, 3, 4):
        q = ((r * r + 3 * c + (r * c) // 4) % 2**bits).astype(np.uint8)
        assert pack_codes(q, bits).view(np.uint32).reshape(bits, 8).tolist() == words(page, f"spqr-weight-{bits}")
    rows = np.arange(16)[:, None]
    packed = pack_stat_codes(((3 * rows + 1) % 8).astype(np.uint8), ((5 * rows * rows + 2) % 8).astype(np.uint8))
    assert packed.view(np.uint32)[0].tolist() == words(page, "spqr-stats")[0]


def test_worked_examples_with_a_chunk_and_a_tail(page):
    assert "q[r][c] = (r * r + 3 * c + (r * c) // 4 + c // 16) mod 4" in page
    assert "sq[r][g] = (3 * r + 1 + g) mod 8 and zq[r][g] = (5 * r * r + 2 + 3 * g) mod 8" in page
    r, c = np.indices((16, 288))
    packed = pack_codes(((r * r + 3 * c + (r * c) // 4 + c // 16) % 4).astype(np.uint8), 2)
    (example,) = re.findall(r"```spqr-weight-chunk\n(.+?)```", page, re.DOTALL)
    lines = [line.split() for line in example.strip().splitlines()]
    assert len(lines) == 12
    for line in lines:
        column, block, lane, k = map(int, line[:4])
        assert packed.view(np.uint32)[0, column] == int(line[4], 16) == to_grid(packed, 2).view(np.uint32)[0, k, lane, block]
    r, g = np.indices((16, 18))
    packed = pack_stat_codes(((3 * r + 1 + g) % 8).astype(np.uint8), ((5 * r * r + 2 + 3 * g) % 8).astype(np.uint8))
    assert packed.view(np.uint32)[0].tolist() == [word for line in words(page, "spqr-stats-set") for word in line]


def test_worked_example_of_outliers(page):
    found = re.findall(r"S\[(\d+), (\d+)\] = (-?\d+(?:\.\d+)?)", page)
    dense = np.zeros((18, 300), np.float16)
    assert f"A matrix of {dense.shape[0]} x {dense.shape[1]}" in page
    for row, column, value in found:
        dense[int(row), int(column)] = value
    rows, columns = np.nonzero(dense)
    crow = np.concatenate([[0], np.bincount(rows, minlength=18).cumsum()])
    pointers, outliers = pack_outliers(crow, columns, dense[rows, columns], 300)
    example = re.findall(r"```spqr-outliers\n(.+)\n(.+)\n```", page)
    assert len(rows) == 4
    assert example == [(" ".join(map(str, pointers)), " ".join(f"{word:08x}" for word in outliers.view(np.uint32)))]


def test_worked_numbers_of_the_decoding(page):
    pattern = r"ss = (\S+) \((\w+)\), sz = (\S+) \((\w+)\), zs = (\S+) \((\w+)\), zz = (\S+) \((\w+)\), sq = (\d), zq = (\d)"
    found = re.search(pattern, page)
    assert found is not None
    numbers = [np.float16(found[k]) for k in (1, 3, 5, 7)]
    assert [f"{number.view(np.uint16):04x}" for number in numbers] == [found[k] for k in (2, 4, 6, 8)]
    ss, sz, zs, zz = (np.float32(number) for number in numbers)
    s, z = ss * (np.float32(found[9]) - sz), zs * (np.float32(found[10]) - zz)
    d = s * (np.float32(6) - z)
    assert f"s = {s}, z = {z}, D = {d} and W = {d + np.float32(0.5)}" in " ".join(page.split())


def test_limits(page):
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| E00[26] \|$", page, re.MULTILINE))
    assert rows == {
        "header bytes N": f"2 .. {header.MAX_HEADER_BYTES}",
        "config.json, index": f"{header.MAX_JSON_BYTES} bytes",
        "tensors in a file": f"{header.MAX_TENSORS}",
        "lists in a header": f"{4 * header.MAX_TENSORS}",
        "tensor or module name": f"{header.MAX_NAME_BYTES} bytes of UTF-8",
        "rank": f"{header.MAX_RANK}",
        "a dimension, a tensor's elements": "2^40",
        "out_features, in_features": "2^31 - 1",
        "out_features * in_features": "2^40",
        "outliers": "out_features * in_features and 2^31 - 1",
        "shards": f"{header.MAX_SHARDS}",
    }
    assert header.MAX_TENSOR_ELEMENTS == layout.MAX_ELEMENTS == 2**40
    assert layout.MAX_DIMENSION == layout.MAX_OUTLIERS == 2**31 - 1


def test_dtypes_features_and_version(page):
    listed = re.search(r"### 6.2 dtypes\n(.+?)\. Any other", page, re.DOTALL)
    assert listed is not None
    assert set(listed[1].split()) == set(header.DTYPE_BYTES)
    assert tuple(re.findall(r"^\| `(\w+)` \| (?:statistics|outliers|permuted) ", page, re.MULTILINE)) == metadata.FEATURES
    assert page.startswith(f"# SpQR checkpoint format {metadata.FORMAT_VERSION}\n")


def test_example_config_follows_its_schema(page):
    (example,) = re.findall(r"```json\n(.+?)```", page, re.DOTALL)
    metadata.check_config(json.loads(example), "example")


def test_schemas_are_schemas():
    schemas = sorted((PACKAGE / "schema").glob("*.json"))
    assert len(schemas) == 5
    for path in schemas:
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_sections_that_the_code_names_exist(page):
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", page, re.MULTILINE))
    for path in PACKAGE.glob("*.py"):
        for named in re.findall(r"\(spec (\d+(?:\.\d+)?)", path.read_text()):
            assert named in sections, (path.name, named)


def test_links(spec):
    for name in ("spqr-1.0.md", "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (spec / name).read_text("utf-8")):
            assert (spec / target).exists(), (name, target)


def test_counts_in_the_readme(spec):
    accept, refuse = (len(list(spec.glob(f"vectors/{kind}/*.json"))) for kind in ("ok", "*d"))
    assert f"{accept} files to accept, {refuse} to refuse" in (spec / "README.md").read_text("utf-8")

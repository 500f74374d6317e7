"""The CSR rules against torch's own checks and against a plain loop, on random broken matrices (R6)."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from spqr_format import Layout, SpqrError
from spqr_format import payload as payload_module
from spqr_format.payload import check_payload

torch = pytest.importorskip("torch")


def first_broken_rule(crow: list[int], columns: list[int], width: int) -> str | None:
    """The rules of spec 5.3, one by one."""
    if crow[0] != 0:
        return "E301"
    for before, after in pairwise(crow):
        if after < before:
            return "E302"
    if crow[-1] != len(columns):
        return "E303"
    if any(not 0 <= column < width for column in columns):
        return "E304"
    for begin, end in pairwise(crow):
        if any(b <= a for a, b in zip(columns[begin:end], columns[begin + 1 : end], strict=False)):
            return "E305"
    return None


def torch_refuses(crow: list[int], columns: list[int], rows: int, width: int) -> bool:
    try:
        torch.sparse_csr_tensor(torch.tensor(crow), torch.tensor(columns), torch.ones(len(columns)), (rows, width),
                                check_invariants=True)  # fmt: skip
    except RuntimeError:
        return True
    return False


def ours(crow: list[int], columns: list[int], rows: int, width: int) -> str | None:
    layout = Layout(rows, width, outliers=len(columns))
    tensors = {leaf: np.zeros(spec.shape, {"I32": "i4", "I16": "i2"}[spec.dtype]) for leaf, spec in layout.tensors().items()}
    tensors["crow_indices"] = np.array(crow, np.uint16).view(np.int16)
    tensors["col_indices"] = np.array(columns, np.uint16).view(np.int16)
    try:
        check_payload(layout, tensors, "m")
    except SpqrError as error:
        return error.code
    return None


def random_csr(source: random.Random) -> tuple[list[int], list[int], int, int]:
    """A valid CSR, or one with a few random numbers changed."""
    rows, width = source.randint(1, 6), source.randint(1, 9)
    crow, columns = [0], []
    for _ in range(rows):
        columns += sorted(source.sample(range(width), source.randint(0, width)))
        crow.append(len(columns))
    if not columns:
        columns, crow = [0], [0] * rows + [1]
    for _ in range(source.choice([0, 1, 1, 2])):
        numbers = source.choice([crow, columns])
        numbers[source.randrange(len(numbers))] = source.choice([source.randint(0, 9), source.randint(0, 20), 65535])
    if source.random() < 0.2 and len(columns) > 1:
        a, b = source.sample(range(len(columns)), 2)
        columns[a], columns[b] = columns[b], columns[a]
    return crow, columns, rows, width


@pytest.mark.parametrize("block", [2**18, 3, 1])
def test_verdicts_agree(block, monkeypatch):
    """Small blocks: the rules look at numbers across the borders of the blocks that they read."""
    monkeypatch.setattr(payload_module, "BLOCK", block)
    source, codes = random.Random(block), Counter()
    for _ in range(5000):
        crow, columns, rows, width = random_csr(source)
        code = ours(crow, columns, rows, width)
        assert code == first_broken_rule(crow, columns, width), (crow, columns, rows, width)
        assert (code is not None) == torch_refuses(crow, columns, rows, width), (crow, columns, rows, width, code)
        codes[code] += 1
    assert codes.keys() == {None, "E301", "E302", "E303", "E304", "E305"}
    assert min(codes.values()) >= 50, codes


@pytest.mark.parametrize("block", [2**18, 7])
def test_other_rules_across_block_borders(block, monkeypatch, random_matrix):
    monkeypatch.setattr(payload_module, "BLOCK", block)
    monkeypatch.setattr(payload_module, "PERM_WINDOW", 8 if block == 7 else 2**24)
    source = np.random.default_rng(1)
    for k in range(60):
        out, inn = int(source.integers(1, 40)), int(source.integers(2, 70))
        matrix = random_matrix(out, inn, outliers=0.2, permuted=True, seed=k)
        stored = {leaf: array.copy() for leaf, array in matrix.pack().items()}
        check_payload(matrix.layout, stored, "m")
        perm = stored["perm"].copy()
        perm[source.integers(inn)] += 1  # one number is now missing, another stands twice or is out of range
        with pytest.raises(SpqrError) as caught:
            check_payload(matrix.layout, {**stored, "perm": perm}, "m")
        assert caught.value.code == "E203"
        if "values" in stored:
            values = stored["values"].copy()
            place = int(source.integers(values.size))
            values[place] = 0x7C00
            with pytest.raises(SpqrError, match=rf"E306 m\.values\[{place}\]"):
                check_payload(matrix.layout, {**stored, "values": values}, "m")


def test_errors_name_tensor_index_and_value(random_matrix):
    matrix = random_matrix(20, 40, outliers=1.0)
    stored = matrix.pack()
    stored["col_indices"] = stored["col_indices"].copy()
    stored["col_indices"][39] = 40
    with pytest.raises(SpqrError) as caught:
        check_payload(matrix.layout, stored, "layers.0.up")
    assert str(caught.value) == "SPQR-E304 layers.0.up.col_indices[39]: 40: the weight has 40 columns"


def test_signed_indices_of_large_matrices():
    """I32 columns and row pointers are signed: a negative one is refused, not taken for a large one."""
    layout = Layout(1, 65552, 2, 65552, "direct", outliers=2)
    good = {
        leaf: np.zeros(spec.shape, {"I32": "i4", "I16": "i2", "U8": "u1"}[spec.dtype])
        for leaf, spec in layout.tensors().items()
    }
    good["crow_indices"][1] = 2
    good["col_indices"][1] = 65551
    check_payload(layout, good, "m")
    with pytest.raises(SpqrError, match="E304"):
        check_payload(layout, {**good, "col_indices": np.array([-1, 5], np.int32)}, "m")
    layout = Layout(256, 256, outliers=65536)
    many = {leaf: np.zeros(spec.shape, {"I32": "i4", "I16": "i2"}[spec.dtype]) for leaf, spec in layout.tensors().items()}
    many["col_indices"] = np.tile(np.arange(256, dtype=np.int16), 256)
    many["crow_indices"] = (np.arange(257) * 256).astype(np.int32)
    check_payload(layout, many, "m")
    many["crow_indices"][3] = -5
    with pytest.raises(SpqrError, match="E302"):
        check_payload(layout, many, "m")


@pytest.mark.parametrize(("change", "code"), [
    (lambda t: t.pop("weight"), "E107"), (lambda t: t.update(weight=t["weight"].astype(np.int64)), "E109"),
    (lambda t: t.update(values=t["values"][1:]), "E110"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_layout(random_matrix, change, code):
    matrix = random_matrix(20, 40, outliers=0.5)
    stored = matrix.pack()
    change(stored)
    with pytest.raises(SpqrError, match=code):
        check_payload(matrix.layout, stored, "m")

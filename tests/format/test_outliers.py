"""Outliers: packing against a plain loop, and the rules of spec 5.3 on random broken cells (R6)."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spqr_format import Layout, SpqrError, SpqrMatrix
from spqr_format import payload as payload_module
from spqr_format.packing import pack_outliers, unpack_outliers
from spqr_format.payload import check_payload


def slow_cells(dense: np.ndarray) -> tuple[list[int], list[int]]:
    """outlier_ptr and outliers of the places of a dense matrix of fp16 bits that are not 0, by spec 5.3."""
    out, inn = dense.shape
    pointers, words = [0], []
    for tile in range(0, out, 16):
        for cell in range(0, inn, 128):
            for row in range(tile, min(tile + 16, out)):
                for column in range(cell, min(cell + 128, inn)):
                    if dense[row, column]:
                        words.append(int(dense[row, column]) << 16 | 4096 * (row % 16) + column % 4096)
            pointers.append(len(words))
    return pointers, words


def csr_of(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = np.nonzero(dense)
    crow = np.concatenate([[0], np.bincount(rows, minlength=len(dense)).cumsum()])
    return crow, columns, dense[rows, columns].view(np.float16)


@given(out=st.integers(1, 50), inn=st.integers(1, 600) | st.integers(4000, 4500),
       share=st.sampled_from([0.0, 0.002, 0.05, 1.0]), seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_outliers_lie_where_the_spec_says(out, inn, share, seed):
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 2**16, (out, inn), dtype=np.uint16) * (rng.random((out, inn)) < share)
    crow, columns, values = csr_of(dense)
    pointers, words = pack_outliers(crow, columns, values, inn)
    assert (pointers.dtype, words.dtype) == (np.int32, np.int32)
    assert (pointers.tolist(), words.view(np.uint32).tolist()) == slow_cells(dense)
    again = unpack_outliers(pointers, words, out, inn)
    for found, given_ in zip(again, (crow, columns, values), strict=True):
        assert np.array_equal(found.view(f"u{found.itemsize}"), given_.view(f"u{given_.itemsize}"))


@pytest.mark.parametrize(("crow", "columns", "code"), [
    ([1, 2, 3], [0, 1, 2], "E301"), ([0, 4, 3], [0, 1, 2], "E302"), ([0, 1, 2], [0, 1, 2], "E303"),
    ([0, 1, 4], [0, 1, 2], "E303"), ([0, 1, 3], [0, 1, 300], "E304"), ([0, 1, 3], [-1, 1, 2], "E304"),
    ([0, 1, 3], [7, 299, 2], "E305"), ([0, 2, 3], [4, 4, 0], "E305"), ([0, 3, 3], [4, 5, 0], "E305"),
])  # fmt: skip
def test_what_is_no_csr_is_not_packed(crow, columns, code):
    """In cells it would be another matrix."""
    codes, statistics = np.zeros((2, 300), np.uint8), np.zeros((2, 2, 19), np.uint8)
    csr = {"crow_indices": np.array(crow), "col_indices": np.array(columns), "values": np.ones(3, np.float16)}
    matrix = SpqrMatrix(Layout(2, 300), codes, *statistics, np.zeros((1, 19, 4), np.float16), **csr)
    with pytest.raises(SpqrError, match=code):
        matrix.pack()


def first_broken_rule(pointers: list[int], positions: list[int], out: int, inn: int) -> str | None:
    """The rules of spec 5.3, one by one."""
    if pointers[0] != 0:
        return "E301"
    for before, after in pairwise(pointers):
        if after < before:
            return "E302"
    if pointers[-1] != len(positions):
        return "E303"
    cells_a_tile = -(-inn // 128)
    for cell, (begin, end) in enumerate(pairwise(pointers)):
        tile, h = divmod(cell, cells_a_tile)
        rows, columns = range(16 * tile, min(16 * tile + 16, out)), range(128 * h, min(128 * h + 128, inn))
        for position in positions[begin:end]:
            if 16 * tile + position // 4096 not in rows or position % 4096 not in [column % 4096 for column in columns]:
                return "E304"
    for begin, end in pairwise(pointers):
        if any(b <= a for a, b in pairwise(positions[begin:end])):
            return "E305"
    return None


def tensors_of(layout: Layout) -> dict[str, np.ndarray]:
    """Valid tensors of zeros, outliers apart."""
    dtypes = {"I32": "i4", "I16": "i2", "U8": "u1"}
    return {leaf: np.zeros(spec.shape, dtypes[spec.dtype]) for leaf, spec in layout.tensors().items()}


def ours(pointers: list[int], positions: list[int], out: int, inn: int) -> str | None:
    layout = Layout(out, inn, outliers=len(positions))
    tensors = tensors_of(layout)
    tensors["outlier_ptr"] = np.array(pointers, np.int32)
    tensors["outliers"] = (np.array(positions, np.uint32) | np.uint32(0xBC00 << 16)).view(np.int32)
    try:
        check_payload(layout, tensors, "m")
    except SpqrError as error:
        return error.code
    return None


def random_cells(source: random.Random) -> tuple[list[int], list[int], int, int]:
    """Valid cells, or ones with a few random numbers changed."""
    out, inn = (
        source.randint(1, 40),
        source.choice([source.randint(1, 30), source.randint(120, 270), source.randint(4090, 4400)]),
    )
    pointers, positions = [0], []
    for tile in range(0, out, 16):
        for cell in range(0, inn, 128):
            rows, columns = range(min(16, out - tile)), range(cell, min(cell + 128, inn))
            found = {4096 * source.choice(rows) + source.choice(columns) % 4096 for _ in range(source.choice([0, 0, 1, 3, 5]))}
            positions += sorted(found)
            pointers.append(len(positions))
    if not positions:
        positions, pointers[-1] = [0], 1
    for _ in range(source.choice([0, 1, 1, 2])):
        numbers = source.choice([pointers, positions])
        change = source.choice([source.randint(0, 4), source.choice(positions), source.choice(positions) + 1, 4096, 40000, -1])
        numbers[source.randrange(len(numbers))] = change if numbers is pointers else change % 2**16
    if source.random() < 0.3 and len(positions) > 1:
        a = source.randrange(len(positions) - 1)
        positions[a], positions[a + 1] = positions[a + 1], positions[a]
    return pointers, positions, out, inn


@pytest.mark.parametrize("block", [2**18, 3, 1])
def test_verdicts_agree(block, monkeypatch):
    """Small blocks: the rules look at numbers across the borders of the blocks that they read."""
    monkeypatch.setattr(payload_module, "BLOCK", block)
    source, codes = random.Random(block), Counter()
    for _ in range(3000):
        pointers, positions, out, inn = random_cells(source)
        code = ours(pointers, positions, out, inn)
        assert code == first_broken_rule(pointers, positions, out, inn), (pointers, positions, out, inn)
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
        if "outliers" in stored:
            outliers = stored["outliers"].copy()
            place = int(source.integers(outliers.size))
            outliers.view(np.uint16)[2 * place + 1] = 0x7C00
            with pytest.raises(SpqrError, match=rf"E306 m\.outliers\[{place}\]"):
                check_payload(matrix.layout, {**stored, "outliers": outliers}, "m")


def test_errors_name_tensor_index_and_value(random_matrix):
    matrix = random_matrix(20, 300, outliers=1.0)
    stored = {leaf: array.copy() for leaf, array in matrix.pack().items()}
    check_payload(matrix.layout, stored, "layers.0.up")
    words, last = stored["outliers"].view(np.uint16), 20 * 300 - 1  # at row 19 = 16 + 3 and column 299, in cell 3 + 2
    place = "SPQR-E304 layers.0.up.outliers[5999]: position"
    for position, error in (
        (4096 * 4 + 258, f"{place} 16642, row 20 and column 258 of 20 x 300, in cell 5, which begins at column 256"),
        (4096 * 3 + 255, f"{place} 12543, row 19 and column 255 of 20 x 300, in cell 5, which begins at column 256"),
        (4096 * 3 + 298, "SPQR-E305 layers.0.up.outliers[5999]: position 12586 after 12586 in cell 5"),
    ):
        words[2 * last] = position
        with pytest.raises(SpqrError) as caught:
            check_payload(matrix.layout, stored, "layers.0.up")
        assert str(caught.value) == error


@pytest.mark.parametrize(("change", "code"), [
    (lambda t: t.pop("weight"), "E107"), (lambda t: t.update(weight=t["weight"].astype(np.int64)), "E109"),
    (lambda t: t.update(outliers=t["outliers"][1:]), "E110"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_layout(random_matrix, change, code):
    matrix = random_matrix(20, 40, outliers=0.5)
    stored = matrix.pack()
    change(stored)
    with pytest.raises(SpqrError, match=code):
        check_payload(matrix.layout, stored, "m")

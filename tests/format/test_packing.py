"""Packing against an oracle that sets one bit at a time, written from the spec's words and not from the code."""

from __future__ import annotations

import numpy as np
import pytest
import reference_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from spqr_format import Layout, SpqrError, SpqrMatrix
from spqr_format.packing import FIELDS, SPREAD, pack_codes, pack_stat_codes, unpack_codes, unpack_stat_codes

shapes = st.tuples(st.integers(1, 50), st.integers(1, 70))


def bits_of_code(bits: int, row: int, column: int) -> list[tuple[int, int]]:
    """(word, bit) of every bit of a code, from the table of spec 4.2."""
    high = 16 * (column % 2)
    word, bit = FIELDS[bits][row // 8][column // 2]
    if bit == SPREAD:
        return [(k, 15 + high) for k in range(3)]
    return [(word, bit + high + k) for k in range(bits)]


def slow_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    tiles, blocks = -(-codes.shape[0] // 16), -(-codes.shape[1] // 16)
    words = [[0] * blocks for _ in range(tiles * bits * 8)]
    for r, row in enumerate(codes.tolist()):
        for c, code in enumerate(row):
            for k, (word, bit) in enumerate(bits_of_code(bits, r % 16, c % 16)):
                words[(r // 16 * bits + word) * 8 + r % 8][c // 16] |= (code >> k & 1) << bit
    return np.array(words, np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_bit_of_a_lane_is_used_once(bits):
    places = [place for half in (0, 8) for column in range(16) for place in bits_of_code(bits, half, column)]
    assert sorted(places) == [(word, bit) for word in range(bits) for bit in range(32)]


@given(shape=shapes, bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_codes_lie_where_the_spec_says(shape, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)
    words = pack_codes(codes, bits)
    assert np.array_equal(words.view(np.uint32), slow_pack(codes, bits))
    unpacked = unpack_codes(words, bits)
    assert np.array_equal(unpacked[: shape[0], : shape[1]], codes)
    assert unpacked.astype(int).sum() == codes.astype(int).sum()  # the padding is 0
    assert np.array_equal(reference_decoder.unpack_codes(words.view(np.uint32), bits), unpacked)


@given(bits=st.sampled_from([2, 3, 4]), tiles=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_words_are_codes(bits, tiles, blocks, seed):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (tiles * bits * 8, blocks), dtype=np.int32)
    assert np.array_equal(pack_codes(unpack_codes(words, bits), bits), words)


@given(rows=st.integers(1, 50), groups=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_statistics_codes_lie_where_the_spec_says(rows, groups, seed):
    rng = np.random.default_rng(seed)
    sq, zq = rng.integers(0, 8, (2, rows, groups), dtype=np.uint8)
    words = pack_stat_codes(sq, zq)
    for tile in range(-(-rows // 16)):
        for group in range(groups):
            number = 0
            for row in range(16 * tile, min(16 * tile + 16, rows)):
                base = 12 * (row % 8) + 6 * (row % 16 // 8)
                number |= int(sq[row, group]) << base | int(zq[row, group]) << (base + 3)
            found = [int(word) for word in words.view(np.uint32)[3 * tile : 3 * tile + 3, group]]
            assert found == [number >> 32 * k & 0xFFFFFFFF for k in range(3)]
    for got, want in zip(unpack_stat_codes(words), (sq, zq), strict=True):
        assert np.array_equal(got[:rows], want)
        assert not got[rows:].any()


def check_round_trip(matrix: SpqrMatrix) -> None:
    layout, stored = matrix.layout, matrix.pack()
    assert {leaf: (array.dtype.itemsize, array.shape) for leaf, array in stored.items()} == {
        leaf: ({"I32": 4, "I16": 2, "U8": 1}[spec.dtype], spec.shape) for leaf, spec in layout.tensors().items()
    }
    assert sum(array.nbytes for array in stored.values()) == layout.stored_bytes()
    back = SpqrMatrix.unpack(layout, stored)
    for leaf, array in back.pack().items():
        assert np.array_equal(array, stored[leaf])
    weight = matrix.dequantize()
    assert np.array_equal(back.dequantize().view(np.uint32), weight.view(np.uint32))
    raw = {f"m.{leaf}": array.view(f"u{array.dtype.itemsize}") for leaf, array in stored.items()}
    assert np.array_equal(reference_decoder.decode(raw, layout.as_dict(), "m").view(np.uint32), weight.view(np.uint32))


@given(shape=shapes, bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([16, 32, 64, 128]),
       share=st.sampled_from([0, 0.1, 1]), statistics=st.sampled_from(["bilevel", "direct"]), permuted=st.booleans(),
       seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_the_decoder_agrees_to_the_bit(random_matrix, shape, bits, group, share, statistics, permuted, seed):
    check_round_trip(random_matrix(*shape, weight_bits=bits, group_size=group, statistics=statistics,
                                   outliers=share, permuted=permuted, seed=seed))  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (688, 256), (1376, 512), (1, 65552), (300, 300)])
@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_larger_shapes(random_matrix, shape, statistics):
    share = 0.8 if shape == (300, 300) else 0.01  # the former needs 32-bit row pointers
    check_round_trip(random_matrix(*shape, statistics=statistics, outliers=share, permuted=True))


@pytest.mark.slow
def test_a_real_layer(random_matrix):
    check_round_trip(random_matrix(11008, 4096, outliers=0.003))


def test_bits_per_weight_are_those_of_the_paper():
    assert Layout(4096, 4096).bits_per_weight() == 3.625
    assert Layout(4096, 4096, 4, 128, "direct").bits_per_weight() == 4 + 24 / 128


@pytest.mark.parametrize(("fields", "code"), [
    ({"out_features": 0}, "E104"), ({"in_features": -1}, "E104"), ({"out_features": 2**31}, "E006"), 
    ({"in_features": 1.0}, "E104"),
    ({"out_features": 2**21, "in_features": 2**20}, "E006"), ({"weight_bits": 5}, "E104"), ({"weight_bits": True}, "E104"),
    ({"group_size": 8}, "E104"), ({"group_size": 24}, "E104"), ({"group_size": 2**31}, "E104"), ({"statistics": "x"}, "E104"),
    ({"outliers": -1}, "E006"), ({"outliers": 65}, "E006"),
])  # fmt: skip
def test_layouts_that_do_not_exist(fields, code):
    with pytest.raises(SpqrError) as caught:
        Layout(**{"out_features": 8, "in_features": 8, **fields})
    assert caught.value.code == code

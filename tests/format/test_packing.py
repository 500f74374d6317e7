"""Packing against an oracle that sets one bit at a time, written from the spec's words and not from the code."""

from __future__ import annotations

import numpy as np
import pytest
import reference_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from spqr_format import Layout, SpqrError, SpqrMatrix
from spqr_format.packing import FIELDS, SPREAD, pack_codes, pack_stat_codes, to_grid, to_stored, unpack_codes, unpack_stat_codes

shapes = st.tuples(st.integers(1, 50), st.integers(1, 70))
wide = st.tuples(st.integers(1, 34), st.sampled_from([240, 241, 255, 256, 257, 272, 500, 512, 513, 528 + 32, 768]))


def bits_of_code(bits: int, row: int, column: int) -> list[tuple[int, int]]:
    """(word, bit) of every bit of a code, from the table of spec 4.2."""
    high = 16 * (column % 2)
    word, bit = FIELDS[bits][row // 8][column // 2]
    if bits == 3 and bit == SPREAD:
        return [(k, high) for k in range(3)]
    return [(word, bit + high + k) for k in range(bits)]


def column_of_word(bits: int, blocks: int, block: int, lane: int, k: int) -> int:
    """Where in its tile's row of M.weight a word stands, by spec 4.2."""
    chunks, tail = blocks // 16, blocks % 16
    if block < 16 * chunks:
        b = block % 16
        return block // 16 * 128 * bits + k * 128 + lane * 16 + (b % 4) * 4 + b // 4
    return chunks * 128 * bits + (k * 8 + lane) * tail + block - 16 * chunks


def slow_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    tiles, blocks = -(-codes.shape[0] // 16), -(-codes.shape[1] // 16)
    words = [[0] * (8 * bits * blocks) for _ in range(tiles)]
    for r, row in enumerate(codes.tolist()):
        for c, code in enumerate(row):
            for k, (word, bit) in enumerate(bits_of_code(bits, r % 16, c % 16)):
                words[r // 16][column_of_word(bits, blocks, c // 16, r % 8, word)] |= (code >> k & 1) << bit
    return np.array(words, np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_bit_of_a_lane_is_used_once(bits):
    places = [place for half in (0, 8) for column in range(16) for place in bits_of_code(bits, half, column)]
    assert sorted(places) == [(word, bit) for word in range(bits) for bit in range(32)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_neighbouring_pairs_lie_at_one_position(bits):
    """But for one shift of the word, which kernels share between the fields of a word."""
    shift = {2: 8, 3: 6, 4: 8}[bits]
    for table in FIELDS[bits]:
        for first, second in zip(table[::2], table[1::2], strict=True):
            assert (bits == 3 and SPREAD in (first[1], second[1])) or (first[1] - second[1]) % shift == 0


@pytest.mark.parametrize("blocks", [1, 3, 15, 16, 17, 31, 32, 35, 48])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_word_stands_once(bits, blocks):
    places = [column_of_word(bits, blocks, block, lane, k) for block in range(blocks) for lane in range(8) for k in range(bits)]
    assert sorted(places) == list(range(8 * bits * blocks))
    grid = np.arange(2 * len(places), dtype=np.int32).reshape(2, bits, 8, blocks)
    stored = to_stored(grid)
    assert np.array_equal(to_grid(stored, bits), grid)
    for block in range(blocks):
        for lane in range(8):
            for k in range(bits):
                assert stored[1, column_of_word(bits, blocks, block, lane, k)] == grid[1, k, lane, block]


@given(shape=shapes | wide, bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_codes_lie_where_the_spec_says(shape, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)
    words = pack_codes(codes, bits)
    assert np.array_equal(words.view(np.uint32), slow_pack(codes, bits))
    unpacked = unpack_codes(words, bits)
    assert np.array_equal(unpacked[: shape[0], : shape[1]], codes)
    assert unpacked.astype(int).sum() == codes.astype(int).sum()  # the padding is 0
    assert np.array_equal(reference_decoder.unpack_codes(words.view(np.uint32), bits), unpacked)


@given(row=st.integers(0, 39), column=st.integers(0, 599), bits=st.sampled_from([2, 3, 4]), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_single_code_sets_its_own_bits(row, column, bits, data):
    """40 x 600: two full chunks and a tail of 6 blocks."""
    code = data.draw(st.integers(1, 2**bits - 1))
    codes = np.zeros((40, 600), np.uint8)
    codes[row, column] = code
    expected = {}
    for k, (word, bit) in enumerate(bits_of_code(bits, row % 16, column % 16)):
        place = row // 16, column_of_word(bits, 38, column // 16, row % 8, word)
        expected[place] = expected.get(place, 0) | (code >> k & 1) << bit
    words = pack_codes(codes, bits).view(np.uint32)
    assert {(int(t), int(c)): int(words[t, c]) for t, c in np.argwhere(words)} == {k: v for k, v in expected.items() if v}


@given(bits=st.sampled_from([2, 3, 4]), tiles=st.integers(1, 3), blocks=st.integers(1, 36), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_words_are_codes(bits, tiles, blocks, seed):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (tiles, 8 * bits * blocks), dtype=np.int32)
    assert np.array_equal(pack_codes(unpack_codes(words, bits), bits), words)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_and_columns_are_cut_where_the_spec_says(bits):
    """Whole tiles and whole chunks of a matrix are runs of rows and columns of its words."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (80, 1000), dtype=np.uint8)
    words = pack_codes(codes, bits)
    assert np.array_equal(pack_codes(codes[32:64], bits), words[2:4])
    for first, last in ((0, 256), (256, 768), (512, 1000), (768, 1000)):
        begin, end = (8 * bits * -(-column // 16) for column in (first, last))
        assert np.array_equal(pack_codes(codes[:, first:last], bits), words[:, begin:end])
    sq, zq = np.random.default_rng(0).integers(0, 8, (2, 80, 60), dtype=np.uint8)
    stats = pack_stat_codes(sq, zq)
    assert np.array_equal(pack_stat_codes(sq[16:48], zq[16:48]), stats[1:3])
    for first, last in ((0, 16), (16, 48), (32, 60), (48, 60)):
        assert np.array_equal(pack_stat_codes(sq[:, first:last], zq[:, first:last]), stats[:, 3 * first : 3 * last])


def places_of_statistics(groups: int, lane: int, group: int) -> list[tuple[int, int]]:
    """(column of M.stat_codes, bit) of each of the 12 bits of a lane and group, by spec 4.3."""
    sets = groups // 16
    if group >= 16 * sets:
        n, r = groups % 16, group % 16
        return [(48 * sets + bit // 32 * n + r, bit % 32) for bit in range(12 * lane, 12 * lane + 12)]
    start, p, r = 48 * (group // 16), group % 8 // 2, group % 16
    i = 4 * lane + p
    half = [(start + 32 + i // 2, 16 * (i % 2) + k) for k in range(16)]
    if r < 8:
        return [(start + i, 12 * (r % 2) + k) for k in range(12)]
    return [(start + i, 24 + k) for k in range(8)] + half[:4] if r % 2 == 0 else half[4:]


@pytest.mark.parametrize("groups", [1, 5, 15, 16, 17, 31, 32, 33])
def test_every_bit_of_the_statistics_is_used_once(groups):
    places = [place for lane in range(8) for group in range(groups) for place in places_of_statistics(groups, lane, group)]
    assert sorted(places) == [(column, bit) for column in range(3 * groups) for bit in range(32)]


@given(rows=st.integers(1, 50), groups=st.integers(1, 9) | st.sampled_from([15, 16, 17, 32, 33, 47]),
       seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_statistics_codes_lie_where_the_spec_says(rows, groups, seed):
    rng = np.random.default_rng(seed)
    sq, zq = rng.integers(0, 8, (2, rows, groups), dtype=np.uint8)
    words = pack_stat_codes(sq, zq)
    expected = [[0] * (3 * groups) for _ in range(-(-rows // 16))]
    for row in range(rows):
        for group in range(groups):
            places = places_of_statistics(groups, row % 8, group)[6 * (row % 16 // 8) :]
            number = int(sq[row, group]) | int(zq[row, group]) << 3
            for k in range(6):
                column, bit = places[k]
                expected[row // 16][column] |= (number >> k & 1) << bit
    assert words.view(np.uint32).tolist() == expected
    for got, want in zip(unpack_stat_codes(words), (sq, zq), strict=True):
        assert np.array_equal(got[:rows], want)
        assert not got[rows:].any()
    for got, want in zip(reference_decoder.unpack_stat_codes(words.view(np.uint32)), (sq, zq), strict=True):
        assert np.array_equal(got[:rows], want)


@given(tiles=st.integers(1, 3), groups=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_words_are_statistics_codes(tiles, groups, seed):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (tiles, 3 * groups), dtype=np.int32)
    assert np.array_equal(pack_stat_codes(*unpack_stat_codes(words)), words)


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


@given(shape=shapes | wide, bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([16, 32, 64, 128]),
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

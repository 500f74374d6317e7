"""Words of GPTQ and AWQ turned into ours as whole arrays: against codes unpacked and packed one by one."""

from __future__ import annotations

import numpy as np
import pytest

from spqr_converters import convert, words
from spqr_converters.sources import open_source, packed
from spqr_format.errors import SpqrError
from spqr_format.packing import pack_codes

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def codes(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).integers(0, 16, (rows, columns), dtype=np.uint8)


def as_gptq(q: np.ndarray) -> np.ndarray:
    """Column 8 i + k of a row lies in the bits 4 k .. of word i."""
    found = np.zeros((q.shape[1] // 8, q.shape[0]), np.uint32)
    for column in range(q.shape[1]):
        found[column // 8] |= q[:, column].astype(np.uint32) << np.uint32(4 * (column % 8))
    return found


def as_awq(q: np.ndarray) -> np.ndarray:
    """Row 8 i + AWQ[k] of a column lies in the bits 4 k .. of word i."""
    found = np.zeros((q.shape[1], q.shape[0] // 8), np.uint32)
    for row in range(q.shape[0]):
        found[:, row // 8] |= q[row].astype(np.uint32) << np.uint32(4 * AWQ.index(row % 8))
    return found


# one piece, several, and a last one that is shorter; two chunks and a tail
SHAPES = [(16, 16), (16, 48), (32, 16), (272, 32), (16 * 33, 64), (32, 560)]
KINDS = {"gptq": (as_gptq, words.from_gptq, words.is_gptq), "awq": (as_awq, words.from_awq, words.is_awq)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_those_of_the_codes(kind, shape) -> None:
    pack, turn, same = KINDS[kind]
    q = codes(*shape)
    theirs = pack(q)
    before = theirs.copy()
    ours = turn(theirs)
    assert np.array_equal(words.stored(ours), pack_codes(q, 4))
    assert same(ours, theirs)
    assert np.array_equal(theirs, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_wrong_bit_is_found(kind) -> None:
    pack, turn, same = KINDS[kind]
    theirs = pack(codes(32, 32))
    ours = turn(theirs)
    for place in np.ndindex(ours.shape):
        for bit in (0, 13, 31):
            ours[place] ^= np.uint32(1 << bit)
            assert not same(ours, theirs)
            ours[place] ^= np.uint32(1 << bit)
    assert same(ours, theirs)


def test_permuted_columns() -> None:
    q = codes(80, 64)
    perm = np.random.default_rng(1).permutation(64)
    assert np.array_equal(words.permuted(as_gptq(q), perm), as_gptq(q[:, perm]))


@pytest.mark.parametrize("act", [False, True])
def test_the_fast_way_writes_what_the_slow_one_does(gptq_llama, tmp_path, monkeypatch, act) -> None:
    source = gptq_llama(act=act)
    convert(source, tmp_path / "fast", lossless=True)
    carried = open_source(source).carried("model.layers.0.mlp.up_proj.weight")
    assert carried is not None
    assert carried.matrix.layout.permuted == act
    monkeypatch.setattr("spqr_converters.sources.packed.PackedSource.carried", lambda self, name: None)
    convert(source, tmp_path / "slow", lossless=True)
    for path in (tmp_path / "slow").iterdir():
        assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("broken", ["words", "scales"])
def test_a_large_matrix_is_compared_in_part_and_a_wrong_one_is_found(gptq_llama, tmp_path, monkeypatch, broken) -> None:
    """All codes as bits; of the weights, tiles from the first to the last."""
    monkeypatch.setattr("spqr_converters.lossless._SAMPLE", 16 * 48 * 2)
    source = gptq_llama()
    report = convert(source, tmp_path / "out", lossless=True)
    compared = {module.name.rpartition(".")[2]: module.compared for module in report.modules}
    assert compared == {"q_proj": 1536, "k_proj": 1536, "v_proj": 1536, "o_proj": 1536, "gate_proj": 1536, "up_proj": 1536,
                        "down_proj": 2 * 16 * 96}  # fmt: skip
    assert any(f" of {sum(m.compared or 0 for m in report.modules):,} weights" in note for note in report.notes)
    if broken == "words":
        real = words.from_gptq

        def wrong(qweight):
            ours = real(qweight)
            ours[1, 2, 3, 1] ^= np.uint32(8)
            return ours

        monkeypatch.setattr("spqr_converters.sources.gptq.from_gptq", wrong)
    else:
        real_statistics = packed.statistics

        def wrong_scales(*arguments):
            scales, zeros = real_statistics(*arguments)
            scales = scales.copy()
            scales[-1] *= 2
            return scales, zeros

        monkeypatch.setattr(packed, "statistics", wrong_scales)
    with pytest.raises(SpqrError, match="SPQR-E510"):
        convert(source, tmp_path / "wrong", lossless=True)
    assert not list((tmp_path / "wrong").iterdir())

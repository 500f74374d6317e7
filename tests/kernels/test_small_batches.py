"""The kernel of small batches as Triton compiles it, run by `ptx_machine`, against float64 of the matrix as it was packed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import small
from spqr_kernels.launch import LEAVES

sys.path.insert(0, str(Path(__file__).parent))
import ptx_machine  # beside this file, not part of a package
from ptx_arithmetic import PtxError
from ptx_launch import CPU, bits, empty, expected_of, pretend_gpu, rows_of_x, run, with_outliers
from ptx_memory import Memory

FP16, BF16 = torch.float16, torch.bfloat16
EVERY_WAY = [(width, small.choice_for(width, True, large)) for width in small.WIDTHS for large in (False, True)]
EVERY_WAY.pop()  # the widest are for small matrices alone
EVERY_WAY.append((8, small.Small(2, 2, 255, 2, 3, 2, 2)))


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """A GPU of one multiprocessor; called with a number, of so many."""

    def have(count):
        pretend_gpu(monkeypatch, count)

    have(1)
    return have


@pytest.fixture
def way(request, monkeypatch):
    """How many rows x has; the choice for all matrices is the one given."""
    batch, choice = request.param
    monkeypatch.setattr(small, "choice_for", lambda *_: choice)
    return batch


def product(matrix, x, dtype=FP16, scale=None, bias=None, modes=(True,), only=None):
    """The launch, and x W^T [batch, out] times scale [batch], where y is bf16, plus bias [out]."""
    shape, kept = small._without_outliers(matrix.layout)
    given = None if bias is None else bias.dtype
    launches = small._launches.__wrapped__(shape, kept, len(x), dtype, given, CPU, True)
    memory, packed = Memory(), matrix.pack()
    x = torch.nn.functional.pad(x, (0, matrix.layout.blocks * 16 - x.shape[1]))
    y = memory.add(empty(len(x) * matrix.layout.out_features, dtype), writable=True)
    addresses = [
        memory.add(bits(x)), 0 if scale is None else memory.add(scale.numpy()),
        *(memory.add(packed[leaf]) if leaf in packed else 0 for leaf in LEAVES), 0 if bias is None else memory.add(bits(bias)),
        y, memory.add(np.full(launches.parts, np.nan, np.float32), writable=True),
    ]  # fmt: skip
    run(launches.product, memory, addresses, modes, only)
    return launches.product, torch.from_numpy(memory.array(y).copy()).view(dtype).reshape(len(x), -1)


def check(y, expected):
    """Each row of y, which has few values here, against its norm in float64: weights are 5e-4 off, y is rounded by 2e-4, or in
    bf16 by 1.7e-3."""
    assert torch.isfinite(y).all()
    error = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (8e-4 if y.dtype == FP16 else 2.5e-3)


KINDS = [  # matrix, rows of x, rows and columns of W, dtype of y, whether it counts as large
    ({"weight_bits": 3}, 16, 40, 2304, FP16, False),
    ({"weight_bits": 3}, 15, 170, 768, BF16, True),
    ({"weight_bits": 4, "outliers": 0.0}, 11, 40, 1536, FP16, True),
    ({"weight_bits": 2, "group_size": 32, "statistics": "direct"}, 16, 100, 1536, FP16, True),
    ({"weight_bits": 3, "outliers": 0.0}, 7, 136, 1270, FP16, False),
    ({"weight_bits": 3, "group_size": 32, "outliers": 0.004}, 13, 70, 1280, BF16, True),
    ({"weight_bits": 2, "group_size": 64}, 8, 24, 2290, BF16, True),
    ({"weight_bits": 4, "group_size": 16, "outliers": 0.02}, 2, 72, 1536, FP16, False),
    ({"weight_bits": 4, "group_size": 128, "statistics": "direct"}, 9, 200, 1010, BF16, False),
    ({"weight_bits": 3, "group_size": 48, "statistics": "direct", "outliers": 0.0}, 3, 17, 1792, FP16, False),
    ({"weight_bits": 3}, 13, 200, 256, FP16, False),
    ({"weight_bits": 4}, 32, 88, 768, FP16, False),
    ({"weight_bits": 2, "group_size": 32, "outliers": 0.0}, 19, 70, 1010, BF16, False),
    ({"weight_bits": 4, "group_size": 32, "statistics": "direct"}, 27, 40, 1792, FP16, False),
]


@pytest.mark.parametrize(("kind", "batch", "rows", "columns", "dtype", "large"), KINDS, ids=lambda k: str(k).replace(" ", ""))
def test_every_kind_of_matrix(random_matrix, monkeypatch, kind, batch, rows, columns, dtype, large):
    """Rows that fill no piece, columns that fill no block; programs begin and end within pieces."""
    monkeypatch.setattr(small, "is_large", lambda *_: large)
    matrix = random_matrix(rows, columns, **kind)
    x = rows_of_x(batch, columns)
    scale, bias, expected = expected_of(matrix, x, dtype)
    launch, y = product(matrix, x, dtype, scale, bias)
    assert launch.grid[0] > 1
    check(y, expected)


@pytest.mark.parametrize("way", EVERY_WAY, ids=str, indirect=True)
def test_many_programs_share_a_piece(random_matrix, multiprocessors, way):
    """More than one adds up at once, pieces of one program alone between them, and copies that come late or at once."""
    multiprocessors(6)
    matrix = random_matrix(70, 256 * 11)
    x = rows_of_x(way, 256 * 11)
    launch, y = product(matrix, x, modes=(True, False))
    assert launch.grid[0] > 3
    check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


@pytest.mark.parametrize("way", EVERY_WAY[:1], ids=str, indirect=True)
def test_a_program_waits_for_the_parts_of_others(random_matrix, multiprocessors, way, monkeypatch):
    """The last one alone never ends. The machine runs programs one after the other, so a missing wait is seen in no result."""
    multiprocessors(1)
    monkeypatch.setattr(ptx_machine, "MOST_STEPS", 20_000)
    matrix = random_matrix(8, 256 * 12)
    x = rows_of_x(way, 256 * 12)
    launch, _ = product(matrix, x, only=0)
    with pytest.raises(PtxError, match="no end"):
        product(matrix, x, only=launch.grid[0] - 1)


@pytest.mark.parametrize("way", EVERY_WAY[:4], ids=str, indirect=True)
def test_crowded_outliers(random_matrix, way):
    """Chunks with none, with as many as are copied and one more or less, and with all of their weights; the last tile's, behind
    which no outlier is."""
    share = np.zeros((40, 1024))
    for chunk, count in enumerate((1, 31, 33, 0)):
        share[3, 256 * chunk : 256 * chunk + count] = 1
    share[16:32, :256] = share[20, 300:] = 1
    share[16:32, 512:768] = 0.01
    share[39, -1] = share[32, 0] = 1
    base = random_matrix(40, 1024, outliers=0.0)
    for some in (share, np.where(share == 1, 1, 0.012)):  # as many as KEPT knows, by their mean
        matrix = with_outliers(base, some)
        assert small.outliers_of_a_chunk(matrix.layout) == 128
        x = rows_of_x(way, 1024)
        _, y = product(matrix, x)
        check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


def with_scales(matrix, factors):
    """The same matrix with scales and outliers of each 256 columns times a power of two."""
    a_group = np.repeat(np.asarray(factors, np.float32), 256 // matrix.layout.group_size)
    values = matrix.values.astype(np.float32) * np.asarray(factors)[matrix.col_indices // 256]
    changed = {"values": values.clip(-60000, 60000).astype(np.float16)}
    if matrix.layout.statistics == "direct":
        changed["group_scales"] = (matrix.group_scales * a_group).astype(np.float16)
    else:
        changed["tile_stats"] = (matrix.tile_stats * np.stack([a_group, *[np.ones_like(a_group)] * 3], -1)).astype(np.float16)
    return dataclasses.replace(matrix, **changed)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("way", [(8, True), (8, False), (16, True), (32, False)], ids=str)
@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_scales_of_any_size(random_matrix, multiprocessors, monkeypatch, bits, way, statistics):
    """Units follow the largest scales: from chunk to chunk, up to weights of 60000; what another program adds has others. And
    where all scales are small, weights are as exact."""
    batch, large = way
    monkeypatch.setattr(small, "is_large", lambda *_: large)
    multiprocessors(2)
    group = {"group_size": 16} if statistics == "bilevel" else {"group_size": 64, "statistics": "direct"}
    base = random_matrix(72, 256 * 6, weight_bits=bits, outliers=0.01, **group)
    largest = float(np.abs(base.dequantize()).max())
    up = 2.0 ** int(np.log2(60000 / largest))
    for factors in ((1, 4, 2, 64, 0.5, 1024), (up, 1, 1, 2, 4, up / 8), (1 / 32,) * 6, (1, 1, 1, 1, 1, 32)):
        matrix = with_scales(base, factors)
        exact = torch.from_numpy(matrix.dequantize()).double()
        assert torch.isfinite(exact).all()
        x = rows_of_x(batch, 256 * 6) / (2048 if up in factors else 16)  # y is fp16
        launch, y = product(matrix, x)
        assert launch.grid[0] > 1
        check(y, x.double() @ exact.T)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_the_largest_scales_of_fp16(random_matrix, bits, statistics):
    """Scales of 60000 beside codes next to their zero: weights are finite, though codes times scales are not, nor, with bilevel
    statistics, what is told of their size. Outliers as large are not lost."""
    kind = {"group_size": 16} if statistics == "bilevel" else {"group_size": 64, "statistics": "direct"}
    base = random_matrix(24, 512, weight_bits=bits, outliers=0.01, **kind)
    codes = (1 + np.arange(base.codes.size, dtype=np.uint8).reshape(base.codes.shape) % 7 // 4).astype(np.uint8)
    if statistics == "direct":
        changed = {"group_scales": np.full_like(base.group_scales, 60000), "group_zeros": np.full_like(base.group_zeros, 1)}
    else:  # s = 12000 (0 - 5), z = 0.25 (4 - 0)
        stats = np.tile(np.array([12000, 5, 0.25, 0], np.float16), (*base.tile_stats.shape[:2], 1))
        changed = {"tile_stats": stats, "scale_codes": base.scale_codes * 0, "zero_codes": base.zero_codes * 0 + 4}
    matrix = dataclasses.replace(base, codes=codes, values=np.full_like(base.values, 50000), **changed)
    exact = torch.from_numpy(matrix.dequantize()).double()
    assert exact.abs().max() < 2 * 65504
    x = rows_of_x(8, 512) / 4096
    _, y = product(matrix, x)
    expected = x.double() @ exact.T
    assert (y.double() - expected).norm() < 2e-3 * expected.norm()  # the offset is rounded where it is as large as a weight


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ({"group_size": 16}, [(0, 3), (0, 13), (1, 7), (1, 24)]),  # tile and group
        ({"group_size": 64}, [(0, 1), (1, 6)]),
        ({"group_size": 64, "statistics": "direct"}, [(3, 1), (12, 0), (20, 6), (31, 3)]),  # row and group
    ],
    ids=lambda k: str(k).replace(" ", ""),
)
def test_one_large_scale(random_matrix, monkeypatch, large, kind, places):
    """Wherever it is, the lane that looks after it finds it: y would be infinite. It is little more than what that one group
    gives, and as far off as its scale and offset are by themselves, 1e-3 here."""
    monkeypatch.setattr(small, "is_large", lambda *_: large)
    base = random_matrix(32, 512, outliers=0.01, **kind)
    x = rows_of_x(16, 512) / 64
    for place in places:
        name = "group_scales" if base.layout.statistics == "direct" else "tile_stats"
        scales = getattr(base, name).copy()
        scales[place if name == "group_scales" else (*place, 0)] *= 512
        matrix = dataclasses.replace(base, **{name: scales})
        _, y = product(matrix, x)
        expected = x.double() @ torch.from_numpy(matrix.dequantize()).double().T
        assert (y.double() - expected).norm() < 2e-3 * expected.norm(), place


@pytest.mark.parametrize("way", EVERY_WAY[1:3], ids=str, indirect=True)
def test_an_infinite_x(random_matrix, way):
    """Reaches its own row of y alone, and gives no NaN there where its column has no outlier."""
    matrix = random_matrix(24, 512, outliers=0.05)
    weight = torch.from_numpy(matrix.dequantize()).double()
    plain = weight.abs() > 1e-3
    plain[np.repeat(np.arange(24), np.diff(matrix.crow_indices)), matrix.col_indices] = False
    for column in (0, 300):
        x = rows_of_x(way, 512)
        x[1, column], x[2, column] = float("inf"), -float("inf")
        _, y = product(matrix, x)
        expected = x.double() @ weight.T
        check(y[3:], expected[3:])
        clear = plain[:, column]
        assert clear.sum() > 10
        assert torch.equal(y[1:3, clear].double(), expected[1:3, clear])

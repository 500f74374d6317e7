"""The kernels for one row as Triton compiles them, run by `ptx_machine`, against float64 of the matrix before it was packed."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import experts, grouped, joined, matvec, overlap, pair_outliers, ring, siblings
from spqr_kernels.launch import LEAVES

sys.path.insert(0, str(Path(__file__).parent))
from ptx_launch import CPU, bits, check, empty, row, run, with_outliers  # beside this file, not part of a package
from ptx_memory import Memory


def product(matrix, x, bias=None, x_of_outliers=None, modes=(True, False), **forced):
    """W x + bias [out] of `matvec_kernel` for x [in]. x_of_outliers: what these are multiplied with, where that is not x."""
    layout, memory, packed = matrix.layout, Memory(), matrix.pack()
    launch = matvec.launch_for.__wrapped__(layout, x.dtype, None if bias is None else bias.dtype, CPU, False)
    dense = x if matrix.perm is None else x[torch.from_numpy(matrix.perm).long()]
    if x_of_outliers is not None:
        forced["PERMUTED"] = True
    elif layout.permuted:
        x_of_outliers = x
    padding = (0, layout.blocks * 16 - layout.in_features)
    given = [0 if part is None else memory.add(bits(torch.nn.functional.pad(part, padding))) for part in (x_of_outliers, dense)]
    y = memory.add(empty(layout.out_features, x.dtype), writable=True)
    stored = [memory.add(packed[leaf]) if leaf in packed else 0 for leaf in LEAVES]
    run(launch, memory, [*given, *stored, 0 if bias is None else memory.add(bits(bias)), y], modes, **forced)
    return torch.from_numpy(memory.array(y).copy()).view(x.dtype)


FP16, BF16 = torch.float16, torch.bfloat16
KINDS = [
    ({"weight_bits": 3, "group_size": 16}, FP16, 40, 1280, True),
    ({"weight_bits": 3, "group_size": 16}, BF16, 40, 1280, True),
    ({"weight_bits": 3, "group_size": 16, "permuted": True, "outliers": 0.03}, FP16, 17, 768, False),
    ({"weight_bits": 3, "group_size": 16, "outliers": 0.0}, FP16, 40, 512, False),
    ({"weight_bits": 3, "group_size": 32}, BF16, 24, 1536, False),
    ({"weight_bits": 3, "group_size": 64}, BF16, 24, 2304, False),
    ({"weight_bits": 3, "group_size": 64, "statistics": "direct"}, FP16, 24, 250, False),
    ({"weight_bits": 2, "group_size": 16}, FP16, 40, 250, False),
    ({"weight_bits": 2, "group_size": 16}, BF16, 3, 1280, False),
    ({"weight_bits": 2, "group_size": 64, "outliers": 0.002}, FP16, 24, 2290, False),
    ({"weight_bits": 4, "group_size": 16}, FP16, 24, 768, False),
    ({"weight_bits": 4, "group_size": 16, "outliers": 0.0}, BF16, 24, 768, False),
    ({"weight_bits": 4, "group_size": 128, "statistics": "direct"}, FP16, 40, 1280, True),
    ({"weight_bits": 4, "group_size": 48, "statistics": "direct"}, BF16, 24, 512, False),
]


@pytest.mark.parametrize(("kind", "dtype", "rows", "columns", "biased"), KINDS, ids=lambda k: str(k).replace(" ", ""))
def test_every_kind_of_matrix(random_matrix, kind, dtype, rows, columns, biased):
    """Rows that do not fill a tile, columns that do not fill a block, in launches as they are."""
    matrix = random_matrix(rows, columns, **kind)
    x, bias = row(columns, dtype), row(rows, dtype, 2) if biased else None
    check(product(matrix, x, bias), matrix.dequantize(), x, bias)


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize(
    "chunks", [(1, 3, 8, 9), pytest.param((2, 4, 5, 6, 7, 10, 11, 12, 16), marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_warps_share_chunks(random_matrix, group_size, warps, chunks):
    """As many as the warps, more and fewer; sets of statistics that are full, behind full ones, or alone."""
    for count in chunks:
        # with outliers there is no room for 8 warps
        matrix = random_matrix(24, 256 * count, group_size=group_size, seed=count, **{"outliers": 0.0} if warps == 8 else {})
        x = row(256 * count)
        whole = {"WARPS": warps, "num_warps": warps, "WHOLE": count % (2 * warps) == 0, "ENTRIES": 2}
        check(product(matrix, x, modes=(True,), **whole), matrix.dequantize(), x)


def test_a_warp_has_more_pairs_than_lanes(random_matrix):
    """Where outliers begin is read for 32 pairs at a time."""
    matrix = random_matrix(16, 256 * 67, outliers=0.005)
    x = row(256 * 67)
    check(product(matrix, x, modes=(True,), WARPS=1, num_warps=1, WHOLE=False), matrix.dequantize(), x)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("entries", ring.ENTRIES)
def test_crowded_outliers(random_matrix, entries, dtype):
    """Pairs of chunks with none, as many as there is room for, one more, behind others within 16 bytes, and with outliers
    everywhere."""
    matrix = random_matrix(40, 1280, outliers=0.0)
    share = np.zeros((40, 1280))
    share[0, : 32 * entries] = 1
    share[3, 512 : 512 + 32 * entries] = share[15, 1023] = 1
    share[:16, 1024:] = 1  # 4096
    share[16:32] = 0.01
    share[20:24, 1000:1200] = 0.7
    share[39, 1279] = 1
    matrix = with_outliers(matrix, share)
    x = row(1280, dtype)
    check(product(matrix, x, ENTRIES=entries), matrix.dequantize(), x)


@pytest.mark.parametrize("count", range(1, 10))
def test_few_outliers(random_matrix, count):
    """Copies are of 16 bytes, and of what lies behind the last outlier none is read."""
    matrix = random_matrix(40, 1280, outliers=0.0)
    share = np.zeros((40, 1280))
    share.flat[np.linspace(1000, share.size - 1, count).astype(int)] = 1
    matrix = with_outliers(matrix, share)
    assert matrix.layout.outliers == count
    x = row(1280)
    check(product(matrix, x), matrix.dequantize(), x)


def test_an_infinite_x_is_multiplied_with_the_outliers_of_its_column_alone(random_matrix):
    share = np.zeros((40, 1280))
    share[:, ::9] = 1  # of each chunk more than a lane fetches
    share[5, 300], share[39, 700] = 1, 1
    share[20:, 9] = 0
    matrix = with_outliers(random_matrix(40, 1280, outliers=0.0), share)
    x = row(1280)
    infinite = x.clone()
    infinite[[300, 700, 9]] = float("inf")
    y = product(matrix, x, x_of_outliers=infinite)
    hit = (share[:, [300, 700, 9]] > 0).any(1)
    assert (y[hit] == float("inf")).all()  # all outliers are positive
    check(y[~hit], matrix.dequantize()[~hit], x)


def test_an_infinite_x_gives_no_finite_y(random_matrix):
    matrix = random_matrix(24, 1280)
    for dtype in (FP16, BF16):
        x = row(1280, dtype)
        x[777] = float("inf")
        assert not torch.isfinite(product(matrix, x, modes=(True,))).any()


@pytest.fixture
def _overlapping(monkeypatch):
    monkeypatch.setattr(overlap, "options", lambda *_: {"DEPENDENT": True, "launch_pdl": True})


def join(matrix):
    return joined.join({leaf: torch.from_numpy(part.copy()) for leaf, part in matrix.pack().items()}, matrix.layout)


@pytest.mark.usefixtures("_overlapping")
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "dtype"),
    [
        ({}, (40, 17, 33), 1280, FP16),
        ({"group_size": 32}, (3, 40), 768, BF16),
        ({"weight_bits": 4, "statistics": "direct", "group_size": 128}, (24, 40), 250, FP16),
    ],
    ids=str,
)
def test_siblings(random_matrix, kind, rows, columns, dtype):
    """Two or three matrices and one x; the second one has no outliers."""
    found = [random_matrix(out, columns, seed=i, **kind | {"outliers": 0.01 * (i != 1)}) for i, out in enumerate(rows)]
    layouts, x, memory = tuple(matrix.layout for matrix in found), row(columns, dtype), Memory()
    dense = torch.nn.functional.pad(x, (0, layouts[0].blocks * 16 - columns))
    launch = siblings.row_launch.__wrapped__(layouts, dtype, dtype if len(rows) > 2 else None, CPU)
    biases = [row(out, dtype, 7 + i) for i, out in enumerate(rows)] if len(rows) > 2 else [None] * len(rows)
    stored = [memory.add(join(matrix).numpy()) for matrix in found]
    added = [0 if bias is None else memory.add(bits(bias)) for bias in biases]
    results = [memory.add(empty(out, dtype), writable=True) for out in rows]
    of_three = [[*each, each[-1]][:3] for each in (stored, added, results)]
    run(launch, memory, [memory.add(bits(dense)), *chain(*of_three)])
    for matrix, bias, y in zip(found, biases, results, strict=True):
        check(torch.from_numpy(memory.array(y).copy()).view(dtype), matrix.dequantize(), x, bias)


@pytest.mark.usefixtures("_overlapping")
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_experts(random_matrix, dtype):
    """Of three experts with two matrices each one has no outliers and one is of another kind, which its own launch multiplies;
    ids that are no expert give NaN. The second row of x is infinite."""
    kinds = [{"outliers": 0.01}, {"weight_bits": 2}, {"outliers": 0.0}]
    ids, number, parts, out, columns = [2, 0, 3, 1, 0, -1, 2, 2], len(kinds), 2, 24, 768
    found = [[random_matrix(out, columns, seed=10 * e + p, **kind) for p in range(parts)] for e, kind in enumerate(kinds)]
    layouts = [[matrix.layout for matrix in its] for its in found]
    begins, end = experts.arrange(layouts)
    stored = torch.zeros(end, dtype=torch.int32)
    for matrix, begin in zip(chain(*found), chain(*begins), strict=True):
        whole = join(matrix)
        stored[begin : begin + len(whole)] = whole
    x = torch.stack([row(columns, dtype), torch.full((columns,), float("inf")).to(dtype)])
    memory = Memory()
    table_of = {(table.layout.weight_bits, table.layout.outliers > 0): table for table in experts.tables(layouts, begins)}
    y = memory.add(bits(torch.full((len(ids), parts * out), 7.0, dtype=dtype)), writable=True)
    x_at, ids_at, stored_at = (memory.add(array) for array in (bits(x), np.array(ids), stored.numpy()))

    def multiply(table):
        layout, entries = table.layout.with_outliers(0), pair_outliers.entries(table.layout)
        launch = grouped._experts.__wrapped__(layout, entries, number, parts, len(ids), len(x), dtype, CPU)
        run(launch, memory, [x_at, ids_at, memory.add(table.begins.numpy()), stored_at, y], modes=(True,))
        return torch.from_numpy(memory.array(y).copy()).view(dtype).reshape(len(ids), parts, out)

    result = multiply(table_of[3, True])
    assert (result[3] == 7).all(), "of the other kind, and left alone"
    multiply(table_of[3, False])
    result = multiply(table_of[2, True])
    for pair, expert in enumerate(ids):
        for part in range(parts):
            if not 0 <= expert < number:
                assert torch.isnan(result[pair, part]).all()
            elif pair < 4:
                check(result[pair, part], found[expert][part].dequantize(), x[0])
            else:
                assert not torch.isfinite(result[pair, part]).any()

"""The batched kernel as Triton compiles it, run by `ptx_machine`, against float64 of the matrix as it was packed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import clusters, gemm, gemm_plan, outliers, prepare
from spqr_kernels.launch import LEAVES

sys.path.insert(0, str(Path(__file__).parent))
import ptx_machine  # beside this file, not part of a package
from ptx_arithmetic import PtxError
from ptx_launch import CPU, bits, empty, expected_of, pretend_gpu, rows_of_x, run, with_outliers
from ptx_memory import Memory

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def plan_of(monkeypatch):
    """Called with a width and a number of multiprocessors: plans know these alone."""

    def have(width, multiprocessors=1, cluster=1):
        pretend_gpu(monkeypatch, multiprocessors)
        monkeypatch.setattr(gemm_plan, "CHOICES", {width: gemm_plan.CHOICES[width]})
        monkeypatch.setattr(clusters, "SIZES", (cluster,) if cluster > 1 else ())
        monkeypatch.setattr(clusters, "at_once", lambda size, count: count // size)
        monkeypatch.setattr(gemm_plan, "_ADD_UP_US", -1e9)

    return have


def slots(x, blocks, width):
    """x as the kernel has it (`slots`): by rows of a piece, 64 columns in their order, 16 bytes exchanged. Behind the last row
    NaN, which nobody writes."""
    batch, columns = x.shape
    padded = torch.zeros(batch, blocks * 16, dtype=x.dtype)
    padded[:, :columns] = x
    full = torch.full((-(-batch // width) * width, blocks * 16), float("nan"), dtype=x.dtype)
    full[:batch] = padded
    place = torch.arange(64)
    source = place % 8 // 2 * 16 + place // 16 * 4 + place % 16 // 8 * 2 + place % 2
    made = full.reshape(-1, width, blocks // 4, 64)[..., source].permute(0, 2, 1, 3).reshape(-1, blocks // 4, width, 8, 8)
    piece = torch.arange(8)[None, :] ^ (torch.arange(width) % 8)[:, None]
    return torch.gather(made, 3, piece[None, None, :, :, None].expand_as(made)).contiguous()


def product(matrix, x, dtype=FP16, scale=None, bias=None, modes=(True,), only=None):
    """The launch, and x W^T [batch, out] times scale [batch], where y is bf16, plus bias [out]."""
    shape, entries = outliers.without_outliers(matrix.layout)
    given = None if bias is None else bias.dtype
    launches = gemm._launches.__wrapped__(shape, entries, len(x), dtype, given, CPU, True)
    memory, packed = Memory(), matrix.pack()
    y = memory.add(empty(len(x) * matrix.layout.out_features, dtype), writable=True)
    addresses = [
        memory.add(bits(slots(x, matrix.layout.blocks, launches.plan.width))),
        0 if scale is None else memory.add(scale.numpy()),
        *(memory.add(packed[leaf]) if leaf in packed else 0 for leaf in LEAVES), 0 if bias is None else memory.add(bits(bias)),
        y, memory.add(np.full(max(launches.plan.partial, 1), np.nan, np.float32), writable=True),
    ]  # fmt: skip
    run(launches.product, memory, addresses, modes, only)
    return launches.plan, torch.from_numpy(memory.array(y).copy()).view(dtype).reshape(len(x), -1)


def check(y, expected):
    """Each row of y against float64, by its norm or what rows have; 7.7e-4 is what was measured at most, with eight numbers in
    a row, and bf16 rounds y by 1.7e-3."""
    assert torch.isfinite(y).all()
    norm = expected.norm(dim=1)
    error = (y.double() - expected).norm(dim=1) / norm.clamp_min(norm.mean())
    assert error.max() < (9e-4 if y.dtype == FP16 else 3e-3)


KINDS = [  # matrix, width, rows of x, rows and columns of W, dtype of y
    ({"weight_bits": 3}, 32, 40, 40, 1280, FP16),
    ({"weight_bits": 3, "outliers": 0.0}, 32, 32, 136, 768, FP16),
    ({"weight_bits": 2, "group_size": 32}, 32, 17, 70, 1270, BF16),
    ({"weight_bits": 4, "group_size": 64, "statistics": "direct"}, 64, 33, 100, 512, FP16),
    ({"weight_bits": 3, "group_size": 128, "statistics": "direct"}, 32, 20, 300, 768, FP16),
    ({"weight_bits": 2, "group_size": 48, "statistics": "direct", "outliers": 0.0}, 128, 100, 280, 1536, BF16),
    ({"weight_bits": 4, "group_size": 256, "statistics": "direct"}, 256, 130, 200, 1010, FP16),
    ({"weight_bits": 3, "group_size": 64, "outliers": 0.004}, 128, 66, 17, 1280, BF16),
    ({"weight_bits": 3}, 256, 257, 130, 512, FP16),
]


@pytest.mark.parametrize(("kind", "width", "batch", "rows", "columns", "dtype"), KINDS, ids=lambda k: str(k).replace(" ", ""))
def test_every_kind_of_matrix(random_matrix, plan_of, kind, width, batch, rows, columns, dtype):
    """Rows that fill no piece, columns that fill no block; programs begin and end within pieces."""
    plan_of(width)
    matrix = random_matrix(rows, columns, **kind)
    x = rows_of_x(batch, columns)
    scale, bias, expected = expected_of(matrix, x, dtype)
    _, y = product(matrix, x, dtype, scale, bias)
    check(y, expected)


@pytest.mark.parametrize("width", gemm_plan.CHOICES)
def test_programs_share_pieces(random_matrix, plan_of, width):
    """Many share one, pieces of one program alone between them, and copies and products that come late or at once."""
    plan_of(width, 5)
    matrix = random_matrix(16 * gemm_plan.CHOICES[width].warps + 5, 256 * 7, outliers=0.01)
    x = rows_of_x(width - 3, 256 * 7)
    plan, y = product(matrix, x, modes=(True, False))
    assert plan.programs > 2
    assert plan.partial
    check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


def test_a_program_waits_for_the_parts_of_others(random_matrix, plan_of, monkeypatch):
    """The last one alone never ends. The machine runs programs one after the other, so a missing wait is seen in no result."""
    plan_of(32)
    monkeypatch.setattr(ptx_machine, "MOST_STEPS", 20_000)
    matrix = random_matrix(8, 256 * 9, outliers=0.01)
    x = rows_of_x(20, 256 * 9)
    product(matrix, x, only=0)
    with pytest.raises(PtxError, match="no end"):
        product(matrix, x, only=2)


@pytest.mark.parametrize("width", gemm_plan.CHOICES)
def test_programs_have_several_pieces(random_matrix, plan_of, width):
    """Y is written by way of shared memory of the next x. Without outliers, which have barriers of their own."""
    plan_of(width)
    matrix = random_matrix(16 * gemm_plan.CHOICES[width].warps * 3 + 8, 256 * 3, outliers=0.0)
    x = rows_of_x(width, 256 * 3)
    plan, y = product(matrix, x)
    assert plan.pieces > plan.programs
    check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


@pytest.mark.parametrize(("width", "programs"), [(32, 9), (64, 1)], ids=str)
def test_more_than_32_chunks(random_matrix, plan_of, width, programs):
    """Bounds of outliers are read for 32 chunks at once; or more programs share a piece than are added up together."""
    plan_of(width, -(-programs // gemm_plan.CHOICES[width].resident))
    matrix = random_matrix(8, 256 * 37, outliers=0.01)
    x = rows_of_x(19, 256 * 37)
    plan, y = product(matrix, x)
    assert plan.programs == programs
    check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


CLUSTERS = [  # matrix, width, programs of a cluster, rows of x, rows and columns of W, dtype of y
    ({"weight_bits": 3}, 64, 2, 64, 256, 1280, FP16),
    ({"weight_bits": 3}, 64, 4, 50, 130, 9 * 256, BF16),
    ({"weight_bits": 3, "outliers": 0.0}, 128, 2, 129, 100, 1024, FP16),
    ({"weight_bits": 2, "group_size": 64}, 128, 8, 101, 130, 4090, FP16),
    ({"weight_bits": 4, "group_size": 32, "statistics": "direct"}, 256, 2, 200, 50, 1280, BF16),
    ({"weight_bits": 3}, 256, 4, 256, 136, 2048, FP16),
]


@pytest.mark.parametrize(
    ("kind", "width", "size", "batch", "rows", "columns", "dtype"), CLUSTERS, ids=lambda k: str(k).replace(" ", "")
)
def test_clusters(random_matrix, plan_of, kind, width, size, batch, rows, columns, dtype):
    """The programs of each have some of the columns, not all as many, and of each piece some of the rows of x."""
    plan_of(width, 4 * size, size)
    matrix = random_matrix(rows, columns, **kind)
    x = rows_of_x(batch, columns)
    scale, bias, expected = expected_of(matrix, x, dtype)
    plan, y = product(matrix, x, dtype, scale, bias, modes=(True, False))
    assert plan.cluster == size
    assert plan.programs == plan.pieces * size
    check(y, expected)


@pytest.mark.parametrize(("width", "cluster"), [(32, 1), (128, 1), (64, 2)])
def test_crowded_outliers(random_matrix, plan_of, width, cluster):
    """Cells with none, with as many as are copied and one more or less, and with all of their weights; the last tile's, behind
    which no outlier is."""
    plan_of(width, cluster, cluster)
    share = np.zeros((40, 1024))
    for cell, count in enumerate((1, 31, 32, 33, 63, 64, 65, 0)):
        share[3, 128 * cell : 128 * cell + count] = 1
    share[16:32, :256] = share[20, 300:] = 1
    share[39, -1] = share[32, 0] = 1
    few = np.zeros((40, 1024))
    few[17, 128:168] = few[39, -33:] = 1  # more than are copied where there are few, and hardly more
    base = random_matrix(40, 1024, outliers=0.0)
    for some, entries in ((share, 4), (few, 1)):
        matrix = with_outliers(base, some)
        assert outliers.outliers_a_lane(matrix.layout) == entries
        x = rows_of_x(width, 1024)
        plan, y = product(matrix, x)
        assert plan.cluster == cluster
        check(y, x.double() @ torch.from_numpy(matrix.dequantize()).double().T)


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("batch", "columns"), [(37, 1010), (9, 5120)])  # a program a row, and three; no eights, and eights
def test_x_is_prepared_as_the_kernel_reads_it(random_matrix, dtype, width, batch, columns):
    layout = random_matrix(16, columns).layout
    x = rows_of_x(batch, columns).to(dtype)
    x[5] *= 1e-30 if dtype == BF16 else 1e-3
    x[7] *= 1e30 if dtype == BF16 else 1e3
    launch = prepare.prepare_launch(layout, batch, dtype, CPU, width, {"DEPENDENT": True, "launch_pdl": True})
    assert launch.grid[:2] == (batch, -(-columns // 2048))
    memory = Memory()
    rows = -(-batch // width) * width
    made = memory.add(empty(rows * layout.blocks * 16, FP16), writable=True)
    scale = memory.add(np.ones(batch, np.float32), writable=True)
    run(launch, memory, [memory.add(bits(x)), made, scale], modes=(True,))
    found = torch.from_numpy(memory.array(made).copy()).view(FP16)
    factor = torch.from_numpy(memory.array(scale).copy()).double()
    expected = (x.double() / factor[:, None]).half()
    assert (expected.double() * factor[:, None] - x.double()).abs().max() <= (x.double().abs() * 2.0**-11).max()
    expected = slots(expected, layout.blocks, width).reshape(-1)
    assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])

"""The kernels of several rows and several matrices as Triton compiles them, run by `ptx_machine`, against float64."""

from __future__ import annotations

import itertools
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import gemm_plan, joined, siblings

sys.path.insert(0, str(Path(__file__).parent))
from ptx_launch import CPU, bits, empty, expected_of, pretend_gpu, rows_of_x, run  # beside this file, not part of a package
from ptx_memory import Memory
from test_batches import check, slots

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """A GPU of one multiprocessor; called with a number, of so many."""

    def have(count):
        pretend_gpu(monkeypatch, count)

    have(1)
    return have


def in_turns(launch):
    """Programs of the matrices in turns, as on a GPU that begins all at once: what one leaves, others may not overwrite."""
    first1, first2 = (
        launch.integers[list(launch.kernel.arg_names).index(name) - len(launch.dtypes)] for name in ("first1", "first2")
    )
    each = (range(*some, launch.cluster) for some in ((0, first1), (first1, first2), (first2, launch.grid[0])))
    firsts = [program for some in itertools.zip_longest(*each) for program in some if program is not None]
    return [first + rank for first in firsts for rank in range(launch.cluster)]


def products(matrices, x, dtype, modes=(True,), few=16):
    """The launch, and for each matrix what it gives and what it should, float64: [batch, out]. few: rows up to which `small`
    multiplies."""
    layouts = tuple(matrix.layout for matrix in matrices)
    shapes, kept, entries = siblings.alike.__wrapped__(layouts)
    scaled = [expected_of(matrix, x, dtype) for matrix in matrices]
    scale, biases = scaled[0][0], [bias for _, bias, _ in scaled]
    expected = [of_matrix for _, _, of_matrix in scaled]
    if scale is not None:  # one for all
        plain = [x.double() @ torch.from_numpy(matrix.dequantize()).double().T for matrix in matrices]
        expected = [y * scale.double()[:, None] + bias.double() for y, bias in zip(plain, biases, strict=True)]
    given, blocks = None if scale is None else dtype, layouts[0].blocks
    if len(x) <= few:
        launches = siblings._few_rows.__wrapped__(shapes, kept, len(x), dtype, given, CPU)
        parts = launches.parts
        made = torch.nn.functional.pad(x, (0, blocks * 16 - x.shape[1]))
    else:
        launches = siblings._many_rows.__wrapped__(shapes, entries, len(x), dtype, given, CPU)
        parts = max(launches.plan.partial, 1)
        made = slots(x, blocks, launches.plan.width)
    memory = Memory()
    stored = []
    for matrix in matrices:
        tensors = {leaf: torch.from_numpy(part.copy()) for leaf, part in matrix.pack().items()}
        stored.append(memory.add(joined.join(tensors, matrix.layout).numpy()))
    added = [0 if bias is None else memory.add(bits(bias)) for bias in biases]
    results = [memory.add(empty(len(x) * layout.out_features, dtype), writable=True) for layout in layouts]
    of_three = [[*each, each[-1]][:3] for each in (stored, added, results)]
    addresses = [memory.add(bits(made)), 0 if scale is None else memory.add(scale.numpy()), *chain(*of_three)]
    addresses.append(memory.add(np.full(parts, np.nan, np.float32), writable=True))
    run(launches.product, memory, addresses, modes, order=in_turns(launches.product))
    found = [torch.from_numpy(memory.array(y).copy()).view(dtype).reshape(len(x), -1) for y in results]
    return launches.product, list(zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "batch", "rows", "columns", "dtype", "count"),
    [
        ({}, 5, (100, 17, 40), 1270, FP16, 2),
        ({"group_size": 32}, 13, (70, 136), 768, BF16, 1),
        ({"weight_bits": 4, "statistics": "direct", "group_size": 128, "outliers": 0.0}, 9, (24, 70), 1280, FP16, 2),
        ({}, 20, (70, 40, 17), 1280, FP16, 2),
        ({"weight_bits": 4, "statistics": "direct", "group_size": 128}, 33, (130, 40), 500, BF16, 5),
        ({"outliers": 0.0}, 130, (200, 40), 768, FP16, 4),
    ],
    ids=lambda k: str(k).replace(" ", ""),
)
def test_every_matrix_has_its_product(random_matrix, multiprocessors, monkeypatch, kind, batch, rows, columns, dtype, count):
    """Matrices that share pieces between programs and that have one; rows that fill no piece. None reads another's outliers.
    For 20 rows both kernels."""
    multiprocessors(count)
    shares = (0.01, 0.03, 0.002)
    matrices = [random_matrix(out, columns, seed=i, **{"outliers": shares[i]} | kind) for i, out in enumerate(rows)]
    width = next((width for width in gemm_plan.CHOICES if width >= batch), 256)
    monkeypatch.setattr(gemm_plan, "CHOICES", {width: gemm_plan.CHOICES[width]})
    for few in (16, 32) if batch == 20 else (16,):
        launch, found = products(matrices, rows_of_x(batch, columns), dtype, few=few)
        assert launch.grid[0] > len(rows)
        for y, expected in found:
            check(y, expected)


def test_matrices_of_clusters(random_matrix, multiprocessors, monkeypatch):
    multiprocessors(8)
    monkeypatch.setattr(gemm_plan, "CHOICES", {64: gemm_plan.CHOICES[64]})
    monkeypatch.setattr(gemm_plan, "_ADD_UP_US", -1e9)
    matrices = [random_matrix(out, 1280, seed=i, outliers=0.01) for i, out in enumerate((130, 40, 17))]
    launch, found = products(matrices, rows_of_x(50, 1280), BF16)
    assert (launch.cluster, launch.grid[0]) == (2, 8)
    for y, expected in found:
        check(y, expected)


@pytest.mark.parametrize("batch", [4, 18])
def test_copies_that_come_at_once_give_the_same(random_matrix, multiprocessors, batch):
    multiprocessors(3)
    matrices = [random_matrix(out, 256 * 9, seed=i, outliers=0.01) for i, out in enumerate((40, 88, 17))]
    _, found = products(matrices, rows_of_x(batch, 256 * 9), FP16, modes=(True, False))
    for y, expected in found:
        check(y, expected)

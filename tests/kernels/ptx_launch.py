"""Launches as Triton compiles them, run by `ptx_machine`, and what their results are checked against."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import torch
from ptx_machine import Program, run_cluster
from ptx_text import Kernel
from triton.backends.compiler import GPUTarget

from spqr_format import SpqrMatrix
from spqr_kernels import overlap
from spqr_kernels.compile_ahead import Variant

CPU = torch.device("cpu")
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32",
    torch.int64: "*i64", torch.float32: "*fp32",
}  # fmt: skip
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative rounding error of y


def pretend_gpu(monkeypatch, multiprocessors):
    """Launches are made for a GPU of so many multiprocessors, whose kernels overlap."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=multiprocessors))
    monkeypatch.setattr(overlap, "options", lambda *_: {"DEPENDENT": True, "launch_pdl": True})


@functools.cache
def compiled(kernel, signature, constants, warps, registers):
    variant = Variant("launch", kernel, dict(signature), dict(constants), warps, registers)
    made = variant.compile(GPUTarget("cuda", 90, 32))
    return Kernel(made.asm["ptx"], made.metadata.shared)


def run(launch, memory, addresses, modes=(True, False), only=None, order=None, **forced):
    """All programs of a launch, or the one of number `only`, or as many as `order` has, in that order and whole clusters;
    asynchronous copies late and at once. forced: constants that are other than the launch's."""
    if order is None:
        order = range(launch.grid[0]) if only is None else (only,)
    constants = dict(launch.constants) | forced
    constants.pop("launch_pdl", None)
    warps, registers = constants.pop("num_warps"), constants.pop("maxnreg", None)
    kinds = [POINTERS[dtype] for dtype in launch.dtypes] + ["i32"] * len(launch.integers)
    signature = tuple(zip(launch.kernel.arg_names, kinds, strict=False))
    kernel = compiled(launch.kernel, signature, tuple(constants.items()), warps, registers)
    results = []
    for late in modes:
        before = memory.bytes.copy()
        for y in range(launch.grid[1]):
            for first in range(0, len(order), launch.cluster):
                some = order[first : first + launch.cluster]
                given = [*addresses, *launch.integers]
                run_cluster([Program(kernel, memory, given, (x, y, 0), launch.grid, late) for x in some])
        results.append(memory.bytes)
        memory.bytes = before
    memory.bytes = results[0]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy()


def empty(count, dtype):
    return np.full(count, bits(torch.tensor([float("nan")], dtype=dtype))[0])


def row(columns, dtype=torch.float16, seed=1):
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of_x(batch, columns, seed=1):
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).half()


def expected_of(matrix, x, dtype):
    """What a kernel of several rows is given beside x, scale [batch] and bias [out], both for bf16 alone, and the product with
    them in float64 [batch, out]."""
    bias, scale = None, None
    expected = x.double() @ torch.from_numpy(matrix.dequantize()).double().T
    if dtype == torch.bfloat16:
        bias = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
        scale = torch.rand(len(x)) + 0.5
        expected = expected * scale.double()[:, None] + bias.double()
    return scale, bias, expected


def check(y, dense, x, bias=None):
    """Each element of y [out] against W x + bias in float64, W = dense [out, in]."""
    dense, exact_x = torch.from_numpy(np.asarray(dense)).double(), x.double()
    expected = dense @ exact_x + (0 if bias is None else bias.double())
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= HALF_UNIT[x.dtype] * expected.abs() + 2e-6 * (dense.abs() @ exact_x.abs()) + 1e-7).all(), error.max()


def with_outliers(matrix, share, seed=5):
    """The same matrix with other outliers. share [out, in]: how probable one is."""
    rng = np.random.default_rng(seed)
    mask = rng.random(share.shape) < share
    count = int(mask.sum())
    return SpqrMatrix(
        matrix.layout.with_outliers(count), matrix.codes, tile_stats=matrix.tile_stats, scale_codes=matrix.scale_codes,
        zero_codes=matrix.zero_codes, crow_indices=np.concatenate([[0], mask.sum(1).cumsum()]), col_indices=np.nonzero(mask)[1],
        values=rng.uniform(0.05, 0.2, count).astype(np.float16),
    )  # fmt: skip

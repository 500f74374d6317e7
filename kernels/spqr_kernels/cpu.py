"""The ops on a CPU: numba's kernels where numba can be had, else the torch reference.

Few rows of x are multiplied with the packed codes. For more of them pieces of W are decoded into the cache, and torch
multiplies. The kernels run on as many threads as torch uses, and on the very ones that torch has: OpenMP's threads wait awake
for some milliseconds after each operation, so that a second set would compete with them for the cores. (numba's own parallel
loops bring a second OpenMP, and end the process in a fork or, in one of their layers, in concurrent calls.)
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, its name everywhere
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import TILE, Layout, ceil_div
from spqr_format.packing import FIELDS, is_spread

from . import reference

PRODUCT_BATCH = 6  # largest batch that is multiplied with the codes
SERIAL = 1 << 18  # products, or weights, up to which one thread is as fast as many
_PIECE = 1 << 22  # weights that are decoded at a time: 8 MB in bf16

Tensors = Mapping[str, Tensor]

# Where a stored tensor's address stands in cpu_kernels.ARGUMENTS.
_ADDRESSES = {leaf: leaf for leaf in ("weight", "stat_codes", "tile_stats", "group_sc", "group_zp", "outlier_ptr", "perm")}
_ADDRESSES |= {"outliers": "outlier_words"}
_compiling = threading.Lock()
_process = os.getpid()


def linear(x: Tensor, tensors: Tensors, layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x [batch, in] of any floating dtype, batch > 0; accumulates in float32, in float64 for float64.

    Up to PRODUCT_BATCH rows the result has the same bits for any number of threads. Beyond, torch's own product decides.
    """
    few = x.shape[0] <= PRODUCT_BATCH
    if x.dtype == torch.float64 or kernel("products" if few else "decode") is None:
        return reference.linear(x, tensors, layout, None if bias is None else bias.to(x.dtype))
    if few:
        y = _products(x.float().contiguous(), tensors, layout)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    # Few CPUs multiply fp16 themselves, and torch's way around that is slower than float32.
    operand = x.float() if x.dtype == torch.float16 else x
    y = x.new_empty(x.shape[0], layout.out_features)
    for rows, piece in _pieces(tensors, layout, operand.dtype):
        y[:, rows] = F.linear(operand, piece, None if bias is None else bias[rows].to(operand.dtype))
    return y


def dequantize(tensors: Tensors, layout: Layout, dtype: torch.dtype) -> Tensor:
    """W [out, in] in original column order; in float32 equal to spqr_format's numpy decode bit for bit."""
    if kernel("decode") is None:
        return reference.dequantize(tensors, layout, dtype)
    weight = tensors["weight"].new_empty(layout.out_features, layout.in_features, dtype=dtype)
    if dtype in (torch.float32, torch.bfloat16):
        _decode(weight, 0, layout.tile_rows, tensors, layout)
    else:
        for rows, piece in _pieces(tensors, layout, torch.float32):
            weight[rows] = piece
    return weight


def kernel(name: str) -> Any:
    """The compiled kernel `products` or `decode`, a function of an address; None, and once a warning, if there is none.

    The first call compiles it, which takes seconds, or takes it from numba's cache on disk.
    """
    with _compiling:
        return _compiled(name)


@functools.cache
def _compiled(name: str) -> Any:
    try:
        from numba import cfunc

        from . import cpu_kernels

        function, options = cpu_kernels.KERNELS[name]
        try:  # the cache is __pycache__ beside the source, or below ~/.cache where that cannot be written
            callback: Any = cfunc(cpu_kernels.SIGNATURE, cache=True, **options)(function)
        except (OSError, RuntimeError):
            callback = cfunc(cpu_kernels.SIGNATURE, **options)(function)
    except Exception as error:  # numba is missing, or fails in one of its ways: the reference is right, too
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"spqr_kernels: products on the CPU are slow without numba's kernels ({reason})", stacklevel=2)
        return None
    compiled = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(callback.address)  # other Python threads run during a call
    compiled.owner = callback  # type: ignore[attr-defined]  # keeps the code alive
    return compiled


def _products(x: Tensor, tensors: Tensors, layout: Layout) -> Tensor:
    """x W^T in float32 for float32 x [batch, in], contiguous."""
    from .cpu_kernels import CHUNK

    batch = x.shape[0]
    y = x.new_empty(batch, layout.out_features)
    columns = ceil_div(layout.blocks, CHUNK) * CHUNK * TILE
    _run(
        "products", tensors, layout, batch * layout.out_features * layout.in_features, batch * (columns + layout.groups + 18),
        x=x.data_ptr(), result=y.data_ptr(), batch=batch, last=layout.tile_rows,
    )  # fmt: skip
    return y


def _decode(weight: Tensor, first: int, last: int, tensors: Tensors, layout: Layout) -> Tensor:
    """Writes the rows of the row tiles first .. last - 1 into weight, float32 or bf16 [rows, in], contiguous; returns it."""
    from .cpu_kernels import CHUNK

    _run(
        "decode", tensors, layout, weight.numel(), (3 * TILE + 6) * ceil_div(layout.blocks, CHUNK) * CHUNK + 1,
        result=weight.data_ptr(), bf16=weight.dtype == torch.bfloat16, first=first, last=last,
    )  # fmt: skip
    return weight


def _pieces(tensors: Tensors, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of W and what they hold, float32 or bf16 [rows, in], piece by piece and all in the same place."""
    tiles = max(1, _PIECE // (TILE * layout.in_features))
    room = tensors["weight"].new_empty(min(tiles * TILE, layout.out_features), layout.in_features, dtype=dtype)
    for first in range(0, layout.tile_rows, tiles):
        last = min(first + tiles, layout.tile_rows)
        rows = slice(first * TILE, min(last * TILE, layout.out_features))
        yield rows, _decode(room[: rows.stop - rows.start], first, last, tensors, layout)


def _run(name: str, tensors: Tensors, layout: Layout, work: int, scratch_size: int, **arguments: int) -> None:
    """Runs a kernel on torch's threads, or on one where there is little work; scratch_size is in float32 a thread.

    Raises SpqrError E509 where a stored index is out of range.
    """
    from . import cpu_kernels

    threads = torch.get_num_threads() if work > SERIAL else 1
    scratch_size = ceil_div(scratch_size, TILE) * TILE  # a cache line is never two threads'
    scratch = tensors["weight"].new_empty(threads * scratch_size, dtype=torch.float32)
    counters = np.zeros(3, np.int64)
    taken, begun, faults = (counters.ctypes.data + 8 * i for i in range(3))
    arguments |= {_ADDRESSES[leaf]: tensor.data_ptr() for leaf, tensor in tensors.items()}
    arguments |= {
        "places": _places(layout.weight_bits).ctypes.data,
        "scratch": scratch.data_ptr(), "scratch_size": scratch_size, "taken": taken, "threads": begun, "faults": faults,
        "out": layout.out_features, "inn": layout.in_features, "blocks": layout.blocks, "groups": layout.groups,
        "group_blocks": layout.group_size // TILE, "bits": layout.weight_bits, "bilevel": layout.statistics == "bilevel",
        "outliers": layout.outliers,
    }  # fmt: skip
    record = np.array([tuple(arguments.get(field, 0) for field in cpu_kernels.FIELDS)], cpu_kernels.ARGUMENTS)
    _on_threads(kernel(name), record.ctypes.data, threads)
    if counters[2]:
        raise SpqrError("E509", f"spqr::{name}", "outlier_ptr, outliers or perm: an index out of range")


def _on_threads(function: Any, address: int, threads: int) -> None:
    """Calls function(address) on so many threads at once, and returns when all are done."""
    if threads == 1:
        function(address)
    elif os.getpid() == _process and (parallel := _openmp()) is not None:
        parallel(ctypes.cast(function, ctypes.c_void_p), address, threads, 0)
    else:  # no such OpenMP here, or a forked process, in which it has lost its threads
        pool = _pool(os.getpid(), threads)
        others = [pool.submit(function, address) for _ in range(threads - 1)]
        function(address)
        for other in others:
            other.result()


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch loaded, or None.

    GCC makes this call of `#pragma omp parallel`; libgomp has it, and LLVM's libomp on Linux as well.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, "spqr")


@functools.cache
def _places(bits: int) -> np.ndarray:
    """int64 [2 halves, 8 pairs, (word, bit)] of the low column's code; word `bits` stands for the field at SPREAD."""
    rows = [[(bits, 0) if is_spread(bits, bit) else (word, bit) for word, bit in row] for row in FIELDS[bits]]
    return np.array(rows, np.int64)

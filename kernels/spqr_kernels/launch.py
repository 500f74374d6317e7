"""Launches of the tensor-core kernels that cost the host little.

Triton's `run` looks at every argument of a call to find which specialization it takes, and at every global that the kernel
reads: at batch 1 that is longer than the product. Here all but the addresses of a call are fixed once; the first call goes
through `run`, which compiles, and the ones after it go to what it compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from spqr_format.layout import TILE, Layout

from .joined import Joined, places

# What the kernels take of a stored matrix, in their order. What a layout does not have is not read.
LEAVES = {
    "weight": torch.int32, "stat_codes": torch.int32, "tile_stats": torch.int16, "group_sc": torch.int16,
    "group_zp": torch.uint8, "outlier_ptr": torch.int32, "outliers": torch.int32,
}  # fmt: skip

# Launches that are remembered of each kernel whose launch depends on the number of rows. There is one for every shape and
# number, a few KB each: prompts come in all lengths, and each expert of many has its own number of tokens in every one.
REMEMBERED = 8192


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Launch:
    """A kernel with its grid and everything that it is given behind the addresses. Called with the addresses alone, each a
    multiple of 16, on the device that it was made for."""

    def __init__(
        self, kernel: Any, grid: tuple[int, int], device: torch.device, dtypes: Sequence[torch.dtype], integers: Sequence[int],
        constants: Mapping[str, Any], cluster: int = 1,
    ) -> None:  # fmt: skip
        """dtypes: what the addresses point to. constants: of the kernel, and Triton's options for it. cluster: how many
        programs that follow each other run as one."""
        self.kernel, self.grid, self.device, self.cluster = kernel, (*grid, 1), device, cluster
        self.dtypes, self.integers, self.constants = tuple(dtypes), tuple(integers), dict(constants)
        self._rest: tuple[Any, ...] = ()
        self._run: Any = None

    def __call__(self, *addresses: Any) -> None:
        """Queues the kernel on the device's current stream. A tensor descriptor is given as it is."""
        with on_device(self.device):
            if self._run is not None:
                self._run(*addresses, *self._rest)
                return
            given = [_Pointer(a, t) if isinstance(a, int) else a for a, t in zip(addresses, self.dtypes, strict=True)]
            names = self.kernel.arg_names[len(given) + len(self.integers) :]
            self._rest = (*self.integers, *(self.constants[name] for name in names))
            if self.cluster == 1:
                compiled = self.kernel[self.grid](*given, *self.integers, **self.constants)
                self._run = compiled[self.grid]
            else:
                run = self._of_clusters(given)
                run(*addresses, *self._rest)
                self._run = run

    def _of_clusters(self, given: Sequence[Any]) -> Any:
        """What launches the kernel in clusters, compiled; where `has_clusters`. Triton has them for kernels of which every
        tensor is spread over a cluster; here each program has its own tensors, and only the launch is told."""
        compiled = self.kernel.warmup(*given, *self.integers, grid=self.grid, **self.constants)
        warps, _, shared = compiled.packed_metadata
        compiled.packed_metadata = (warps, self.cluster, shared)
        programs, more, one = self.grid
        return compiled[(programs // self.cluster, more, one)]


@cache
def has_clusters() -> bool:
    """Whether Triton tells its launcher of a kernel what `Launch` writes anew: warps, programs of a cluster, bytes of shared
    memory. 3.6 to 3.9 do; it is no promise of Triton's."""
    try:
        from triton.backends.nvidia.compiler import CUDABackend

        told = CUDABackend.pack_metadata(None, SimpleNamespace(num_warps=8, num_ctas=2, shared=1000))
    except (ImportError, AttributeError, TypeError):
        return False
    return bool(told == (8, 2, 1000))


_HERE = contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """Address of the current stream of a GPU, from where Triton has it: no object is made for it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the current device, on which Triton launches, is `device`, if that is one of CUDA's."""
    return _HERE if device.type != "cuda" or device.index == torch.cuda.current_device() else torch.cuda.device(device)


def constants_of(layout: Layout) -> dict[str, int | bool]:
    """What every tensor-core kernel is compiled with for a matrix."""
    bilevel = layout.statistics == "bilevel"
    return {"BITS": layout.weight_bits, "BILEVEL": bilevel, "BLOCKS_A_GROUP": layout.group_size // TILE}


@cache
def _offsets(layout: Layout) -> tuple[int, ...]:
    found = places(layout)
    return tuple(found[leaf].begin * found[leaf].dtype.itemsize if leaf in found else 0 for leaf in LEAVES)


def addresses(tensors: Mapping[str, Tensor], layout: Layout) -> list[int]:
    """Where each of LEAVES lies; what the layout does not have, where the weight does."""
    if isinstance(tensors, Joined):
        begin = tensors.whole.data_ptr()
        return [begin + offset for offset in _offsets(layout)]
    weight = tensors["weight"]
    return [tensors.get(leaf, weight).data_ptr() for leaf in LEAVES]

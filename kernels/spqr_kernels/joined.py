"""All stored tensors of a matrix in one, one behind the other.

A layer hands `spqr::linear` this one tensor: each input of a compiled graph costs a guard and a place in every loop on the way
to a CUDA graph, at every call, and a matrix would have up to six."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout, ceil_div

TORCH_DTYPES = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
ALIGNMENT = 128  # bytes, a multiple of which every tensor begins at
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies: from element `begin` of its dtype on, contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int


@functools.cache
def places(layout: Layout) -> dict[str, Place]:
    """Leaf -> place, in the order of `layout.tensors()`. Raises SpqrError E509 where a tensor is beyond int32 indices."""
    found, end = {}, 0
    for leaf, spec in layout.tensors().items():
        dtype = TORCH_DTYPES[spec.dtype]
        if spec.nbytes > INT32_MAX * dtype.itemsize:
            raise SpqrError("E509", leaf, f"{spec.nbytes // dtype.itemsize} elements, kernels index with int32")
        begin = ceil_div(end, ALIGNMENT) * ALIGNMENT
        found[leaf] = Place(dtype, spec.shape, (*spec.shape[1:], 1), begin // dtype.itemsize)
        end = begin + spec.nbytes
    return found


@functools.cache
def length(layout: Layout) -> int:
    """Elements, int32, of the tensor that holds all: a multiple of ALIGNMENT bytes."""
    leaf, place = list(places(layout).items())[-1]
    end = place.begin * place.dtype.itemsize + layout.tensors()[leaf].nbytes
    return ceil_div(end, ALIGNMENT) * ALIGNMENT // torch.int32.itemsize


def join(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """int32 [length(layout)] with a copy of every tensor of `layout`, on the device of `tensors["weight"]`, zeros between."""
    joined = torch.zeros(length(layout), dtype=torch.int32, device=tensors["weight"].device)
    for leaf, view in split(joined, layout).items():
        view.copy_(tensors[leaf])
    return joined


def split(joined: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Leaf -> view of `joined`, int32 [length(layout)], contiguous."""
    of_dtype = {torch.int32: joined}
    views = {}
    for leaf, place in places(layout).items():
        whole = of_dtype.get(place.dtype)
        if whole is None:
            whole = of_dtype[place.dtype] = joined.view(place.dtype)
        views[leaf] = whole.as_strided(place.shape, place.stride, whole.storage_offset() + place.begin)
    return views


class Joined(Mapping[str, Tensor]):
    """Leaf -> stored tensor of `whole`, int32 [length(layout)]: views that are made when one is asked for."""

    def __init__(self, whole: Tensor, layout: Layout) -> None:
        self.whole, self.layout = whole, layout
        self._views: dict[str, Tensor] | None = None

    def __getitem__(self, leaf: str) -> Tensor:
        if self._views is None:
            self._views = split(self.whole, self.layout)
        return self._views[leaf]

    def __iter__(self) -> Iterator[str]:
        return iter(places(self.layout))

    def __len__(self) -> int:
        return len(places(self.layout))

"""Gluon functions run as plain Python on a CPU, with torch tensors: what they compute, whatever lane computes it.

Gluon has no interpreter. But which value a lane gets is a matter of shapes alone, as long as layouts only place values; that a
layout puts each where the next one wants it is what the compiler checks (`assert_trivial`). Memory is bounds-checked.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction


@dataclass(frozen=True)
class Pointer:
    """Places, int64 of any shape or 0, in a flat tensor."""

    memory: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)

    def to(self, dtype: torch.dtype) -> Pointer:
        """The same memory, not yet indexed, as another type."""
        assert isinstance(self.at, int)
        assert self.at == 0
        return Pointer(self.memory.view(dtype))

    def load(self, mask: Any, other: int) -> Tensor:
        """What stands there where mask says so, else `other`. A masked place may lie anywhere, others must not."""
        at, mask = torch.broadcast_tensors(self.at, torch.as_tensor(mask))
        assert ((at >= 0) & (at < len(self.memory)) | ~mask).all(), "outside of the tensor"
        return torch.where(mask, self.memory[at.clamp(0, len(self.memory) - 1)], other)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = values.shape

    def slice(self, first: int, length: int, dim: int) -> Shared:
        """So many along dim from first on."""
        return Shared(self.values.narrow(dim, first, length))

    def load(self, layout: Any) -> Tensor:
        """All of it."""
        return self.values.clone()


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    limits = torch.iinfo(dtype)
    return Shared(torch.randint(limits.min // 2, limits.max // 2, shape, dtype=dtype))  # nobody may count on what is there


def _copy(room: Shared, pointer: Pointer, mask: Any) -> None:
    room.values.copy_(pointer.load(mask, 0).expand_as(room.values))


def _funnel(low: Tensor, high: Tensor, shift: Tensor) -> Tensor:
    """Of `lanes.funnel`, which is one instruction."""
    both = (high.to(torch.int64) << 32) | (low.to(torch.int64) & 0xFFFFFFFF)
    return (both >> shift).to(torch.int32)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


_NO_LAYOUT = dict.fromkeys(("BlockedLayout", "SliceLayout", "DistributedLinearLayout", "SwizzledSharedLayout"), lambda *_: None)
_LANGUAGE = types.SimpleNamespace(
    **_NO_LAYOUT,
    int32=torch.int32,
    int64=torch.int64,
    pointer_type=lambda dtype: dtype,
    static_range=range,
    arange=lambda first, end, layout: torch.arange(first, end, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    reshape=torch.reshape,
    permute=torch.permute,
    expand_dims=torch.unsqueeze,
    split=lambda value: value.unbind(-1),
    convert_layout=lambda value, layout, assert_trivial: value,
    where=_where,
    minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    allocate_shared_memory=_allocate,
    load=Pointer.load,
)
_INSTEAD = {"gl": _LANGUAGE, "funnel": _funnel, "copy_async": _copy}


def plain(function: GluonJITFunction, made: dict[int, dict[str, Any]] | None = None) -> types.FunctionType:
    """A Gluon function, and all that it calls, as Python functions of torch tensors, `Pointer`s and `Shared` memory."""
    made = {} if made is None else made
    before = function.fn.__globals__
    if id(before) not in made:
        after = made[id(before)] = dict(before)
        for name, value in before.items():
            if name in _INSTEAD:
                after[name] = _INSTEAD[name]
            elif isinstance(value, GluonJITFunction):
                after[name] = plain(value, made)
    return types.FunctionType(function.fn.__code__, made[id(before)])

"""Eager products of one row of x past PyTorch's dispatcher, with all settled before that does not depend on x.

A token at a time, the host takes longer to ask for a product than the GPU to compute it, and most of that goes into the way
through the dispatcher to this very package, with checks of what a layer has checked already. This way is for plain tensors in
plain calls: whatever watches or changes operators (modes, functorch, tracing) has to find the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spqr_format.layout import TILE, Layout

from .dispatch import has_tensor_cores, in_one_launch, whole_chunks
from .joined import Joined
from .launch import Launch, addresses


class OneRow:
    """x W^T + bias for one row of x, with one matrix or each of several that one launch can take."""

    def __init__(self, joined: Sequence[Tensor], layouts: Sequence[Layout], biases: Sequence[Tensor | None]) -> None:
        """joined: what `joined.join` makes of each, which has to stay where it is. biases: [out], for each or none."""
        self.joined, self.biases, self.layouts = tuple(joined), tuple(biases), tuple(layouts)
        self.device, self.columns = joined[0].device, layouts[0].in_features
        self._launches: dict[torch.dtype, Launch] = {}
        if self._fits():
            self._settle()

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """[..., out] of each in x's dtype. None where the operator is to be asked: for other than a plain row of fp16 or bf16,
        contiguous and aligned, and for matrices that the batch-1 kernel does not take as they are."""
        launch = self._launches.get(x.dtype)
        if launch is None or not _is_plain(x) or x.numel() != self.columns or x.device != self.device:
            return None
        at, shape = x.data_ptr(), x.shape
        if at % 16 or shape[-1] != self.columns or not x.is_contiguous():
            return None
        if self._added and not self._biases_are_there():
            return None
        results = [x.new_empty((*shape[:-1], layout.out_features)) for layout in self.layouts]
        to = [y.data_ptr() for y in results]
        to += to[-1:] * self._missing
        launch(*(at,) * self._of_x, *self._matrices, *(self._added or to), *to)
        return results

    def is_of(self, joined: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        """Whether these are the tensors that it was made with."""
        return all(map(is_, self.joined, joined)) and all(map(is_, self.biases, biases))

    def _biases_are_there(self) -> bool:
        """Whether there is one for each, where it was, with the dtype of all: `.to` and `.data =` change a parameter in its
        place."""
        found = [bias.data_ptr() for bias in self.biases if bias is not None and bias.dtype == self._dtype]
        return found == self._added[: len(self.biases)]

    def _fits(self) -> bool:
        first, biases = self.layouts[0], [bias for bias in self.biases if bias is not None]
        if not has_tensor_cores(self.device) or not whole_chunks(first) or first.permuted or first.in_features % TILE:
            return False
        if any(given.device != self.device or given.data_ptr() % 16 for given in (*self.joined, *biases)):
            return False
        return len(self.layouts) == 1 or in_one_launch(self.layouts, 1, torch.float16, self.device)

    def _settle(self) -> None:
        from . import matvec, siblings

        bias = self._dtype = None if self.biases[0] is None else self.biases[0].dtype
        self._added = [each.data_ptr() for each in self.biases if each is not None]
        if len(self.layouts) == 1:
            self._of_x, self._missing = 2, 0
            self._matrices = addresses(Joined(self.joined[0], self.layouts[0]), self.layouts[0])
        else:
            self._of_x, self._missing = 1, len(siblings.three(self.joined)) - len(self.joined)
            self._matrices = siblings.three([whole.data_ptr() for whole in self.joined])
            self._added += self._added[-1:] * self._missing
        for dtype in (torch.float16, torch.bfloat16):
            if len(self.layouts) == 1:
                self._launches[dtype] = matvec.launch_for(self.layouts[0], dtype, bias, self.device, True)
            else:
                self._launches[dtype] = siblings.row_launch(self.layouts, dtype, bias, self.device)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing looks at operators or stands in for tensors."""
    return (
        type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )

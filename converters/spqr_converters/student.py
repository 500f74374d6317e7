"""A quantized model with frozen codes, whose continuous numbers can be learnt in the place of the original's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spqr_format.errors import SpqrError
from spqr_format.matrix import SpqrMatrix
from spqr_format.reader import Checkpoint

from .blocks import Plan
from .dense import dense_tensor
from .tunable import TunableMatrix, rounded


class Learn(NamedTuple):
    """Which continuous numbers are learnt: statistics and outliers of matrices, dense vectors."""

    matrices: bool
    vectors: bool


LEARN = {"all": Learn(True, True), "matrices": Learn(True, False), "vectors": Learn(False, True)}


class TunableVector(nn.Module):
    """A norm's weight or a bias, `forward()` float32 as its dtype holds it. The parameter is an offset in units of the
    vector's mean size."""

    def __init__(self, stored: Tensor, device: torch.device) -> None:
        super().__init__()
        self.dtype = stored.dtype
        self.stored = stored.to(device=device, dtype=torch.float32)
        self.unit = self.stored.abs().mean()
        self.offset = nn.Parameter(torch.zeros_like(self.stored))

    def forward(self) -> Tensor:
        return rounded(self.stored + self.unit * self.offset, self.dtype)

    @torch.no_grad()
    def tensor(self) -> Tensor:
        """The learnt vector in its own dtype."""
        return self().to(self.dtype).cpu()


class Student:
    """The model that a checkpoint holds, run through the modules of `original` with other weights.

    matrices: module name -> its matrix; vectors: tensor name -> a dense vector that is learnt. learn: a key of `LEARN`. What
    is not learnt is as the checkpoint has it.
    Errors: E508 where the checkpoint's tensors are not those of this model.
    """

    def __init__(self, checkpoint: Checkpoint, original: nn.Module, plan: Plan, learn: str, device: torch.device) -> None:
        self.original = original
        self.matrices = {module: TunableMatrix(checkpoint.matrix(module), device) for module in checkpoint.modules}
        for matrix in self.matrices.values():
            matrix.requires_grad_(LEARN[learn].matrices)
        self.vectors: dict[str, TunableVector] = {}
        self._singles: dict[str, nn.Module] = {}  # parameter of the model -> what makes it
        self._fixed: dict[str, Tensor] = {}  # parameter of the model -> the checkpoint's tensor, where it is another one
        parts: dict[str, nn.Module] = {f"{module}.weight": matrix for module, matrix in self.matrices.items()}
        wanted = {name: tensor for name, tensor in plan.parameters.items() if name in dict(original.named_parameters())}
        for name, tensor in wanted.items():
            shape = tuple(original.get_parameter(name).shape)
            if tensor in parts:
                matrix = self.matrices[tensor.removesuffix(".weight")]
                self._fits(tensor, (matrix.layout.out_features, matrix.layout.in_features), shape)
                self._singles[name] = matrix
                continue
            stored = _stored(checkpoint, tensor)
            self._fits(tensor, tuple(stored.shape), shape)
            if LEARN[learn].vectors and stored.dim() == 1 and stored.dtype in (torch.float16, torch.bfloat16, torch.float32):
                self._singles[name] = self.vectors[tensor] = TunableVector(stored, device)
            elif not torch.equal(value := stored.to(device=device, dtype=torch.float32), original.get_parameter(name)):
                self._fixed[name] = value
        # An expert that the checkpoint keeps dense counts as it stands there.
        self._stacks = {
            name: [[parts.get(tensor) or _constant(checkpoint, tensor, device) for tensor in row] for row in rows]
            for name, rows in plan.experts.items()
        }
        used = {tensor for tensor in wanted.values()} | {t for rows in plan.experts.values() for row in rows for t in row}
        for tensor in parts:
            if tensor not in used:
                raise SpqrError("E508", tensor, "the original has no such tensor")

    @staticmethod
    def _fits(tensor: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise SpqrError("E508", tensor, f"shape {found}, the original's is {expected}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is learnt, in an order that is the same for the same checkpoint."""
        for module in (*self.matrices.values(), *self.vectors.values()):
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        """Parameter of the model -> its value, float32, for `logits`."""
        found = {name: part() for name, part in self._singles.items()}
        for name, rows in self._stacks.items():
            found[name] = torch.stack([torch.cat([part() for part in row]) for row in rows])
        return self._fixed | found

    def logits(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """float32 [batch, length, vocabulary] of ids int64 [batch, length]."""
        return _logits(functional_call(self.original, weights, (), {"input_ids": ids, "use_cache": False}))

    @torch.no_grad()
    def target(self, ids: Tensor) -> Tensor:
        """The original's own logits."""
        return _logits(self.original(input_ids=ids, use_cache=False))

    def matrix(self, module: str) -> SpqrMatrix:
        """A module with what was learnt."""
        return self.matrices[module].matrix()


def _stored(checkpoint: Checkpoint, tensor: str) -> Tensor:
    """A dense tensor that has to be there."""
    if tensor not in checkpoint.place:
        raise SpqrError("E508", tensor, "the checkpoint has no such tensor, and the original has")
    return dense_tensor(checkpoint, tensor)


def _constant(checkpoint: Checkpoint, tensor: str, device: torch.device) -> Callable[[], Tensor]:
    """A matrix, float32 [out, in], that is not learnt."""
    value = _stored(checkpoint, tensor).to(device=device, dtype=torch.float32)
    return lambda: value


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.float()

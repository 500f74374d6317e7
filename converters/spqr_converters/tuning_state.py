"""Where a tuning stands after an epoch, in a file: what a killed run had learnt, so that the next one goes on there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spqr_format.errors import SpqrError
from spqr_format.journal import PARTIAL

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam, in torch's names


class TuningState:
    """A safetensors file of the parameters, the best ones so far, and Adam's moments; its metadata holds the identity of the
    run and the losses of its epochs. Replaced whole after each epoch, so that a kill leaves the old or the new one.

    Raises E511 where the file is of another identity (everything that the result depends on), unless `restart` removes it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], restart: bool) -> None:
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)
        if restart:
            path.unlink(missing_ok=True)
        if path.exists() and self._metadata().get("identity") != self.identity:
            what = "a tuning with other options, models or versions was begun here; --restart begins anew"
            raise SpqrError("E511", str(path), what)

    def _metadata(self) -> dict[str, str]:
        try:
            with safe_open(self.path, "pt") as file:
                return file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise SpqrError("E511", str(self.path), f"not readable ({error}); --restart begins anew") from None

    def save(
        self, parameters: Sequence[Tensor], best: Sequence[Tensor], optimizer: torch.optim.Adam, epochs: list[dict[str, float]]
    ) -> None:
        """After an epoch; `epochs` are the losses of all so far."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
        tensors |= {f"best.{i}": b for i, b in enumerate(best)}
        for name in _MOMENTS:
            tensors |= {f"{name}.{i}": optimizer.state[p][name] for i, p in enumerate(parameters)}
        new = self.path.with_name("new-" + self.path.name)
        assert new.name.endswith(PARTIAL)
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, new, {
            "identity": self.identity, "epochs": json.dumps(epochs),
        })  # fmt: skip
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, self.path)

    @torch.no_grad()
    def load(self, parameters: Sequence[Tensor], best: Sequence[Tensor], optimizer: torch.optim.Adam) -> list[dict[str, float]]:
        """Fills all three with what the file holds; the losses of the epochs that are done (none without a file)."""
        if not self.path.exists():
            return []
        with safe_open(self.path, "pt") as file:
            for i, (parameter, kept) in enumerate(zip(parameters, best, strict=True)):
                parameter.copy_(file.get_tensor(f"parameter.{i}"))
                kept.copy_(file.get_tensor(f"best.{i}"))
                moments = {name: file.get_tensor(f"{name}.{i}") for name in _MOMENTS}
                # Adam keeps its count of steps on the host.
                optimizer.state[parameter] = {
                    name: tensor if name == "step" else tensor.to(parameter.device) for name, tensor in moments.items()
                }
            epochs: list[dict[str, float]] = json.loads(file.metadata()["epochs"])
        return epochs

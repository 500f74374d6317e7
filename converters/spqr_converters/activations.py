"""The hidden states between two blocks: on the device while they fit, else in RAM, else in a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, overload

import torch

from spqr_format.journal import PARTIAL


class Room:
    """Where activations may lie: at most so many bytes on the device and in RAM (None: all of them), the rest in a file.

    The file is in `folder` (the system's temporary one where that is None), which is made when it is needed. It has no name:
    the system takes it back when the room is closed or the process ends, also by a kill. Read and written, not mapped into
    memory, because mapped pages count as the process's own.
    """

    def __init__(
        self, device: torch.device | str, on_device: int | None = None, in_ram: int | None = None, folder: Path | None = None
    ) -> None:
        self.device = torch.device(device)
        self._left = {"device": on_device, "ram": in_ram}
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    def choose(self, nbytes: int) -> str:
        """ "device", "ram" or "file", for so many bytes more; on a CPU the device is RAM."""
        for place, left in self._left.items():
            if place == "device" and self.device.type == "cpu":
                continue
            if left is None:
                return place
            if nbytes <= left:
                self._left[place] = left - nbytes
                return place
        return "file"

    def reserve(self, nbytes: int) -> int:
        """An offset in the file with that many bytes behind it."""
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, suffix=PARTIAL)  # noqa: SIM115 - closed by `close`
        self._end += nbytes
        return self._end - nbytes

    def write(self, tensor: torch.Tensor, offset: int) -> None:
        """A tensor's bytes at a place of the file."""
        assert self._file is not None
        view = _bytes(tensor.detach().cpu().contiguous())
        while view.nbytes:
            count = os.pwrite(self._file.fileno(), view[: 1 << 26], offset)
            view, offset = view[count:], offset + count

    def read(self, tensor: torch.Tensor, offset: int) -> None:
        """Fills a tensor on the CPU from a place of the file."""
        assert self._file is not None
        view = _bytes(tensor)
        while view.nbytes:
            count = os.preadv(self._file.fileno(), [view[: 1 << 26]], offset)
            if not count:
                raise OSError(f"the scratch file of activations ends {view.nbytes} bytes too early")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Gives the file back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Activations(Sequence[torch.Tensor]):
    """A list of tensors in a room. An element is on the room's device when it is read, bit for bit as it was put there. One
    that is replaced keeps its place, and so its shape and dtype."""

    def __init__(self, room: Room, tensors: Iterable[torch.Tensor] = ()) -> None:
        self.room = room
        self._held: list[torch.Tensor | _InFile] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: torch.Tensor) -> None:
        place = self.room.choose(tensor.nbytes)
        if place == "file":
            slot = _InFile(self.room.reserve(tensor.nbytes), tensor.shape, tensor.dtype)
            self.room.write(tensor, slot.offset)
            self._held.append(slot)
        else:
            self._held.append(tensor if place == "device" else tensor.cpu())

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, number: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, number: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, number: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        held = self._held[number]
        if isinstance(held, _InFile):
            tensor = torch.empty(held.shape, dtype=held.dtype)
            self.room.read(tensor, held.offset)
            return tensor.to(self.room.device)
        return held.to(self.room.device)

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        held = self._held[number]
        if (tensor.shape, tensor.dtype) != (held.shape, held.dtype):
            raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} in the place of {tuple(held.shape)} of {held.dtype}")
        if isinstance(held, _InFile):
            self.room.write(tensor, held.offset)
        else:
            self._held[number] = tensor.to(held.device)


class _InFile:
    """A tensor in the room's file."""

    def __init__(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.offset, self.shape, self.dtype = offset, shape, dtype


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data

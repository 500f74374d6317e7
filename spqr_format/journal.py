"""The journal of a checkpoint that is being written: what a killed run had finished, so that the next one goes on there.

Two files in the destination, which are no part of the format and are gone when the checkpoint is complete:

    journal.spqr-partial       one line of JSON for each thing that is done, in the order in which it was done
    spool-00003.spqr-partial   the bytes of the tensors of the third shard: where they will lie in it, as far as that is known
                               beforehand, else one after the other as they came

A spool whose tensors all lie where the shard has them becomes the shard, with its header in front; any other is copied.

A line is written after the bytes that it speaks of, and holds their sha256. What a kill tore (half a line, bytes without a
line) is cut off; what a power cut lost is found by the digests and cut off too. So neither file is synced for each tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .header import DTYPE_BYTES, short

Array = npt.NDArray[np.generic]
PARTIAL = ".spqr-partial"  # ends the name of every file that is not complete
JOURNAL = "journal" + PARTIAL
_PIECE = 1 << 22  # bytes that are copied at a time


@dataclass(frozen=True)
class Spooled:
    """A tensor whose bytes lie in a spool: `shape` and `nbytes` as of the array, and the sha256 of its bytes."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    nbytes: int
    sha256: str

    def parts(self) -> Iterator[bytes]:
        """The bytes, piece by piece."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise SpqrError("E001", self.path.name, f"{left} bytes of a tensor are gone")
                yield piece
                left -= len(piece)


class Journal:
    """The journal of one folder. `records` holds what an earlier run left, checked; new ones are only written.

    identity: everything that the output depends on. Raises E511 where the folder holds the journal of another identity, or
    one that cannot be read; the text names what differs.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        self.records: list[dict[str, Any]] = []
        self._shard = 1  # the open one
        self._end = 0  # of its spool
        self._spool: int | None = None
        if self.path.exists():
            self._recall(json.loads(_line(identity)))
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not self.path.stat().st_size:
            self._append({"identity": identity})

    # What was done before

    def _recall(self, identity: dict[str, Any]) -> None:
        good: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _parsed(line)
            if record is None:
                break
            if not good:
                if "identity" not in record:
                    raise SpqrError("E511", str(self.path), "not a journal that this version wrote; --restart begins anew")
                _same(record["identity"], identity, str(self.path))
            else:
                self._accept(record)
            good.append(line)
        for number, record in enumerate(self.records):
            if "shard" in record:
                self._close_spool(record)  # killed after the line, before this was done
            # Of a finished shard the spool is gone; the shard itself was synced before its line was written.
            elif record.get("in_shard") == self._shard:
                if not self._is_spooled(record):
                    del self.records[number:], good[number + 1 :]  # the first line is the identity
                    break
                self._end = max(self._end, _end(record))
        os.truncate(self.path, sum(map(len, good)))
        if self._spool_path(self._shard).exists():
            os.truncate(self._spool_path(self._shard), self._end)

    def _accept(self, record: dict[str, Any]) -> None:
        try:
            if "shard" in record:
                self._shard = record["shard"] + 1
                record["is_spool"] = bool(record["is_spool"])
            elif "tensors" in record:
                record["in_shard"] = self._shard
                _end(record)
        except (KeyError, TypeError, ValueError):
            raise SpqrError("E511", str(self.path), f"not a journal line: {short(record)}; --restart begins anew") from None
        self.records.append(record)

    def _is_spooled(self, record: Mapping[str, Any]) -> bool:
        return all(_digest(tensor.parts()) == tensor.sha256 for tensor in self.spooled(record).values())

    def spooled(self, record: Mapping[str, Any]) -> dict[str, Spooled]:
        """The tensors of a record of the open shard."""
        path = self._spool_path(record["in_shard"])
        return {
            name: Spooled(path, offset, tuple(shape), _nbytes(dtype, shape), digest)
            for name, dtype, shape, digest, offset in record["tensors"]
        }

    # What is done now

    def add(
        self,
        record: Mapping[str, Any],
        tensors: Mapping[str, tuple[str, Array]],
        digests: Mapping[str, str],
        places: Mapping[str, int] | None = None,
    ) -> dict[str, Spooled]:
        """Spools tensors (name -> dtype, array) and writes their line; `record` may hold anything else that is JSON.

        places: name -> offset in the spool, of all of them, where no other tensor lies; by default they are appended."""
        spool, rows = self._open_spool(), []
        for name, (dtype, array) in tensors.items():
            position = self._end if places is None else places[name]
            write_at(spool, array, position)
            if places is not None:
                _begin_write_back(spool, position, array.nbytes)
            self._end = max(self._end, position + array.nbytes)
            rows.append([name, dtype, list(array.shape), digests[name], position])
        whole = {**record, "tensors": rows}
        self._append(whole)
        return self.spooled({**whole, "in_shard": self._shard})

    def shard_written(self, number: int, size: int) -> None:
        """Shard `number` of `size` bytes is synced under its temporary name: its spool is no longer needed."""
        self._shard_done({"shard": number, "bytes": size, "is_spool": False})

    def shard_spooled(self, number: int, head: bytes, size: int) -> bool:
        """Makes the spool, which holds all of shard `number` but its head, that shard of `size` bytes. False, with nothing
        done, where the spool has another size."""
        spool = self._open_spool()
        if os.fstat(spool).st_size != size:
            return False
        write_at(spool, np.frombuffer(head, np.uint8), 0)
        os.fsync(spool)
        self._shard_done({"shard": number, "bytes": size, "is_spool": True})
        return True

    def _shard_done(self, record: dict[str, Any]) -> None:
        self._append(record)
        os.fsync(self._file)
        self._close_spool(record)
        self._shard, self._end = record["shard"] + 1, 0

    def _close_spool(self, record: Mapping[str, Any]) -> None:
        """What becomes of the spool of a shard that is done."""
        if self._spool is not None:
            os.close(self._spool)
            self._spool = None
        path = self._spool_path(record["shard"])
        if not record["is_spool"]:
            path.unlink(missing_ok=True)
        elif path.exists():
            os.rename(path, partial_shard(self.folder, record["shard"]))

    def finishing(self, names: Iterable[str]) -> None:
        """From here on files get these final names."""
        if not any("finishing" in record for record in self.records):
            self._append({"finishing": sorted(names)})
            os.fsync(self._file)

    def _append(self, record: Mapping[str, Any]) -> None:
        data = memoryview(_line(record))
        start = os.fstat(self._file).st_size
        try:
            while data.nbytes:
                data = data[os.write(self._file, data) :]
        except OSError:
            os.truncate(self.path, start)  # half a line must not precede the next one
            raise

    def _spool_path(self, shard: int) -> Path:
        return self.folder / f"spool-{shard:05d}{PARTIAL}"

    def _open_spool(self) -> int:
        if self._spool is None:
            self._spool = os.open(self._spool_path(self._shard), os.O_WRONLY | os.O_CREAT, 0o666)
        return self._spool

    def close(self) -> None:
        """Leaves everything for the next run."""
        for descriptor in (self._file, self._spool):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._file, self._spool = -1, None

    def remove(self) -> None:
        """The checkpoint is complete, or given up. The journal goes last: without it a spool is only a leftover."""
        self.close()
        self._spool_path(self._shard).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def partial_shard(folder: Path, number: int) -> Path:
    """A shard that is written and synced, under its temporary name."""
    return folder / f"model-{number:05d}.safetensors{PARTIAL}"


def write_at(descriptor: int, array: Array, position: int) -> None:
    """An array's bytes at a place of a file."""
    if not array.nbytes:
        return
    view = np.ascontiguousarray(array).reshape(-1).data.cast("B")
    while view.nbytes:
        count = os.pwrite(descriptor, view[: 2**26], position)
        view, position = view[count:], position + count


def _begin_write_back(descriptor: int, position: int, nbytes: int) -> None:
    """Linux begins to write these bytes to the disk and does not wait, so that the sync at the end finds little left. What goes
    wrong there is told by the sync; elsewhere nothing happens."""
    if hasattr(os, "posix_fadvise") and nbytes:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, position, nbytes, os.POSIX_FADV_DONTNEED)


def final_names(path: Path) -> set[str]:
    """The final names that a run which was finishing may have given to files. Empty where there is no such journal."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return set()
    for line in reversed(lines):
        record = _parsed(line)
        if record is not None and isinstance(record.get("finishing"), list):
            return {name for name in record["finishing"] if isinstance(name, str)}
    return set()


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def _end(record: Mapping[str, Any]) -> int:
    """Where the tensors of a record end in their spool."""
    return max((offset + _nbytes(dtype, shape) for _, dtype, shape, _, offset in record["tensors"]), default=0)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    try:
        for part in parts:
            digest.update(part)
    except (SpqrError, OSError):
        return ""
    return digest.hexdigest()


def _same(theirs: Any, ours: Any, where: str, key: str = "") -> None:
    """E511 with the first thing that two identities differ in."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted({*theirs, *ours}):
            _same(theirs.get(name), ours.get(name), where, f"{key}.{name}" if key else name)
    elif theirs != ours:
        what = f"an unfinished conversion with {key} = {short(theirs)}, asked for is {short(ours)}"
        raise SpqrError("E511", where, f"{what}; finish that one, choose another destination, or begin anew with --restart")

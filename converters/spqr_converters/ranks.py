"""The processes of torch.distributed that share one conversion: ranks 0 .. size - 1, of which rank 0 writes.

Every rank makes the same calls in the same order. What is sent is JSON and raw arrays; nothing is unpickled.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from spqr_format.errors import SpqrError

from .calibration import SHARDS
from .hessian import Accumulator, tree_sum

Arrays = Mapping[str, npt.NDArray[np.generic]]


class Ranks:
    """A process group: the one that is given, else the default one where torch.distributed is initialized, else this process
    alone. Never initializes anything. E505 where this process is not in the group."""

    def __init__(self, group: Any = None) -> None:
        active = dist.is_available() and dist.is_initialized()
        self._group = group
        self.size = dist.get_world_size(group) if active else 1
        self.rank = dist.get_rank(group) if active else 0
        if self.rank < 0:
            raise SpqrError("E505", "process_group", "this process is not in the group")
        # "cpu:gloo,cuda:nccl": each kind of tensor has its way, and a tensor of another kind travels as one that has.
        self._ways = dist.get_backend_config(group) if active else ""

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def on_this_host(self) -> int:
        """How many of the ranks share this machine's memory."""
        names = self.gather(socket.gethostname())
        return names.count(names[self.rank])

    # Who does what

    def owners(self, costs: Sequence[int]) -> list[int]:
        """A rank for each piece of work, the same list on every rank: the dearest first, each to the rank that has least."""
        loads, found = [0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            rank = loads.index(min(loads))
            found[number] = rank
            loads[rank] += costs[number]
        return found

    def of_shard(self, shard: int) -> int:
        """The rank that runs a shard of the calibration: neighbouring shards go to one rank."""
        return shard * self.size // SHARDS

    # What all must know

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each rank on its own: where it raises on some, every rank raises the error of the first of them."""
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = torch.tensor([self.size if error is None else self.rank], device=self._wire(torch.device("cpu")))
        dist.all_reduce(failed, dist.ReduceOp.MIN, self._group)
        first = int(failed)
        if first < self.size:
            told = self._send_bytes(first, _described(error) if error is not None else b"")
            raise error if self.rank == first and error is not None else _raised(first, told)

    def share(self, owner: int, make: Callable[[], tuple[Any, Arrays]]) -> tuple[Any, Arrays]:
        """What `make` gives on its owner, JSON and arrays, on every rank; or the error that it raises there."""
        if self.size == 1:
            return make()
        error, content = None, b""
        if self.rank == owner:
            try:
                made, arrays = make()
                content = _packed(made, arrays)
            except Exception as caught:
                error, content = caught, b"!" + _described(caught)
        content = self._send_bytes(owner, content)
        if error is not None:
            raise error
        if content[:1] == b"!":
            raise _raised(owner, content[1:])
        return _unpacked(content)

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value (JSON), on every rank."""
        return [self.share(rank, lambda: (value, {}))[0] for rank in range(self.size)]

    def agree(self, value: Any, what: str) -> None:
        """E505 on every rank where some rank has another value (JSON) than rank 0; the text names the first difference."""
        expected = self.share(0, lambda: (value, {}))[0]
        with self.together():
            key = _difference(expected, json.loads(json.dumps(value)), what)
            if key is not None:
                raise SpqrError("E505", "process_group", f"rank {self.rank} has another {key} than rank 0")

    # Sums

    def sum_shards(
        self, part: Callable[[int], Accumulator | None], empty: Callable[[], Accumulator], to: int
    ) -> Accumulator | None:
        """The shards' sums in the order of `hessian.tree_sum`, to the same bits for any number of ranks: each makes the sums
        of its own shards, and rank `to` adds what they come to. None elsewhere, and where nothing was seen."""
        spans = list(self._spans(0, SHARDS))
        sums = {}
        with self.together():
            for first, last, rank in spans:
                if rank == self.rank:
                    sums[first] = tree_sum(part, first, last)

        # Spans come in the order of the tree: one that is sent for waits until its neighbour is there.
        def whole(first: int, last: int) -> Accumulator | None:
            for begin, end, rank in spans:
                if (begin, end) == (first, last):
                    return self._move(sums.pop(first, None), empty, rank, to)
            middle = (first + last) // 2
            left, right = whole(first, middle), whole(middle, last)
            return left.merge(right) if left and right else left or right

        return whole(0, SHARDS)

    def _spans(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The largest subtrees of shards that one rank has all of, and that rank."""
        if self.of_shard(first) == self.of_shard(last - 1):
            yield first, last, self.of_shard(first)
        else:
            middle = (first + last) // 2
            yield from self._spans(first, middle)
            yield from self._spans(middle, last)

    def _move(self, sums: Accumulator | None, empty: Callable[[], Accumulator], source: int, to: int) -> Accumulator | None:
        """Sums from one rank to another; None where that is not this one."""
        if source == to:
            return sums if self.rank == to else None
        if self.rank == source:
            self._send(torch.tensor([sums.tokens if sums else 0]), to)
            if sums is not None:
                for tensor in sums.tensors():
                    self._send(tensor, to)
        elif self.rank == to:
            tokens = torch.zeros(1, dtype=torch.int64)
            self._receive(tokens, source)
            if int(tokens):
                found = empty()
                found.tokens = int(tokens)
                for tensor in found.tensors():
                    self._receive(tensor, source)
                return found
        return None

    def spread(self, sums: Accumulator | None, empty: Callable[[], Accumulator], owner: int) -> Accumulator:
        """Sums that one rank has, on every rank."""
        tokens = self.share(owner, lambda: (sums.tokens if sums else 0, {}))[0]
        found = sums if sums is not None and self.rank == owner else empty()
        found.tokens = tokens
        for tensor in found.tensors() if tokens else ():
            self._broadcast(tensor, owner)
        return found

    # The wire

    def _wire(self, device: torch.device) -> torch.device:
        """Where a tensor of this device has to be to travel."""
        kinds = [way.partition(":")[0] for way in self._ways.split(",") if way != "cuda:gloo"]
        return device if device.type in kinds else torch.device(kinds[0])

    def _send(self, tensor: torch.Tensor, to: int) -> None:
        dist.send(tensor.to(self._wire(tensor.device)), group=self._group, group_dst=to)

    def _receive(self, tensor: torch.Tensor, source: int) -> None:
        travelling = tensor.to(self._wire(tensor.device))
        dist.recv(travelling, group=self._group, group_src=source)
        if travelling is not tensor:
            tensor.copy_(travelling)

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        travelling = tensor.to(self._wire(tensor.device))
        dist.broadcast(travelling, group=self._group, group_src=source)
        if travelling is not tensor:
            tensor.copy_(travelling)

    def _send_bytes(self, owner: int, content: bytes) -> bytes:
        """The owner's bytes on every rank."""
        length = torch.tensor([len(content)])
        self._broadcast(length, owner)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == owner:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._broadcast(buffer, owner)
        return content if self.rank == owner else buffer.numpy().tobytes()


def _packed(made: Any, arrays: Arrays) -> bytes:
    """JSON and arrays as bytes: the length of a JSON header (8 bytes), the header, the arrays."""
    head = json.dumps([made, [[name, array.dtype.str, array.shape] for name, array in arrays.items()]]).encode()
    return b"".join([len(head).to_bytes(8, "big"), head, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])


def _unpacked(content: bytes) -> tuple[Any, dict[str, npt.NDArray[np.generic]]]:
    length = int.from_bytes(content[:8], "big")
    made, rows = json.loads(content[8 : 8 + length])
    position, arrays = 8 + length, {}
    for name, dtype, shape in rows:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(content, dtype, count, position).reshape(shape)
        arrays[name] = array.copy()  # aligned, and the message can go
        position += array.nbytes
    return made, arrays


def _described(error: Exception) -> bytes:
    if isinstance(error, SpqrError):
        return json.dumps({"spqr": [error.code, error.where, error.what]}).encode()
    if isinstance(error, OSError):
        return json.dumps({"os": [error.errno, error.strerror or str(error), error.filename and str(error.filename)]}).encode()
    return json.dumps({"other": f"{type(error).__name__}: {error}"}).encode()


def _raised(rank: int, described: bytes) -> Exception:
    """The error of another rank."""
    ((kind, said),) = json.loads(described).items()
    if kind == "spqr":
        return SpqrError(*said)
    if kind == "os":
        return OSError(said[0], f"{said[1]} (on rank {rank})", said[2]) if said[0] else OSError(f"{said[1]} (on rank {rank})")
    return RuntimeError(f"rank {rank}: {said}")


def _difference(expected: Any, found: Any, key: str) -> str | None:
    """Where two JSON values differ first."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted({*expected, *found}):
            if (inside := _difference(expected.get(name), found.get(name), f"{key}.{name}")) is not None:
                return inside
        return None
    return key if expected != found else None

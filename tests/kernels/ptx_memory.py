"""Global and shared memory in which every access is checked (for `ptx_machine`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_arithmetic import PtxError
from ptx_text import Kernel


class Memory:
    """Bytes of which each belongs to an array or to nobody."""

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 12, np.uint8)  # address 0 and its neighbours are nobody's
        self.owner = np.zeros(1 << 12, np.int32)  # 0: nobody, else the number of the array, negative where it is only read
        self._places: list[tuple[int, Any, Any]] = []

    def add(self, array: np.ndarray, writable: bool = False) -> int:
        """The address, a multiple of 128, of a copy of the array, which lies between bytes of nobody."""
        self._places.append((len(self.bytes), array.dtype, array.shape))
        number = len(self._places) if writable else -len(self._places)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        room = -(-len(raw) // 128) * 128 + 128
        self.bytes = np.concatenate([self.bytes, raw, np.full(room - len(raw), 255, np.uint8)])
        self.owner = np.concatenate([self.owner, np.full(len(raw), number), np.zeros(room - len(raw), np.int32)])
        return self._places[-1][0]

    def array(self, address: int) -> np.ndarray:
        """What stands now where `add` put an array."""
        begin, dtype, shape = next(place for place in self._places if place[0] == address)
        return self.bytes[begin : begin + dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)

    def bytes_at(self, addresses: np.ndarray, size: int, writes: bool = False) -> np.ndarray:
        """Places [lanes, size] of accesses of so many bytes, once they were checked."""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"not aligned to {size} bytes: {addresses}")
        if (addresses >= np.uint64(len(self.bytes) - size)).any():
            raise PtxError(f"outside of all arrays: {addresses}")
        places = addresses.astype(np.int64)[:, None] + np.arange(size)
        owners = self.owner[places]
        if (owners == 0).any() or (owners != owners[:, :1]).any():
            raise PtxError(f"outside of all arrays: {addresses[(owners == 0).any(1)]}")
        if writes and (owners < 0).any():
            raise PtxError(f"writes to what is only read: {addresses}")
        return places


class SharedMemory(Memory):
    """Of one program. Remembers of each byte the last write and the last read: the thread, and what `now` was."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        end = max([1024, *(begin + size for begin, size in kernel.shared)]) + 128
        self.bytes, self.owner = np.full(end, 255, np.uint8), np.zeros(end, np.int32)
        for number, (begin, size) in enumerate(kernel.shared):
            self.owner[begin : begin + size] = number + 1
        self.barriers = np.zeros(kernel.threads, np.int64)  # that each thread's warp has passed
        self.common = 0  # barriers of all threads
        self._last = {what: np.full((3, end), -1, np.int64) for what in ("write", "read")}  # thread, barriers, common
        self.fences = np.zeros(kernel.threads, np.int64)  # between what each thread does itself and the copy engine
        self._fences_before = np.zeros(end, np.int64)  # of the last writer of each byte, when it wrote
        # Of the last access by way of the cluster to each byte: the program's rank, the thread, its program's common barriers,
        # and meetings of the cluster; and what `common` was at the last meeting.
        self._remote = np.full((4, end), -1, np.int64)
        self.meetings = self._common_met = 0

    def touch(self, threads: np.ndarray, addresses: np.ndarray, size: int, writes: bool = False) -> np.ndarray:
        """`bytes_at`, where no other thread's access without a barrier between conflicts."""
        places = self.bytes_at(addresses, size, writes)
        mine, passed = threads[:, None], self.barriers[threads][:, None]
        for what in ("write", "read") if writes else ("write",):
            thread, barriers, common = (row[places] for row in self._last[what])
            ordered = (thread < 0) | (thread == mine) | (common < self.common)
            ordered |= (thread // 32 == mine // 32) & (barriers < passed)
            if not ordered.all():
                raise PtxError(f"no barrier between a {what} of thread {thread[~ordered][0]} and this access")
        if (self._remote[3][places] == self.meetings).any():
            raise PtxError("no meeting of the cluster between an access of another program and this one")
        for row, value in zip(self._last["write" if writes else "read"], (mine, passed, self.common), strict=True):
            row[places] = value
        return places

    def meet(self) -> None:
        """All threads of all programs of the cluster have come to its barrier."""
        self.barriers += 1
        self.common += 1
        self.meetings += 1
        self._common_met = self.common

    def touch_by_cluster(self, source: int, threads: np.ndarray, common: int, addresses: np.ndarray, size: int) -> np.ndarray:
        """`bytes_at` for threads of the program of rank `source`, which have passed so many common barriers of their own: where
        no access since the last meeting conflicts but of the same program, before a barrier of its own."""
        places = self.bytes_at(addresses, size, True)
        if any((last[2][places] >= self._common_met).any() for last in self._last.values()):
            raise PtxError("no meeting of the cluster between an access of this program and one of another")
        rank, thread, before, meetings = self._remote[:, places]
        ordered = (meetings < self.meetings) | ((rank == source) & ((before < common) | (thread == threads[:, None])))
        if not ordered.all():
            raise PtxError("no meeting of the cluster between accesses of two programs")
        for row, value in zip(self._remote, (source, threads[:, None], common, self.meetings), strict=True):
            row[places] = value
        return places

    def put(self, threads: np.ndarray, addresses: np.ndarray, raw: np.ndarray) -> None:
        """Writes bytes [threads, size]."""
        places = self.touch(threads, addresses, raw.shape[1], True)
        self._fences_before[places] = self.fences[threads][:, None]
        self.bytes[places] = raw
        if (self.bytes[places] != raw).any():
            raise PtxError("two threads write the same byte at once, and not the same")

    def used_since_barrier(self, places: slice) -> bool:
        """Whether a thread has written or read there since the last barrier of all threads."""
        return any((last[2, places] >= self.common).any() for last in self._last.values())

    def used_by_cluster(self, places: slice) -> bool:
        """Whether another program of the cluster has been there since the last meeting."""
        return bool((self._remote[3, places] == self.meetings).any())

    def written_without_fence(self, places: slice) -> bool:
        """Whether a thread has written there and passed no fence since."""
        writer = self._last["write"][0][places]
        return bool(((writer >= 0) & (self._fences_before[places] >= self.fences[writer])).any())

"""A machine for the PTX that Triton makes of a kernel: the threads of one program (a CTA), or of the few of a cluster, run on
numpy arrays, without a GPU.

What it checks is what a compiled kernel computes and touches, lane by lane: addresses, alignment and bounds of every access,
branches within a warp, barriers, asynchronous copies, fragments of products. It does not know how long anything takes, adds
the products of an `mma` in float64, and rounds `fma.rn.f32` twice in the rare cases where float64 is not exact.

Of all threads those that are furthest behind go next, together with all that stand at the same instruction, so the threads of
a warp that took different branches meet again where these do. A result could hide a missing barrier, and so shared memory
remembers which thread wrote and which last read each byte: another one that comes without a barrier between is an error.
Registers and shared memory begin as NaN, memory that no array covers must not be touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from ptx_arithmetic import PtxError, arithmetic, group_product, matrix_product, read, size_of, write
from ptx_memory import Memory, SharedMemory
from ptx_text import Address, Instruction, Kernel

MOST_STEPS = 1_000_000  # a loop that does not end is an error


@dataclass
class _Copy:
    """An asynchronous copy of some threads that has begun. group: how many groups each had committed before."""

    threads: np.ndarray
    to: np.ndarray
    data: np.ndarray
    group: np.ndarray


@dataclass
class _Barrier:
    """An mbarrier: `count` arrivals and all bytes that were told of end a phase. told: up to which product of each warp those
    know that see it end. copies: (address, data) on their way."""

    count: int
    told: np.ndarray
    arrived: int = 0
    expected: int = 0
    phase: int = 0
    copies: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def step(self) -> None:
        """Ends the phase if all is there."""
        if self.arrived == self.count and self.expected == 0:
            self.arrived, self.phase = 0, self.phase + 1


@dataclass
class Program:
    """One run of a kernel. arguments: of all its parameters, 0 where the last ones are missing. late: asynchronous copies take
    effect when they are waited for, else at once; a right program gives the same result."""

    kernel: Kernel
    memory: Memory
    arguments: Sequence[int]
    program: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, int, int] = (1, 1, 1)
    late: bool = True
    steps: int = field(default=0, init=False)

    def run(self) -> None:
        """From the first instruction until all threads have ended."""
        run_cluster([self])

    def begin(self, cluster: Sequence[Program], rank: int) -> None:
        """Before the first instruction, as the one of that rank of a cluster's programs."""
        self.cluster, self.rank = cluster, rank
        kernel, threads = self.kernel, self.kernel.threads
        arguments = [*self.arguments, *[0] * (kernel.parameters - len(self.arguments))]
        self.registers = np.empty((len(kernel.registers), threads), np.uint64)
        for name, number in kernel.registers.items():
            self.registers[number] = kernel.value(name, arguments, self.program, self.grid)
        self.shared = SharedMemory(kernel)
        self.copies: list[_Copy] = []
        self.committed = np.zeros(threads, np.int64)
        self.barriers: dict[int, _Barrier] = {}
        self.products: list[tuple[int, list, np.ndarray]] = []  # group, operands, threads
        self.groups = np.zeros(threads, np.int64)  # of products, committed
        # Numbers of products: the last one of each warp that read each KB of shared memory, and of which each thread knows.
        self.issued = 0
        self.met = 0  # the last one before the last meeting of the cluster
        self.reads = np.zeros((len(self.shared.bytes) // 1024 + 1, threads // 32), np.int64)
        self.known = np.zeros((threads, threads // 32), np.int64)
        self.at = np.zeros(threads, np.int64)  # the next instruction of each thread
        self.ended, self.waits, self.meets = np.zeros(threads, bool), np.zeros(threads, bool), np.zeros(threads, bool)

    def proceed(self) -> bool:
        """Until all threads have ended; False where they wait for the other programs of the cluster."""
        while not self.ended.all():
            free = ~(self.ended | self.waits | self.meets)
            if not free.any() and self.meets.any():
                if not self.meets.all():
                    raise PtxError("not all threads of a program come to the cluster's barrier")
                return False
            if not free.any():  # all have come to the barrier
                self.waits[:] = False
                self.known[:] = self.issued
                self.shared.barriers += 1
                self.shared.common += 1
                continue
            first = self.at[free].min()
            later = self.at[free & (self.at > first)]
            self._straight(np.flatnonzero(free & (self.at == first)), int(first), int(later.min()) if len(later) else 1 << 62)
        return True

    def meet(self) -> None:
        """Behind the cluster's barrier."""
        if self.products:
            raise PtxError("a product on its way when the cluster meets")
        self.meets[:] = False
        self.known[:] = self.met = self.issued
        self.shared.meet()

    def _straight(self, threads: np.ndarray, at: int, until: int) -> None:
        """These threads from an instruction on, until they branch, wait, end or meet others."""
        while at < until:
            instruction = self.kernel.instructions[at]
            on = threads
            if instruction.guard:
                register, wanted = instruction.guard
                on = threads[(self.registers[register, threads] & np.uint64(1)) == wanted]
            at += 1
            self.at[threads] = at
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise PtxError(f"no end after {MOST_STEPS} instructions")
            if len(on) == 0:
                continue
            try:
                leaves = self._execute(instruction, on)
            except PtxError as error:
                raise PtxError(f"{error}\nin {instruction.text}\nof program {self.program}") from None
            if leaves:
                return

    def _execute(self, instruction: Instruction, on: np.ndarray) -> bool:
        """One instruction of the threads `on`. True where they do not simply go on."""
        name, operands = instruction.name, instruction.operands
        if name in ("bra", "bra.uni"):
            self.at[on] = operands[0]
        elif name == "ret":
            self.ended[on] = True
        elif name == "bar.sync":
            self.waits[on] = True
        elif name == "barrier.cluster.wait.acquire.aligned":
            self._warps(on)
            self.meets[on] = True
        else:
            known = next((do for pattern, do in _BESIDE.items() if re.fullmatch(pattern, name)), None)
            if known:
                known(self, name, operands, on)
            else:
                made = arithmetic(name)
                if made is None:
                    raise PtxError(f"unknown instruction {name}")
                self._arithmetic(made, operands, on)
            return False
        return True

    def _of(self, register: int, on: np.ndarray, kind: str) -> np.ndarray:
        return read(self.registers[register, on], kind)

    def _arithmetic(self, made: tuple[Callable[..., np.ndarray], str, tuple[str, ...]], operands: list, on: np.ndarray) -> None:
        compute, result, kinds = made
        target, *sources = operands
        with np.errstate(all="ignore"):
            values = compute(*(self._of(s, on, kind) for s, kind in zip(sources, kinds, strict=True)))
        self.registers[target, on] = write(values, result)

    def _warps(self, on: np.ndarray) -> None:
        if len(on) % 32 or (on.reshape(-1, 32) != on[::32, None] // 32 * 32 + np.arange(32)).any():
            raise PtxError("not all threads of a warp are here")

    def _addresses(self, address: Address, on: np.ndarray) -> np.ndarray:
        return self.registers[address.base, on] + address.offset

    def _move(self, name: str, operands: list, on: np.ndarray) -> None:
        """mov, to or from parts of a word too."""
        to, source = operands
        size = size_of(name.split(".")[-1])
        if isinstance(to, tuple):
            width = size // len(to)
            for i, register in enumerate(to):
                self.registers[register, on] = read(self.registers[source, on] >> np.uint64(width * i), f"b{width}")
        elif isinstance(source, tuple):
            width = size // len(source)
            parts = [self._of(register, on, f"b{width}").astype(np.uint64) for register in source]
            self.registers[to, on] = sum(part << np.uint64(width * i) for i, part in enumerate(parts))
        else:
            self.registers[to, on] = self._of(source, on, f"b{size}")

    def _parameter(self, name: str, operands: list, on: np.ndarray) -> None:
        self.registers[operands[0], on] = self._of(operands[1].base, on, f"b{size_of(name.split('.')[-1])}")

    def _load(self, name: str, operands: list, on: np.ndarray) -> None:
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        size = size_of(name.split(".")[-1]) // 8
        addresses = self._addresses(operands[1], on)
        if ".shared" in name:
            raw = self.shared.bytes[self.shared.touch(on, addresses, size * len(to))]
        else:
            raw = self.memory.bytes[self.memory.bytes_at(addresses, size * len(to))]
        for register, values in zip(to, raw.view(f"u{size}").T, strict=True):
            self.registers[register, on] = values

    def _store(self, name: str, operands: list, on: np.ndarray) -> None:
        source = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        bits = size_of(name.split(".")[-1])
        raw = np.stack([self._of(register, on, f"b{bits}") for register in source], 1).view(np.uint8)
        addresses = self._addresses(operands[0], on)
        if ".shared" in name:
            self.shared.put(on, addresses, raw)
        else:
            self.memory.bytes[self.memory.bytes_at(addresses, raw.shape[1], True)] = raw

    def _map(self, name: str, operands: list, on: np.ndarray) -> None:
        """mapa: the address with the program's rank, from 1 on, in its upper byte."""
        to, address, rank = (operands[0], *(self.registers[operand, on] for operand in operands[1:]))
        if (rank >= len(self.cluster)).any():
            raise PtxError(f"the cluster has no program {rank.max()}")
        self.registers[to, on] = address | (rank + np.uint64(1)) << np.uint64(24)

    def _by_cluster(self, address: Address, on: np.ndarray, size: int) -> list[tuple[np.ndarray, Program, np.ndarray]]:
        """Which of the threads reach which program's memory, and where."""
        addresses = self._addresses(address, on)
        ranks = (addresses >> np.uint64(24)).astype(np.int64) - 1
        found = []
        for rank in np.unique(ranks):
            if rank < 0:
                raise PtxError("an address of no program of the cluster")
            some, other = np.flatnonzero(ranks == rank), self.cluster[rank]
            local = addresses[some] & np.uint64(2**24 - 1)
            if (other.reads[local.astype(np.int64) // 1024] > other.met).any():
                raise PtxError("an access to what a product of another program read, and no meeting between")
            places = other.shared.touch_by_cluster(self.rank, on[some], self.shared.common, local, size)
            found.append((some, other, places))
        return found

    def _load_by_cluster(self, name: str, operands: list, on: np.ndarray) -> None:
        for some, other, places in self._by_cluster(operands[1], on, 4):
            self.registers[operands[0], on[some]] = other.shared.bytes[places].view("u4")[:, 0]

    def _store_by_cluster(self, name: str, operands: list, on: np.ndarray) -> None:
        source = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        raw = np.stack([self._of(register, on, "b32") for register in source], 1).view(np.uint8)
        for some, other, places in self._by_cluster(operands[0], on, raw.shape[1]):
            other.shared.bytes[places] = raw[some]

    def _matrix(self, name: str, operands: list, on: np.ndarray) -> None:
        """ldmatrix and stmatrix: lanes 8 i .. 8 i + 7 have the addresses of the rows of matrix i, 16 bytes each, of which four
        lanes have 4 each; or where the name says trans eight lanes 2 each of two rows."""
        self._warps(on)
        address, registers = operands if name.startswith("st") else reversed(operands)
        lane = np.arange(len(on)) % 32
        for i, register in enumerate(registers):
            if ".trans" in name:
                rows = [self._addresses(address, on - lane + 8 * i + lane % 4 * 2 + k) + lane // 4 * 2 for k in range(2)]
                rows = [row.astype(np.uint64) for row in rows]
                low, high = (self.shared.bytes[self.shared.touch(on, row, 2)].view(np.uint16)[:, 0] for row in rows)
                self.registers[register, on] = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(16)
                continue
            row = self._addresses(address, on - lane + 8 * i + lane // 4)
            if (row % np.uint64(16)).any():
                raise PtxError("not aligned to 16 bytes")
            place = row + (lane % 4 * 4).astype(np.uint64)
            self.shared.put(on, place, self._of(register, on, "b32").reshape(-1, 1).view(np.uint8))

    def _matrix_by_columns(self, name: str, operands: list, on: np.ndarray) -> None:
        """stmatrix of a transposed matrix: of a row of memory eight lanes have two bytes each."""
        self._warps(on)
        address, registers = operands
        lane = np.arange(len(on)) % 32
        for i, register in enumerate(registers):
            halves = self._of(register, on, "b32").reshape(-1, 1).view(np.uint8)
            for k in range(2):
                row = self._addresses(address, on - lane + 8 * i + lane % 4 * 2 + k)
                if (row % np.uint64(16)).any():
                    raise PtxError("not aligned to 16 bytes")
                if (self.reads[row.astype(np.int64) // 1024] > self.known[on]).any():
                    raise PtxError("a write to what a product read, and nobody told that it is done")
                self.shared.put(on, row + (lane // 4 * 2).astype(np.uint64), halves[:, 2 * k : 2 * k + 2])

    def _barrier(self, address: Address, thread: int) -> _Barrier:
        place = int(self._addresses(address, np.array([thread]))[0])
        if place not in self.barriers:
            raise PtxError(f"no mbarrier at {place}")
        return self.barriers[place]

    def _begin_barrier(self, name: str, operands: list, on: np.ndarray) -> None:
        for thread, place in zip(on, self._addresses(operands[0], on), strict=True):
            nothing = np.zeros(self.kernel.threads // 32, np.int64)
            self.barriers[int(place)] = _Barrier(int(self.registers[operands[1], thread]), nothing)

    def _arrive(self, name: str, operands: list, on: np.ndarray) -> None:
        for thread in on:
            barrier = self._barrier(operands[1], thread)
            barrier.arrived += 1
            barrier.told = np.maximum(barrier.told, self.known[thread])
            barrier.told[thread // 32] = self.issued
            if "expect_tx" in name:
                barrier.expected += int(self.registers[operands[2], thread])
            if barrier.arrived > barrier.count:
                raise PtxError("more arrivals than the barrier knows")
            barrier.step()

    def _land(self, barrier: _Barrier) -> None:
        """What was on its way to a barrier is there. Nobody may still read there, or have written without a barrier."""
        for place, data in barrier.copies:
            room = slice(place, place + len(data))
            if any((at <= place + len(data)) and (at + size > place) for at, size in map(self._read_by, self.products)):
                raise PtxError("a copy to what a product still reads")
            if (self.shared.owner[room] == 0).any():
                raise PtxError(f"outside of all arrays: {place}")
            if self.shared.used_by_cluster(room):
                raise PtxError("a copy to what another program of the cluster used, and no meeting between")
            if self.shared.used_since_barrier(room):
                raise PtxError("a copy to what threads used, without a barrier between")
            if self.shared.written_without_fence(room):
                raise PtxError("a copy to what threads wrote, without a fence between")
            self.shared.bytes[room] = data
            barrier.expected -= len(data)
        barrier.copies = []
        barrier.step()

    def _bulk_copy(self, name: str, operands: list, on: np.ndarray) -> None:
        """cp.async.bulk: of one thread, so many bytes; the last operand is the barrier that is told."""
        for thread in on:
            one = np.array([thread])
            to, source = (int(self._addresses(operands[i], one)[0]) for i in range(2))
            size = int(self.registers[operands[2], thread])
            if (to | source | size) % 16:
                raise PtxError("not aligned to 16 bytes")
            if (self.reads[to // 1024 : -(-(to + size) // 1024)] > self.known[thread]).any():
                raise PtxError("a copy to what a product read, and nobody told that it is done")
            places = self.memory.bytes_at(np.arange(source, source + size, 16, dtype=np.uint64), 16)
            barrier = self._barrier(operands[3], thread)
            barrier.copies.append((to, self.memory.bytes[places].reshape(-1)))
            if not self.late:
                self._land(barrier)

    def _try_wait(self, name: str, operands: list, on: np.ndarray) -> None:
        """Whether the phase of that parity has ended."""
        to, address, parity = operands
        for thread in on:
            barrier = self._barrier(address, thread)
            if barrier.phase % 2 == int(self.registers[parity, thread]) and barrier.copies:
                self._land(barrier)
            ended = barrier.phase % 2 != int(self.registers[parity, thread])
            self.registers[to, thread] = np.uint64(ended)
            if ended:
                self.known[thread] = np.maximum(self.known[thread], barrier.told)

    @staticmethod
    def _read_by(product: tuple[int, list, np.ndarray]) -> tuple[int, int]:
        """Where the shared operand of a product begins, and its bytes, whole rows of 128."""
        _, operands, _ = product
        return operands[-1], len(operands[0]) * 2 * 128

    def _group_mma(self, name: str, operands: list, on: np.ndarray) -> None:
        """wgmma of warp groups, each of 128 threads. Reads and sums when it is waited for, or at once."""
        self._warps(on)
        if len(on) % 128:
            raise PtxError("part of a warp group")
        for group in on.reshape(-1, 128):
            begin = (int(self.registers[operands[2], group[0]]) & 0x3FFF) << 4
            product = (int(self.groups[group[0]]), [*operands[:3], begin // 1024 * 1024], group)
            first, size = self._read_by(product)
            self.issued += 1
            self.reads[first // 1024 : (first + size) // 1024, group[0] // 32 : group[0] // 32 + 4] = self.issued
            if self.late:
                self.products.append(product)
            else:
                self._multiply(product)

    def _multiply(self, product: tuple[int, list, np.ndarray]) -> None:
        _, (sums, a, descriptor, _), group = product
        columns = 2 * len(sums)
        word = int(self.registers[descriptor, group[0]])
        if word >> 62 != 1 or (word >> 32 & 0x3FFF) != 64:
            raise PtxError("another order of shared memory than rows of 128 bytes, swizzled")
        n, k = np.meshgrid(np.arange(columns), np.arange(16), indexing="ij")
        places = ((word & 0x3FFF) << 4) + n * 128 + 2 * k
        places ^= (places >> 7 & 7) << 4
        if (self.shared.owner[places] == 0).any():
            raise PtxError("outside of all arrays")
        b = self.shared.bytes[places[..., None] + np.arange(2)].view(np.float16)[..., 0].astype(np.float64)
        fragments = [self._of(register, group, "f16x2") for register in a]
        before = [self._of(register, group, "f32") for register in sums]
        for register, values in zip(sums, group_product(fragments, b, before), strict=True):
            self.registers[register, group] = write(values, "f32")

    def _commit_products(self, name: str, operands: list, on: np.ndarray) -> None:
        self.groups[on] += 1

    def _wait_for_products(self, name: str, operands: list, on: np.ndarray) -> None:
        left = int(self.registers[operands[0], on[0]])
        products, self.products = self.products, []
        for product in products:
            number, _, group = product
            if np.isin(group, on).all() and number < self.groups[group[0]] - left:
                self._multiply(product)
            else:
                self.products.append(product)
        if left == 0:
            self.known[on, on // 32] = self.issued  # of its own warp: others may be behind

    def _copy(self, name: str, operands: list, on: np.ndarray) -> None:
        """cp.async. A fourth operand is how many bytes are read, the others become 0; or whether none is."""
        to, source = self._addresses(operands[0], on), self._addresses(operands[1], on)
        size = int(self.registers[operands[2], on[0]])
        if ((to | source) % np.uint64(size)).any():
            raise PtxError(f"not aligned to {size} bytes")
        there = np.ones(len(on), bool)
        if len(operands) > 3:
            given = self.registers[operands[3], on]
            if operands[3] in self.kernel.predicates:
                there = given == 0
            else:
                there = given > 0
                if (given[there] != size).any():
                    raise PtxError("part of a copy")
        data = np.zeros((len(on), size), np.uint8)
        data[there] = self.memory.bytes[self.memory.bytes_at(source[there], size)]
        if self.late:
            self.copies.append(_Copy(on, to, data, self.committed[on]))
        else:
            self.shared.put(on, to, data)

    def _commit(self, name: str, operands: list, on: np.ndarray) -> None:
        self.committed[on] += 1

    def _wait(self, name: str, operands: list, on: np.ndarray) -> None:
        left = -1 if name.endswith("all") else int(self.registers[operands[0], on[0]])
        copies, self.copies = self.copies, []
        for copy in copies:
            done = np.isin(copy.threads, on) & (copy.group < self.committed[copy.threads] - left)
            self.shared.put(copy.threads[done], copy.to[done], copy.data[done])
            if not done.all():
                self.copies.append(_Copy(*(part[~done] for part in (copy.threads, copy.to, copy.data, copy.group))))

    def _warp_barrier(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        self.shared.barriers[on] += 1

    def _all_lanes(self, registers: list[int], wanted: list[int]) -> None:
        if [int(self.registers[register, 0]) % 2**32 for register in registers] != wanted:
            raise PtxError("of part of a warp")

    def _butterfly(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        to, source, distance, *rest = operands
        self._all_lanes(rest, [31, 2**32 - 1])
        partner = np.arange(len(on)) ^ self.registers[distance, on].astype(np.int64)
        self.registers[to, on] = self._of(source, on, "b32")[partner]

    def _indexed(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        to, source, lane, *rest = operands
        self._all_lanes(rest, [31, 2**32 - 1])
        partner = np.arange(len(on)) // 32 * 32 + self.registers[lane, on].astype(np.int64) % 32
        self.registers[to, on] = self._of(source, on, "b32")[partner]

    def _reduce(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        to, source, mask = operands
        self._all_lanes([mask], [2**32 - 1])
        _, _, how, kind = name.split(".")
        best = (np.min if how == "min" else np.max)(self._of(source, on, kind).reshape(-1, 32), axis=1)
        self.registers[to, on] = np.repeat(write(best, kind), 32)

    def _any(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        to, source, mask = operands
        self._all_lanes([mask], [2**32 - 1])
        found = self._of(source, on, "pred").reshape(-1, 32).any(axis=1)
        self.registers[to, on] = np.repeat(found, 32).astype(np.uint64)

    def _mma(self, name: str, operands: list, on: np.ndarray) -> None:
        self._warps(on)
        pair = name.split(".")[-2] + "x2"
        fragments = zip(operands[1:], (pair, pair, "f32"), strict=True)
        a, b, c = ([self._of(register, on, kind) for register in part] for part, kind in fragments)
        for register, values in zip(operands[0], matrix_product(a, b, c), strict=True):
            self.registers[register, on] = write(values, "f32")

    def _fence(self, name: str, operands: list, on: np.ndarray) -> None:
        self.shared.fences[on] += 1

    def _nothing(self, name: str, operands: list, on: np.ndarray) -> None:
        """Kernels before and after are not there, and memory is one."""


def run_cluster(programs: Sequence[Program]) -> None:
    """Programs of a cluster, by rank: each until it waits for the others, and so on until all have ended."""
    for rank, program in enumerate(programs):
        program.begin(programs, rank)
    while True:
        ended = [program.proceed() for program in programs]
        if all(ended):
            return
        if any(ended):
            raise PtxError("a program has ended for which others of the cluster wait")
        for program in programs:
            program.meet()


_BESIDE: dict[str, Callable[[Program, str, list, np.ndarray], None]] = {  # arithmetic
    r"mov\.(pred|[bufs]\d+)": Program._move,
    r"ld\.param\.[bus]\d+": Program._parameter,
    r"ld\.((acquire\.gpu\.)?global(\.nc|\.cg)?|shared)(\.v[24])?\.[buf]\d+": Program._load,
    r"st\.((release\.gpu\.)?global|shared)(\.v[24])?\.[buf]\d+": Program._store,
    r"mapa\.shared::cluster\.u32": Program._map,
    r"ld\.shared::cluster\.f32": Program._load_by_cluster,
    r"st\.shared::cluster(\.v4)?\.f32": Program._store_by_cluster,
    r"barrier\.cluster\.arrive\.release\.aligned": Program._nothing,
    r"(ldmatrix\.sync\.aligned\.m8n8\.x[124]\.trans|stmatrix\.sync\.aligned\.m8n8\.x[124])\.shared\.b16": Program._matrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.trans\.shared\.b16": Program._matrix_by_columns,
    r"mbarrier\.init\.shared::cta\.b64": Program._begin_barrier,
    r"mbarrier\.arrive(\.expect_tx)?\.shared::cta\.b64": Program._arrive,
    r"mbarrier\.try_wait\.parity\.shared::cta\.b64": Program._try_wait,
    r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes": Program._bulk_copy,
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16": Program._group_mma,
    r"wgmma\.commit_group\.sync\.aligned": Program._commit_products,
    r"wgmma\.wait_group\.sync\.aligned": Program._wait_for_products,
    r"wgmma\.fence\.sync\.aligned|fence\.mbarrier_init\.release\.cluster": Program._nothing,
    r"fence\.proxy\.async\.shared::cta": Program._fence,
    r"cp\.async\.c[ag]\.shared\.global": Program._copy,
    r"cp\.async\.commit_group": Program._commit,
    r"cp\.async\.wait_(group|all)": Program._wait,
    r"bar\.warp\.sync": Program._warp_barrier,
    r"shfl\.sync\.bfly\.b32": Program._butterfly,
    r"shfl\.sync\.idx\.b32": Program._indexed,
    r"redux\.sync\.(min|max)\.[su]32": Program._reduce,
    r"vote\.sync\.any\.pred": Program._any,
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32": Program._mma,
    r"griddepcontrol\.(wait|launch_dependents)": Program._nothing,
}

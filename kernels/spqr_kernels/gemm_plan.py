"""How `gemm_kernel` is cut into programs: from shapes and the number of multiprocessors alone, so that results repeat."""

from __future__ import annotations

from dataclasses import dataclass

from spqr_format.layout import ceil_div


@dataclass(frozen=True)
class Choice:
    """How the kernel runs for a width, the rows of x that a program multiplies with: measured on an H200."""

    warps: int
    turn: int  # slots between two barriers
    registers: int | None  # the limit of a thread's
    resident: int  # programs that a multiprocessor holds
    chunk_us: float  # time of a multiprocessor for a chunk of a program, when it is full


CHOICES = {
    32: Choice(4, 2, 168, 3, 0.45), 64: Choice(4, 2, 168, 3, 0.55), 128: Choice(4, 2, None, 2, 0.9),
    256: Choice(8, 1, None, 1, 2.75),
}  # fmt: skip
_START = 1.5  # chunks that the start and the end of a program take
_FINISH_US = 3.0  # of `finish_kernel`, and its bytes a microsecond
_FINISH_BYTES = 3.5e6
_LEAST_CHUNKS = 3  # of a program that shares a piece


@dataclass(frozen=True)
class Plan:
    """Which programs make which pieces of Y, as `gemm_kernel` has it."""

    width: int
    parts: int
    pieces: int
    whole: int
    splits: int
    a_split: int

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.whole + (self.pieces - self.whole) * self.splits


def _load(programs: int, multiprocessors: int, choice: Choice) -> float:
    """How many programs one after the other take as long as so many at once: where a multiprocessor holds fewer than it could,
    it gets less done, but not in proportion."""
    slots = choice.resident * multiprocessors
    rest = ceil_div(programs % slots, multiprocessors)
    return programs // slots * choice.resident + (rest * choice.resident) ** 0.5


def plan_for(batch: int, tile_rows: int, chunks: int, multiprocessors: int) -> Plan:
    """The plan of the least predicted time: pieces that do not fill all multiprocessors are split until they do."""
    widest = next((n for n in CHOICES if n >= batch), max(CHOICES))
    plans = []
    for width in (widest, widest // 2) if widest > 128 else (widest,):
        choice = CHOICES[width]
        parts = ceil_div(batch, width)
        pieces = ceil_div(tile_rows, choice.warps) * parts
        slots = choice.resident * multiprocessors
        time = _load(pieces, multiprocessors, choice) * (chunks + _START) * choice.chunk_us
        plans.append((time, Plan(width, parts, pieces, pieces, 1, chunks)))
        whole = pieces // slots * slots
        for wanted in range(2, 1 + chunks // _LEAST_CHUNKS):
            a_split = ceil_div(chunks, wanted)
            splits = ceil_div(chunks, a_split)
            shared = (pieces - whole) * splits
            load = _load(whole, multiprocessors, choice) * (chunks + _START)
            load += _load(shared, multiprocessors, choice) * (a_split + _START)
            time = load * choice.chunk_us + _FINISH_US + shared * choice.warps * 16 * width * 8 / _FINISH_BYTES
            if shared:
                plans.append((time, Plan(width, parts, pieces, whole, splits, a_split)))
    return min(plans, key=lambda plan: plan[0])[1]

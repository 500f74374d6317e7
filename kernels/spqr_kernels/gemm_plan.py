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
    8: Choice(4, 4, 128, 4, 0.34), 16: Choice(4, 4, 128, 4, 0.38), 32: Choice(4, 2, 128, 4, 0.45),
    64: Choice(4, 4, 168, 2, 0.6), 128: Choice(8, 1, None, 1, 1.8), 256: Choice(8, 1, None, 1, 3.0),
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


def plan_for(batch: int, tile_rows: int, chunks: int, multiprocessors: int) -> Plan:
    """The plan of the least predicted time: all multiprocessors are to end together, and to be full."""
    widest = next((n for n in CHOICES if n >= batch), 256)
    plans = []
    for width in {widest, max(widest // 2, 128)} if widest > 128 else {widest}:
        choice = CHOICES[width]
        parts = ceil_div(batch, width)
        pieces = ceil_div(tile_rows, choice.warps) * parts
        for whole in {pieces, pieces // multiprocessors * multiprocessors, 0}:
            for wanted in range(1, 1 + max(1, chunks // _LEAST_CHUNKS)) if whole < pieces else (1,):
                a_split = ceil_div(chunks, wanted)
                splits = ceil_div(chunks, a_split)
                shared = (pieces - whole) * splits
                load = ceil_div(whole, multiprocessors) * (chunks + _START)
                load += ceil_div(shared, multiprocessors) * (a_split + _START)
                empty = max(1.0, choice.resident * multiprocessors / (whole + shared))
                time = load * choice.chunk_us * empty
                if splits > 1:
                    time += _FINISH_US + shared * choice.warps * 16 * width * 8 / _FINISH_BYTES
                elif whole < pieces:
                    continue  # the same as all whole
                plans.append((time, Plan(width, parts, pieces, whole, splits, a_split)))
    return min(plans, key=lambda plan: plan[0])[1]

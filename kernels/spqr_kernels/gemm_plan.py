"""How `gemm_kernel` is cut into programs: from shapes and the number of multiprocessors alone, so that results repeat."""

from __future__ import annotations

from dataclasses import dataclass

from spqr_format.layout import ceil_div

from .outliers import CELL_BYTES
from .slots import BARRIER_BYTES
from .stage_statistics import STATS_BYTES

WINDOW_BYTES = 512  # of a warp: the bounds of the outliers of 32 chunks


@dataclass(frozen=True)
class Choice:
    """How the kernel runs for a width, the rows of x that a program multiplies with: measured on an H200."""

    warps: int
    registers: int | None  # the limit of a thread's
    resident: int  # programs that a multiprocessor holds
    chunk_us: tuple[float, float]  # a multiprocessor's time for a chunk, without outliers and with 1 %
    share_us: float  # for shared pieces


CHOICES = {
    32: Choice(4, 168, 3, (0.6, 0.75), 3), 64: Choice(8, None, 1, (1.4, 1.6), 3), 128: Choice(8, None, 1, (1.7, 2.1), 4),
    256: Choice(8, None, 1, (2.85, 3.25), 8),
}  # fmt: skip
_LEAST_CHUNKS = 2  # of a program


@dataclass(frozen=True)
class Plan:
    """Which programs make which pieces of Y, as `gemm_kernel` has it."""

    choice: Choice
    width: int
    parts: int
    pieces: int
    programs: int
    base: int
    extra: int
    partial: int  # fp32 numbers that parts of shared pieces and their flags take
    us: float  # predicted


def room_bytes(bits: int, entries: int, width: int, warps: int) -> int:
    """Shared memory of a program: four slots of x; of each warp a cell of outliers, where there are any, bounds and two stages;
    barriers."""
    stage = 512 * bits + STATS_BYTES + 256 * entries
    used = 4 * 128 * width + BARRIER_BYTES + warps * (2 * stage + (CELL_BYTES + WINDOW_BYTES) * (entries > 0))
    return ceil_div(used, 1024) * 1024


def _plan(width: int, batch: int, tile_rows: int, chunks: int, multiprocessors: int, sparse: bool) -> Plan:
    """Whole pieces where that is as fast, else even shares of all their chunks."""
    choice = CHOICES[width]
    parts = ceil_div(batch, width)
    pieces = ceil_div(tile_rows, choice.warps) * parts
    most = choice.resident * multiprocessors
    every = pieces * chunks
    chunk_us = choice.chunk_us[sparse] * choice.resident
    programs = max(1, min(most, every // _LEAST_CHUNKS))
    us = every / programs * chunk_us + choice.share_us
    rounds = ceil_div(pieces, most)
    if pieces % rounds == 0 and rounds * chunks * chunk_us <= us:
        programs, us = pieces // rounds, rounds * chunks * chunk_us
    base, extra = divmod(every, programs)
    shared = base % chunks > 0 or extra > 0
    partial = programs * (16 * choice.warps * width + 2) if shared else 0
    return Plan(choice, width, parts, pieces, programs, base, extra, partial, us)


def plan_for(batch: int, tile_rows: int, chunks: int, multiprocessors: int, sparse: bool) -> Plan:
    """The plan of the least predicted time. sparse: whether the matrix has outliers."""
    widest = next((width for width in CHOICES if width >= batch), max(CHOICES))
    widths = [width for width in CHOICES if width <= widest][-2 if widest == max(CHOICES) else -1 :]
    plans = [_plan(width, batch, tile_rows, chunks, multiprocessors, sparse) for width in widths]
    return min(plans, key=lambda plan: plan.us)

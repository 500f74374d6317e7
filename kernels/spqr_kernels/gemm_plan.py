"""How `gemm_kernel` is cut into programs: from shapes and the number of multiprocessors alone, so that results repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spqr_format.layout import ceil_div

from .outliers import CELL_BYTES
from .shares import Share, share_out
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
    """Which programs make which pieces of Y, as `gemm_kernel` has it, for each of the matrices that share x."""

    choice: Choice
    width: int
    parts: int
    pieces: int
    programs: int
    shares: tuple[Share, ...]
    partial: int  # fp32 numbers that parts of shared pieces and their flags take
    us: float  # predicted


def room_bytes(bits: int, entries: int, width: int, warps: int) -> int:
    """Shared memory of a program: four slots of x; of each warp a cell of outliers, where there are any, bounds and two stages;
    barriers."""
    stage = 512 * bits + STATS_BYTES + 256 * entries
    used = 4 * 128 * width + BARRIER_BYTES + warps * (2 * stage + (CELL_BYTES + WINDOW_BYTES) * (entries > 0))
    return ceil_div(used, 1024) * 1024


def _plan(width: int, batch: int, tiles: Sequence[int], chunks: int, multiprocessors: int, sparse: bool) -> Plan:
    """Whole pieces where that is as fast, else even shares of all their chunks."""
    choice = CHOICES[width]
    parts = ceil_div(batch, width)
    of_each = [ceil_div(rows, choice.warps) * parts for rows in tiles]
    pieces = sum(of_each)
    most = choice.resident * multiprocessors
    every = pieces * chunks
    chunk_us = choice.chunk_us[sparse] * choice.resident
    programs = max(1, min(most, every // _LEAST_CHUNKS))
    us = every / programs * chunk_us + choice.share_us
    rounds = ceil_div(pieces, most)
    if all(count % rounds == 0 for count in of_each) and rounds * chunks * chunk_us <= us:
        shares, us = tuple(Share(count // rounds, rounds * chunks, 0) for count in of_each), rounds * chunks * chunk_us
    else:
        shares = share_out([count * chunks for count in of_each], programs)
    programs = sum(share.programs for share in shares)
    shared = any(share.base % chunks or share.extra for share in shares)
    partial = programs * (16 * choice.warps * width + 2) if shared else 0
    return Plan(choice, width, parts, pieces, programs, shares, partial, us)


def plan_for(batch: int, tiles: Sequence[int], chunks: int, multiprocessors: int, sparse: bool) -> Plan:
    """The plan of the least predicted time. tiles: of each matrix. sparse: whether they have outliers."""
    widest = next((width for width in CHOICES if width >= batch), max(CHOICES))
    widths = [width for width in CHOICES if width <= widest][-2 if widest == max(CHOICES) else -1 :]
    plans = [_plan(width, batch, tiles, chunks, multiprocessors, sparse) for width in widths]
    return min(plans, key=lambda plan: plan.us)

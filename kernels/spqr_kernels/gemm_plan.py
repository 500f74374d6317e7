"""How `gemm_kernel` is cut into programs: from shapes and the number of multiprocessors alone, so that results repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spqr_format.layout import ceil_div

from . import clusters
from .launch import has_clusters
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
    share_us: float  # for the parts of pieces that programs share, where three share one


CHOICES = {
    32: Choice(4, 168, 3, (0.6, 0.75), 3), 64: Choice(8, None, 1, (1.4, 1.6), 3), 128: Choice(8, None, 1, (1.7, 2.1), 5),
    256: Choice(8, None, 1, (2.85, 3.25), 10),
}  # fmt: skip
_LEAST_CHUNKS = 2  # of a program
_MORE_PARTS = 0.13  # of share_us, for each further program that shares a piece: one adds up what all have
_ADD_UP_US = 4  # in which the programs of a cluster add up what they have of 256 rows of x


@dataclass(frozen=True)
class Plan:
    """Which programs make which pieces of Y, as `gemm_kernel` has it, for each of the matrices that share x."""

    choice: Choice
    width: int
    cluster: int  # programs that have a piece together, as a cluster where more than one
    parts: int
    pieces: int
    shares: tuple[Share, ...]
    partial: int  # fp32 numbers that parts of shared pieces and their flags take
    us: float  # predicted

    @property
    def programs(self) -> int:
        """Of all matrices."""
        return sum(share.programs for share in self.shares)


def room_bytes(bits: int, entries: int, width: int, warps: int) -> int:
    """Shared memory of a program: four slots of x; of each warp a cell of outliers, where there are any, bounds and two stages;
    barriers."""
    stage = 512 * bits + STATS_BYTES + 256 * entries
    used = 4 * 128 * width + BARRIER_BYTES + warps * (2 * stage + (CELL_BYTES + WINDOW_BYTES) * (entries > 0))
    return ceil_div(used, 1024) * 1024


def _plans(width: int, batch: int, tiles: Sequence[int], chunks: int, multiprocessors: int, sparse: bool) -> list[Plan]:
    """Even shares of all chunks of all pieces, whole pieces, and pieces of clusters, where these are possible."""
    choice = CHOICES[width]
    parts = ceil_div(batch, width)
    of_each = [ceil_div(rows, choice.warps) * parts for rows in tiles]
    pieces = sum(of_each)
    most = choice.resident * multiprocessors
    chunk_us = choice.chunk_us[sparse] * choice.resident
    programs = max(1, min(most, pieces * chunks // _LEAST_CHUNKS))
    shares = share_out([count * chunks for count in of_each], programs)
    shared = any(share.base % chunks or share.extra for share in shares)
    partial = sum(share.programs for share in shares) * (16 * choice.warps * width + 2) if shared else 0
    us = pieces * chunks / programs * chunk_us
    us += choice.share_us * (1 + _MORE_PARTS * (max(1, programs / pieces) - 3))
    found = [Plan(choice, width, 1, parts, pieces, shares, partial, us)]
    rounds = ceil_div(pieces, most)
    if all(count % rounds == 0 for count in of_each):
        shares = tuple(Share(count // rounds, rounds * chunks, 0) for count in of_each)
        found.append(Plan(choice, width, 1, parts, pieces, shares, 0, rounds * chunks * chunk_us))
    for cluster in clusters.SIZES if choice.resident == 1 and has_clusters() else ():
        if pieces <= clusters.at_once(cluster, multiprocessors) and chunks >= _LEAST_CHUNKS * cluster and width >= 16 * cluster:
            shares = tuple(Share(count * cluster, 0, 0) for count in of_each)
            us = ceil_div(chunks, cluster) * chunk_us + _ADD_UP_US * width / 256
            found.append(Plan(choice, width, cluster, parts, pieces, shares, 0, us))
    return found


def plan_for(batch: int, tiles: Sequence[int], chunks: int, multiprocessors: int, sparse: bool) -> Plan:
    """The plan of the least predicted time. tiles: of each matrix. sparse: whether they have outliers."""
    widest = next((width for width in CHOICES if width >= batch), max(CHOICES))
    widths = [width for width in CHOICES if width <= widest][-2 if widest == max(CHOICES) else -1 :]
    plans = [plan for width in widths for plan in _plans(width, batch, tiles, chunks, multiprocessors, sparse)]
    return min(plans, key=lambda plan: plan.us)

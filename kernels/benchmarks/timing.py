"""Time of one operation on the GPU: L2 cold (inputs rotate), CUDA graph, median of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

SETTLE_SECONDS = 0.2
GRAPH_MS = 3.0  # of a graph, so that what the host needs to launch it, up to 0.02, does not count
Calls = Sequence[Callable[[], object]]


def _median(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `run`, by events around it."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _run(calls: Calls) -> None:
    for call in calls:
        call()


def captured(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of some GRAPH_MS in which the calls, each on data of its own, follow each other round after round, and how
    many calls it has."""
    torch.cuda.synchronize()  # the data may still be on its way on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _run(calls[:2])
        rounds = max(1, round(GRAPH_MS / _median(partial(_run, calls), 3)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _run(calls)
    return graph, rounds * len(calls)


def graph_microseconds(calls: Calls, repeats: int = 15) -> float:
    """Median microseconds of one call, as `captured`."""
    graph, count = captured(calls)
    _settle(graph.replay)
    return _median(graph.replay, repeats) * 1e3 / count


def _settle(run: Callable[[], object]) -> None:
    """Runs it for a fifth of a second, whatever it takes once: large products draw so much power that the clock sinks, by a
    quarter with cuBLAS, and each is timed at the clock that the GPU holds under it."""
    begin = time.monotonic()
    while time.monotonic() - begin < SETTLE_SECONDS:
        run()
        torch.cuda.synchronize()


def loop_microseconds(calls: Calls, repeats: int = 15) -> float:
    """Median microseconds of one call, launched one by one: what the host needs counts where the GPU waits for it."""
    _run(calls)
    torch.cuda.synchronize()
    return _median(partial(_run, calls), repeats) * 1e3 / len(calls)


def microseconds(calls: Calls) -> tuple[float, str]:
    """Median microseconds of one call, and which clock: `graph`, or `loop` for what a graph cannot capture."""
    try:
        return graph_microseconds(calls), "graph"
    except RuntimeError:
        torch.cuda.synchronize()  # an error that lasts is no matter of capture: it shows here
        return loop_microseconds(calls), "loop"


def read_bandwidth() -> float:
    """Bytes a second that a plain sum reads from device memory: the ceiling of this machine."""
    data = [torch.empty(512 * 2**20, dtype=torch.float32, device="cuda").normal_() for _ in range(2)]
    calls = [d.sum for d in data]
    return data[0].nbytes / graph_microseconds(calls) * 1e6

"""Time of one operation on the GPU: L2 cold (inputs rotate), CUDA graph, median of many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_microseconds(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Median microseconds of one call. The calls, each on data of its own, are captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second that a plain sum reads from device memory: the ceiling of this machine."""
    data = [torch.empty(512 * 2**20, dtype=torch.float32, device="cuda").normal_() for _ in range(2)]
    calls = [d.sum for d in data]
    return data[0].nbytes / graph_microseconds(calls) * 1e6

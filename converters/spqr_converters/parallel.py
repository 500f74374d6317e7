"""Several modules at a time, in threads: numpy and torch let go of the interpreter where the work is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from spqr_format.errors import SpqrError

T = TypeVar("T")
_MOST = 8  # workers that are started unasked: each holds a module in memory
_BESIDE_GPU = 3  # one module is read, one solved, one packed


def worker_count(asked: int | None) -> int:
    """How many workers there are: as many as asked for, else one for each core that this process may use, 8 at most.
    E505 for less than one."""
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _MOST)
    if asked < 1:
        raise SpqrError("E505", "workers", f"{asked}: expected at least 1")
    return asked


def beside_gpu(workers: int) -> int:
    """How many of so many workers a GPU keeps busy."""
    return min(workers, _BESIDE_GPU)


def in_order(tasks: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """The tasks' results, in their order. At most `workers` of them are at work or finished and not yet taken.

    When a task raises, or whoever takes the results stops, no further one is begun, and the error (or the interruption)
    goes on when those at work have ended. One worker is the calling thread itself.
    """
    if workers == 1:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(workers, "spqr-worker")
    try:
        running: deque[Future[T]] = deque()
        for task in tasks:
            if len(running) < workers:
                running.append(pool.submit(task))
                continue
            result = running.popleft().result()
            running.append(pool.submit(task))  # at work while the result is taken
            yield result
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Every operation of torch on one core: the order of its sums, and so the last bit of a result, then depends neither on
    the machine's cores nor on the number of workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""One command run by several processes, which torchrun or another launcher with its variables started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_LONGEST = timedelta(days=7)  # that a rank may wait for another one, which solves a large matrix or measures for all


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """Joins the other processes that the environment speaks of (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), each
    with a GPU of its own where `device` is not the CPU. Gives this one's rank; 0 where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield 0
        return
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()

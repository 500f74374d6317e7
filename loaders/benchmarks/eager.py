"""Time that the host takes for an eager call of a layer, beside a dense one.

    PYTHONPATH=.:kernels:loaders:kernels/benchmarks python loaders/benchmarks/eager.py

Calls are only queued: what is measured is the host, as long as it takes longer for a call than the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from random_weights import random_tensors
from torch import nn

from spqr_format.layout import Layout
from spqr_loaders.linear import SpqrLinear
from spqr_loaders.siblings import share

SIDE = 4096  # rows and columns
CALLS = 200  # in a row, between two waits for the GPU


def packed(seed: int) -> SpqrLinear:
    """A layer of random content with 0.45 % outliers, on the GPU."""
    tensors, layout = random_tensors(Layout(SIDE, SIDE), 0.0045, seed)
    layer = SpqrLinear(layout, device="meta")
    for leaf, tensor in tensors.items():
        setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
    layer.join()
    return layer


class Three(nn.Module):
    """Three layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = packed(1), packed(2), packed(3)

    def forward(self, x: torch.Tensor) -> object:
        """All of x."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def host_microseconds(call: Callable[[], object]) -> float:
    """Of a call, the least of five rows of them."""
    for _ in range(20):
        call()
    rows = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rows.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(rows)


def main() -> None:
    """Print the table."""
    dense = nn.Linear(SIDE, SIDE, bias=False, device="cuda", dtype=torch.half)
    layer, three, together = packed(0), Three(), Three()
    share(together)
    print(
        "| rows of x | dense, us | SpqrLinear, us | three of one x, us | three, as siblings, us |\n|---:|---:|---:|---:|---:|"
    )
    with torch.no_grad():
        for rows in (1, 16):
            x = torch.randn(rows, SIDE, device="cuda").half()
            times = [host_microseconds(lambda m=m, x=x: m(x)) for m in (dense, layer, three, together)]  # type: ignore[misc]
            print(f"| {rows} | " + " | ".join(f"{microseconds:.0f}" for microseconds in times) + " |", flush=True)


if __name__ == "__main__":
    main()

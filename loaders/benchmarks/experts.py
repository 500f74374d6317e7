"""Time of a layer of experts: launches for all pairs of a token and an expert, for blocks of an expert's tokens, and a loop.

    PYTHONPATH=.:kernels:loaders:kernels/benchmarks python loaders/benchmarks/experts.py [--outliers 0.0045]

Random weights and a random router, 3 bits, on the GPU. "pairs" and "blocks" are in a CUDA graph, L2 cold; "eager" and "loop"
are the clock of the host around what the layer chooses and a loop over its experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from random_weights import random_tensors
from timing import graph_microseconds
from torch import Tensor, nn

from spqr_format.layout import Layout
from spqr_loaders import experts as pools
from spqr_loaders.experts import SplitExperts
from spqr_loaders.linear import SpqrLinear

LAYERS = {
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
}  # experts, hidden, intermediate, of a token
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
PAIRED = 128  # tokens up to which pairs are timed


class Fused(nn.Module):
    """What SplitExperts asks of transformers' module."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden, dtype=torch.half))
            self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate, dtype=torch.half))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return nn.functional.silu(gate) * up


def build(experts: int, hidden: int, intermediate: int, share: float) -> SplitExperts:
    """A layer of random matrices, in one pool."""
    layer = SplitExperts(Fused(experts, hidden, intermediate), ("gate_proj", "up_proj", "down_proj"))
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    for index in range(experts):
        for place, (name, (out, inn)) in enumerate(zip(layer.projections, shapes, strict=True)):
            tensors, layout = random_tensors(Layout(out, inn), share, 3 * index + place)
            packed = SpqrLinear(layout, device="meta")
            for leaf, tensor in tensors.items():
                setattr(packed, leaf, nn.Parameter(tensor, requires_grad=False))
            layer.get_submodule(str(index)).add_module(name, packed)
    layer.join()
    return layer


def clock(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of a call, by the clock."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outliers", type=float, default=0.0045, help="share of the weights")
    share = parser.parse_args().outliers
    print("| layer | tokens | pairs, us | blocks, us | eager, us | loop, us | relative difference |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    width_for, turn = pools.width_for, pools.WEIGHTS_OF_A_TURN
    for name, (experts, hidden, intermediate, chosen) in LAYERS.items():
        layer = build(experts, hidden, intermediate, share)
        for tokens in TOKENS:

            def choice(tokens: int = tokens, experts: int = experts, chosen: int = chosen) -> Tensor:
                return torch.stack([torch.randperm(experts, device="cuda")[:chosen] for _ in range(tokens)])

            inputs = [(torch.randn(tokens, hidden, device="cuda").half(), choice()) for _ in range(6)]
            weights = torch.rand(tokens, chosen, device="cuda")
            x, index = inputs[0]
            with torch.no_grad():
                layer.pooled = True
                calls = [lambda x=x, i=i, layer=layer, w=weights: layer(x, i, w) for x, i in inputs]  # type: ignore[misc]
                pairs = blocks = "-"
                if tokens <= PAIRED:
                    pools.width_for, pools.WEIGHTS_OF_A_TURN = lambda *_: None, float("inf")
                    pairs = f"{graph_microseconds(calls):.0f}"
                    pools.width_for, pools.WEIGHTS_OF_A_TURN = width_for, turn
                if width_for(tokens * chosen, experts) is not None:
                    blocks = f"{graph_microseconds(calls):.0f}"
                together = layer(x, index, weights)
                eager = clock(lambda layer=layer, x=x, i=index, w=weights: layer(x, i, w), 10)  # type: ignore[misc]
                layer.pooled = False
                single = layer(x, index, weights)
                loop = clock(lambda layer=layer, x=x, i=index, w=weights: layer(x, i, w), 4)  # type: ignore[misc]
                layer.pooled = True
            off = ((together.float() - single.float()).norm() / single.float().norm()).item()
            print(f"| {name} | {tokens} | {pairs} | {blocks} | {eager:.0f} | {loop:.0f} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()

"""Clock and power of the GPU while a product repeats: whether its limit of power holds it back.

    PYTHONPATH=.:kernels python kernels/benchmarks/power.py [--shape 28672x8192] [--share 0.01] [--batches 1 8 16 64]

Ours and fp16 cuBLAS each repeat for a second in a CUDA graph, on weights that rotate, while nvidia-smi looks. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from linear import products_of, shapes_of
from peers import PEERS, Case
from timing import Calls, captured

SECONDS = 1.3
EVERY_MS = 60
_FIRST = 3  # samples from before the product runs as it does
_ASKED = "clocks.sm,power.draw.instant,clocks_event_reasons.active"
REASONS = {"power": 0x04, "hardware": 0x08, "heat": 0x60, "power brake": 0x80}  # NVML's bits


@dataclass(frozen=True)
class Sample:
    """What nvidia-smi saw at a time: the clock, the draw, and what holds the clock back, as NVML's bits."""

    mhz: int
    watts: float
    reasons: int


def samples(text: str) -> list[Sample]:
    """Of nvidia-smi's lines, MHz, W and the bits: behind those of the start, and without a last one that was cut short."""
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines()[_FIRST:]:
        mhz, watts, reasons = line.split(",")
        found.append(Sample(int(mhz), float(watts), int(reasons.strip(), 16)))
    return found


def row(name: str, seen: Sequence[Sample]) -> str:
    """A line of the table: clock and draw, median and range, and what held the clock back in how many of the samples."""
    clocks, watts = [s.mhz for s in seen], [s.watts for s in seen]
    held = {reason: sum(s.reasons & bits > 0 for s in seen) for reason, bits in REASONS.items()}
    what = ", ".join(f"{reason} {100 * count // len(seen)} %" for reason, count in held.items() if count) or "nothing"
    return (
        f"| {name} | {statistics.median(clocks):.0f} ({min(clocks)} to {max(clocks)}) |"
        f" {statistics.median(watts):.0f} ({min(watts):.0f} to {max(watts):.0f}) | {what} |"
    )


def watched(calls: Calls) -> list[Sample]:
    """What nvidia-smi sees while these calls repeat."""
    graph, _ = captured(calls)
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    place = f"{gpu.pci_domain_id:08X}:{gpu.pci_bus_id:02X}:{gpu.pci_device_id:02X}.0"
    command = ["nvidia-smi", f"--id={place}", f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits", "-lms", str(EVERY_MS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
        watch.terminate()
        told = watch.communicate()[0]
    seen = samples(told)
    if not seen:
        raise SystemExit(f"{' '.join(command)} told nothing: {told.strip() or 'no output'}")
    return seen


def main(words: list[str] | None = None, watch: Callable[[Calls], list[Sample]] = watched, device: str = "cuda") -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="28672x8192", help="out x in")
    parser.add_argument("--share", type=float, default=0.01, help="of outliers")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 64])
    asked = parser.parse_args(words)
    shape, *_ = shapes_of([asked.shape])
    kinds = {name: PEERS[name].make(Case(shape, asked.share), device) for name in ("ours", "fp16")}
    products = {name: products_of(matrix, device) for name, matrix in kinds.items()}
    print("| product | MHz | W | held back by |\n|---|---:|---:|---|")
    for batch in asked.batches:
        for name, copies in products.items():
            x = torch.randn(batch, shape[1], device=device).to(kinds[name].dtype)
            print(row(f"{name}, batch {batch}", watch([partial(copy, x) for copy in copies])), flush=True)


if __name__ == "__main__":
    main()

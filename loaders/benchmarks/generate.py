"""Tokens a second and peak GPU memory of greedy decoding through `generate`: a SpQR model beside the same model in fp16.

    PYTHONPATH=.:kernels:loaders:kernels/benchmarks python loaders/benchmarks/generate.py [--layers 32] [--outliers 0.0045]
        [--apart] [--only recorded ...] [--profile]

The model has the shape of LLaMA-2-7B and random weights; both run in this process, one after the other, with a static cache
under CUDA graphs. "recorded" is with `graph_decoding`, "transformers" with its own loop, which compiles a step and records it
too, and then waits for the host at every token; "not compiled" is `graph_decoding` without Inductor, and "eager" neither
compiled nor recorded. Speed and memory do not depend on what the weights are; quality is not looked at.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from random_weights import random_tensors
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from spqr_format.layout import Layout
from spqr_loaders import graph_decoding
from spqr_loaders.compiling import prefer_overlap
from spqr_loaders.linear import SpqrLinear
from spqr_loaders.siblings import share


def build(layers: int, dtype: torch.dtype) -> Any:
    """A LLaMA-2-7B of `layers` blocks with random weights, on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # The end is never chosen, as others are above 0: a least number of tokens would cost `generate` kernels of its own.
    nn.init.zeros_(model.lm_head.weight[config.eos_token_id])
    return model


def pack(model: Any, outliers: float) -> None:
    """Every linear layer of the blocks becomes a SpqrLinear of random content."""
    seed = 0
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                seed += 1
                tensors, layout = random_tensors(Layout(module.out_features, module.in_features), outliers, seed)
                packed = SpqrLinear(layout, device="meta")
                for leaf, tensor in tensors.items():
                    setattr(packed, leaf, nn.Parameter(tensor, requires_grad=False))
                packed.join()
                parent, _, leaf_name = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf_name, packed)
    share(model)


# How a row of the table generates. Inductor's kernels begin early in both models where it is "recorded", and in SpQR's where
# it is transformers' own loop.
WAYS: dict[str, dict[str, Any]] = {
    "recorded": {"custom_generate": graph_decoding},
    "not compiled": {"custom_generate": graph_decoding, "disable_compile": True},
    "transformers": {},
    "eager": {"disable_compile": True},
}


class Arrivals(BaseStreamer):
    """When `generate` began, and when each token was there for the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Of no interest."""


def generation(model: Any, tokens: int, way: str) -> Callable[[], list[float]]:
    """What generates `tokens` tokens, each time anew, and returns the times of `Arrivals`."""
    ids = torch.randint(0, 32000, (1, 16), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    # One cache for all: a new one for each call may lie elsewhere, and then torch records its graph anew, or gives up graphs.
    # Eager steps have a cache that grows, as `generate` has by itself.
    cache = None if way == "eager" else StaticCache(model.config, max_cache_len=ids.shape[1] + tokens)
    kwargs = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache} | WAYS[way]

    def run() -> list[float]:
        if cache is not None:
            cache.reset()
        torch.cuda.synchronize()
        arrivals = Arrivals()
        custom = kwargs.get("custom_generate")  # to which transformers hands no streamer
        bound = {"custom_generate": functools.partial(custom, streamer=arrivals)} if custom else {}
        with torch.no_grad():
            made = model.generate(ids, streamer=arrivals, **kwargs | bound)
        if made.shape[1] != ids.shape[1] + tokens:
            raise SystemExit(f"{made.shape[1] - ids.shape[1]} tokens instead of {tokens}")
        return arrivals.times

    return run


def measure(run: Callable[[], list[float]], repeats: int) -> dict[str, float]:
    """`rates` of `repeats` generations after a warm-up, medians, and the peak memory in bytes."""
    for _ in range(2):
        run()
    torch.cuda.reset_peak_memory_stats()
    each = [rates(run()) for _ in range(repeats)]
    medians = {key: statistics.median(its[key] for its in each) for key in each[0]}
    return medians | {"peak_bytes": float(torch.cuda.max_memory_allocated())}


def rates(times: list[float], begun: int = 4) -> dict[str, float]:
    """Tokens a second from the `begun`-th on, when all is recorded, seconds until that one, and tokens a second of it all.

    times: in seconds, when the prompt, and then each token, was there.
    """
    return {
        "tokens_per_s": (len(times) - 1 - begun) / (times[-1] - times[begun]),
        "begin_s": times[begun] - times[0],
        "all_tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
    }


def spans(run: Callable[[], list[float]]) -> list[tuple[float, float, str]]:
    """Begin and end, in us, and name of all that the GPU does in a generation. The profiler makes it a little slower."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    found = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.time_range.start, event.time_range.end, event.name) for event in found]


def by_token(found: Iterable[tuple[float, float, str]], tokens: int, most: int = 16) -> list[tuple[str, float, float]]:
    """What a token costs of these spans: name, how many and us of the `most` that take longest, of all, and of pauses, in which
    the GPU does nothing, of more and of less than 5 us: within a CUDA graph they are below 3 us."""
    each: dict[str, list[float]] = defaultdict(list)
    pauses: list[float] = []
    until = None
    for begin, end, name in sorted(found):
        each[name].append(end - begin)
        if until is not None and begin > until:
            pauses.append(begin - until)
        until = end if until is None else max(until, end)
    rows = sorted(each.items(), key=lambda row: -sum(row[1]))
    rows = [
        *rows[:most],
        ("all kernels and copies", [time for times in each.values() for time in times]),
        ("pauses above 5 us, for the host", [pause for pause in pauses if pause > 5]),
        ("pauses between kernels", [pause for pause in pauses if pause <= 5]),
    ]
    return [(name, len(times) / tokens, sum(times) / tokens) for name, times in rows]


def main() -> None:
    """Measure both, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--outliers", type=float, default=0.0045, help="share of the weights")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--apart", action="store_true", help="transformers' loop compiles SpQR as fp16: no kernels begin early")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="rows of the table")
    parser.add_argument("--profile", action="store_true", help="print what the GPU does in a token")
    arguments = parser.parse_args()
    model = build(arguments.layers, torch.float16)
    found: dict[str, dict[str, float]] = {}
    profiles = {}

    def keep(name: str, run: Callable[[], list[float]]) -> None:
        found[name] = measure(run, arguments.repeats)
        print(f"{name}: {found[name]['tokens_per_s']:.1f} tokens/s", flush=True)  # stays, whatever ends the run

    def take(model_name: str) -> None:
        for way in arguments.only:
            name = f"{model_name}, {way}"
            run = generation(model, arguments.tokens, way)
            keep(name, run)
            if arguments.profile and way != "eager":
                profiles[name] = by_token(spans(run), arguments.tokens)
            torch._dynamo.reset()
            model.__dict__.pop("_compiled_call", None)

    take("fp16")
    pack(model, arguments.outliers)
    if not arguments.apart:
        prefer_overlap(model)
    torch.cuda.empty_cache()
    take("spqr")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.layers} layers, {arguments.tokens} tokens")
    print(f"SpQR with {100 * arguments.outliers:.2f} % outliers")
    print("| | tokens/s | ratio | first 4, ms | with them, tokens/s | ratio | peak GB | ratio |\n|---|" + 7 * "---:|")
    for name, its in found.items():
        dense = found[name.replace("spqr", "fp16")]
        speed, of_all, memory = (its[key] / dense[key] for key in ("tokens_per_s", "all_tokens_per_s", "peak_bytes"))
        cells = [f"{its['tokens_per_s']:.1f}", f"{speed:.2f}", f"{1000 * its['begin_s']:.1f}"]
        cells += [f"{its['all_tokens_per_s']:.1f}", f"{of_all:.2f}", f"{its['peak_bytes'] / 1e9:.2f}", f"{memory:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    for title, rows in profiles.items():
        print(f"\n| {title}, of a token | number | us |\n|---|---:|---:|")
        for name, number, us in rows:
            print(f"| {name[:80]} | {number:.1f} | {us:.1f} |")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"arguments": settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

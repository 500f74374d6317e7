"""Tokens a second and peak GPU memory of greedy decoding through `generate`: a SpQR model beside the same model in fp16.

    PYTHONPATH=.:kernels:loaders:kernels/benchmarks python loaders/benchmarks/generate.py [--layers 32] [--outliers 0.0045]

The model has the shape of LLaMA-2-7B and random weights; both run in this process, one after the other, with a static cache
under CUDA graphs as transformers compiles them. Speed and memory do not depend on what the weights are; quality is not
looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from random_weights import random_tensors
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from spqr_format.layout import Layout
from spqr_loaders.linear import SpqrLinear
from spqr_loaders.siblings import share


def build(layers: int, dtype: torch.dtype) -> Any:
    """A LLaMA-2-7B of `layers` blocks with random weights, on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


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


def measure(model: Any, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second, median of `repeats` generations of `tokens` tokens after a warm-up, and the peak memory in bytes."""
    ids = torch.randint(0, 32000, (1, 16), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    # One cache for all: a new one for each call may lie elsewhere, and then torch records its graph anew, or gives up graphs.
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + tokens)
    kwargs = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}

    def run() -> None:
        cache.reset()
        model.generate(ids, **kwargs)

    with torch.no_grad():
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {"tokens_per_s": tokens / statistics.median(times), "peak_bytes": float(torch.cuda.max_memory_allocated())}


def main() -> None:
    """Measure both, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--outliers", type=float, default=0.0045, help="share of the weights")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = build(arguments.layers, torch.float16)
    dense = measure(model, arguments.tokens, arguments.repeats)
    print(f"fp16: {dense}", flush=True)
    pack(model, arguments.outliers)
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)
    torch.cuda.empty_cache()
    packed = measure(model, arguments.tokens, arguments.repeats)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.layers} layers, {arguments.tokens} tokens")
    print("| | tokens/s | ratio | peak GB | ratio |\n|---|---:|---:|---:|---:|")
    print(f"| fp16 | {dense['tokens_per_s']:.1f} | | {dense['peak_bytes'] / 1e9:.2f} | |")
    print(
        f"| SpQR, {100 * arguments.outliers:.2f} % outliers | {packed['tokens_per_s']:.1f} "
        f"| {packed['tokens_per_s'] / dense['tokens_per_s']:.2f} | {packed['peak_bytes'] / 1e9:.2f} "
        f"| {packed['peak_bytes'] / dense['peak_bytes']:.3f} |"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(arguments).items()}, "fp16": dense,
                                              "spqr": packed}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

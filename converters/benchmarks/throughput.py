"""How fast quantized checkpoints are carried over: MB of source a second, for layers of a 7B model with random codes.

    python converters/benchmarks/throughput.py [--layers 4] [--workers 1,2] [--kinds gptq,awq] [--folder DIR] [--profile]

A source of so many decoder layers of Llama-2-7B's shape (4 bits, groups of 128, two files) is made in a temporary folder, and
converted with --lossless as `spqr convert` does it: hashed, read, carried over, compared with the source's weights, packed,
hashed, written, synced. A row is the best of three conversions; the file cache is warm. Start-up (imports) is not counted.
The last column divides by the seconds of processor time instead, of all threads: what a core does when nothing else runs on it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from spqr_converters import convert
from spqr_converters.sources import open_source

HIDDEN, MLP, GROUP, BITS = 4096, 11008, 128, 4
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip


def words(*shape: int) -> torch.Tensor:
    """Random bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def scales(*shape: int) -> torch.Tensor:
    """Scales as of weights near N(0, 0.02)."""
    return torch.empty(shape).uniform_(0.002, 0.01).half()


def gptq(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """One layer as AutoGPTQ stores it."""
    groups = columns // GROUP
    return {
        "qweight": words(columns * BITS // 32, rows),
        "qzeros": torch.full((groups, rows * BITS // 32), 0x77777777, dtype=torch.int32),
        "scales": scales(groups, rows),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def gptq_act(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The same with desc_act: the columns of a group lie anywhere."""
    tensors = gptq(rows, columns)
    return {**tensors, "g_idx": tensors["g_idx"][torch.randperm(columns)]}


def awq(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """One layer as AutoAWQ's gemm stores it."""
    groups = columns // GROUP
    return {
        "qweight": words(columns, rows * BITS // 32),
        "qzeros": words(groups, rows * BITS // 32),
        "scales": scales(groups, rows),
    }


KINDS: dict[str, tuple[Callable[[int, int], dict[str, torch.Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}),
    "gptq desc_act": (gptq_act, {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": True, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "version": "gemm", "zero_point": True}),
}


def make(folder: Path, kind: str, layers: int) -> int:
    """Writes the source; returns its bytes."""
    torch.manual_seed(0)
    layer, options = KINDS[kind]
    tensors = {"model.embed_tokens.weight": torch.zeros(32, HIDDEN).half(), "model.norm.weight": torch.ones(HIDDEN).half()}
    for number in range(layers):
        prefix = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).half()
        for module, shape in SHAPES.items():
            tensors |= {f"{prefix}.{module}.{leaf}": tensor for leaf, tensor in layer(*shape).items()}
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number * len(names) // 2 : (number + 1) * len(names) // 2]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": layers, "quantization_config": options}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(root: Path, kind: str, layers: int, workers: list[int]) -> Iterator[tuple[int, float, float, int]]:
    """Workers, seconds, seconds of processor time and bytes of source of each run."""
    source = root / kind.replace(" ", "-")
    size = make(source, kind, layers)
    for count in workers:
        target, runs = root / "out", []
        for _ in range(3):
            begin, worked = time.perf_counter(), time.process_time()
            convert(open_source(source), target, lossless=True, workers=count, device="cpu")
            runs.append((time.perf_counter() - begin, time.process_time() - worked))
            shutil.rmtree(target)
        yield count, min(run[0] for run in runs), min(run[1] for run in runs), size
    shutil.rmtree(source)


def processor() -> str:
    """The machine's name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--workers", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where the temporary files go; 0.42 GB a layer")
    parser.add_argument("--profile", action="store_true", help="where the time of one worker goes")
    arguments = parser.parse_args()
    print(f"{processor()}, torch {torch.__version__}, {arguments.layers} layers of Llama-2-7B's shape\n")
    print("| source | workers | s | MB/s | MB/s a core's second |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in measure(Path(folder), "gptq", 1, [1]):  # imports what is imported on first use
            pass
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        for kind in arguments.kinds:
            for workers, seconds, worked, size in measure(Path(folder), kind, arguments.layers, arguments.workers):
                rates = f"{size / seconds / 1e6:.0f} | {size / worked / 1e6:.0f}"
                print(f"| {kind} | {workers} | {seconds:.1f} | {rates} |", flush=True)
        if arguments.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

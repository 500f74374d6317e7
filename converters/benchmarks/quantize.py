"""How fast a dense model is quantized: seconds a layer of Llama-2-7B's shape, without data or calibrated, and on what they go.

    python converters/benchmarks/quantize.py [--layers 2] [--calibrated] [--tokens 65536] [--device cuda] [--profile]

Layers of random fp16 weights, with the tokenizer of tests/models/tiny-llama, are made in a temporary folder and converted as
`spqr convert` does it, from hashing the source to the last sync. Before that a toy model is converted, so that imports and the
compilation of kernels are not counted. The parts are seconds of all threads together: they overlap, and may add up to more
than the clock says. The estimate for 32 layers is the clock's time, 32 / layers times.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spqr_converters import Calibration, calibrated, convert, datafree
from spqr_converters.sources import DenseSource
from spqr_format.writer import CheckpointWriter

TESTS = Path(__file__).parents[2] / "tests"
TOY = {"hidden": 32, "mlp": 48, "heads": 2}
PARTS: list[tuple[str, Any, str]] = [
    ("read", DenseSource, "load"),
    ("solve", datafree, "solve"),
    ("factor", calibrated, "prepare"),
    ("solve", calibrated, "solve_and_decode"),
    ("pack", CheckpointWriter, "pack"),
    ("hash and write", CheckpointWriter, "add"),
]


def make(folder: Path, layers: int, hidden: int, mlp: int, heads: int, device: str) -> None:
    """Writes a Llama of random weights, a shard a layer."""
    folder.mkdir()
    config = json.loads((TESTS / "models" / "tiny-llama" / "config.json").read_text())
    config |= {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "max_position_embeddings": 4096, "dtype": "float16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for path in (TESTS / "models" / "tiny-llama").glob("tokenizer*"):
        shutil.copy(path, folder)
    generator = torch.Generator(device).manual_seed(0)

    def weights(rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator, device=device)).half().cpu()

    outside = {name: weights(config["vocab_size"], hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    outside["model.norm.weight"] = torch.ones(hidden).half()
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    weight_map: dict[str, str] = {}
    for number in range(layers + 1):
        tensors = outside
        if number:
            prefix = f"model.layers.{number - 1}."
            tensors = {f"{prefix}{name}.weight": weights(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden).half()
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextmanager
def timed(parts: list[tuple[str, Any, str]]) -> Iterator[Counter[str]]:
    """Seconds spent in some functions, by the names given to them, while the block runs."""
    seconds: Counter[str] = Counter()

    def wrap(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[title] += time.perf_counter() - begin

        return wrapped

    before = [(owner, name, getattr(owner, name)) for _, owner, name in parts]
    for title, owner, name in parts:
        setattr(owner, name, wrap(title, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def measure(root: Path, layers: int, shape: dict[str, int], device: str, tokens: int | None) -> tuple[float, Counter[str]]:
    """Seconds by the clock, and by part, of one conversion. tokens: of calibration, or None."""
    source, target = root / "source", root / "out"
    make(source, layers, **shape, device=device)
    calibration = None if tokens is None else Calibration(TESTS / "data" / "calibration.txt", tokens, min(2048, tokens))
    with timed(PARTS) as seconds, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the calibration text has")  # the text is short: windows overlap
        begin = time.perf_counter()
        convert(source, target, device=device, outlier_share=0.0045, calibration=calibration)
        clock = time.perf_counter() - begin
    shutil.rmtree(source)
    shutil.rmtree(target)
    return clock, seconds


def main(arguments: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration, in windows of 2048")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the temporary files go; 0.5 GB a layer")
    parser.add_argument("--profile", action="store_true", help="where the time of the main thread goes")
    chosen = parser.parse_args(arguments)
    shape = {"hidden": chosen.hidden, "mlp": chosen.mlp, "heads": chosen.heads}
    tokens = chosen.tokens if chosen.calibrated else None
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else chosen.device
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        start, _ = measure(Path(folder), 1, TOY, chosen.device, None if tokens is None else 256)
        profile = cProfile.Profile()
        if chosen.profile:
            profile.enable()
        clock, parts = measure(Path(folder), chosen.layers, shape, chosen.device, tokens)
        profile.disable()
    how = "without data" if tokens is None else f"calibrated with {tokens} tokens"
    print(f"{name}, torch {torch.__version__}, {chosen.layers} layers, {shape}, 0.45 % outliers, {how}")
    print(f"toy model, with imports and compilation: {start:.1f} s\n")
    print("| part | s a layer |\n|---|---:|")
    for part in dict.fromkeys(part for part, _, _ in PARTS):
        if parts[part]:
            print(f"| {part} | {parts[part] / chosen.layers:.2f} |")
    if tokens is not None:
        print(f"| the rest (forward passes, Hessians) | {(clock - parts.total()) / chosen.layers:.2f} |")
    print(f"| by the clock | {clock / chosen.layers:.2f} |\n\nestimate for 32 layers: {32 * clock / chosen.layers:.0f} s")
    if chosen.device.startswith("cuda"):
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if chosen.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

"""Small sources that the converters' tests share."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_converters.memory import release

torch.set_num_threads(2)

MOE_SIZES: dict[str, Any] = {  # of a tiny mixture of experts, for the configurations of transformers
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def random_llama(tmp_path: Path) -> Callable[..., Path]:
    """Make a Llama folder of random weights in one or more shards: random_llama(layers=2, hidden=48, shards=1, tied=True)."""

    def make(layers: int = 2, hidden: int = 48, mlp: int = 80, shards: int = 1, tied: bool = True, **config) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path / f"llama-{layers}-{hidden}-{shards}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shape = LlamaConfig(
            vocab_size=300, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=3,
            num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=tied, **config,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).half()
        tensors = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        write(folder, tensors, shards)
        (folder / "config.json").write_text(json.dumps({**shape.to_dict(), "architectures": ["LlamaForCausalLM"]}))
        return folder

    return make


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Save tensors as one file, or as several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextmanager
def within(seconds: float = 5.0, rise: float = 150e6) -> Iterator[None]:
    """What stands in the block takes at most so much of the processor's time and so many more bytes of memory at its peak, as
    the system counts. The slowest file that is refused takes 0.4 to 1 s on a machine with other work; without its reader's
    limit, 18 s."""
    release()  # or what was freed before would be used again without being seen
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
        before = _kilobytes(status.read_text(), "VmRSS")
    started = time.process_time()
    yield
    taken = time.process_time() - started
    if status.exists():
        grown = 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)
        assert grown < rise, f"{grown / 1e6:.0f} MB"
    assert taken < seconds, f"{taken:.2f} s"


def _kilobytes(status: str, key: str) -> int:
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


@pytest.fixture
def bounded() -> Callable[..., AbstractContextManager[None]]:
    """Hostile files: `with bounded(): ...`, see `within`."""
    return within


@pytest.fixture
def calibration_text() -> Path:
    return Path(__file__).parents[1] / "data" / "calibration.txt"


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [ceil(n * bits / 32), m] from values [n, m], lowest bits first."""
    numbers = [sum(int(v) << (bits * i) for i, v in enumerate(column)) for column in values.T]
    words = -(-len(values) * bits // 32)
    stored = [[number >> (32 * w) & 0xFFFFFFFF for number in numbers] for w in range(words)]
    return torch.from_numpy(np.array(stored, np.uint32).view(np.int32))


def gptq_linear(name: str, rows: int, columns: int, bits: int, group: int, act: bool, seed: int) -> dict[str, torch.Tensor]:
    """A layer of random codes, with v1 zeros."""
    rng = np.random.default_rng(seed)
    size = columns if group == -1 else group
    g_idx = np.arange(columns) // size
    if act:
        g_idx = g_idx[rng.permutation(columns)]
    groups = -(-columns // size)
    return {
        f"{name}.qweight": packed(rng.integers(0, 2**bits, (columns, rows)), bits),
        f"{name}.qzeros": packed(rng.integers(0, 2**bits - 1, (rows, groups)), bits).t().contiguous(),
        f"{name}.scales": torch.from_numpy(rng.uniform(0.001, 0.02, (groups, rows))).half(),
        f"{name}.g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }


def as_gptq(
    folder: Path, bits: int = 4, group: int = 16, act: bool = False, lm_head: bool = False, bias: float | None = None,
    eight: str | None = None, dense: str | None = None,
) -> Path:  # fmt: skip
    """Makes the linear layers of a Llama folder GPTQ's. eight, dense: parts of names of 8-bit and dense ones."""
    tensors = load_file(folder / "model.safetensors")
    dynamic: dict[str, Any] = {}
    for seed, name in enumerate(sorted(tensors)):
        module = name.removesuffix(".weight")
        quantized = module.endswith("_proj") or (lm_head and module == "lm_head")
        if not quantized or (dense and dense in module):
            continue
        rows, columns = tensors.pop(name).shape
        width = 8 if eight and eight in module else bits
        if width != bits:
            dynamic[f"+:{module}"] = {"bits": width}
        tensors |= gptq_linear(module, rows, columns, width, group, act, seed)
        if bias is not None and module != "lm_head":
            tensors[f"{module}.bias"] = torch.full((rows,), bias).half()
    save_file(tensors, folder / "model.safetensors")
    options = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act, "sym": False, "dynamic": dynamic}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    (folder / "quantize_config.json").write_text(json.dumps(options))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def gptq_llama(random_llama) -> Callable[..., Path]:
    """Make a Llama folder whose linear layers are GPTQ's: the arguments of `as_gptq`, others are of `random_llama`."""

    def make(**options: Any) -> Path:
        own = {key: options.pop(key) for key in inspect.signature(as_gptq).parameters if key in options}
        return as_gptq(random_llama(**{"hidden": 48, "mlp": 96, "tied": False, **options}), **own)

    return make

"""Small sources that the converters' tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(2)


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


@pytest.fixture
def calibration_text() -> Path:
    return Path(__file__).parents[1] / "data" / "calibration.txt"

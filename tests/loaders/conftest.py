"""Quantized checkpoints for the loader's tests, from the format's own writer, and their numbers by plain numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spqr_format.layout import Layout
from spqr_format.matrix import SpqrMatrix
from spqr_format.writer import CheckpointWriter
from spqr_loaders import SpqrLinear

TINY = Path(__file__).parents[1] / "models" / "tiny-llama"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


IDS = torch.tensor([[5, 6, 7, 8, 900, 33, 1200]])
MODULE = "model.layers.1.self_attn.q_proj"  # bilevel, with outliers, inside the second shard or later


@dataclass(frozen=True)
class How:
    """How a test quantizes one matrix."""

    bits: int = 3
    group: int = 16
    statistics: str = "bilevel"
    share: float = 0.0
    permuted: bool = False


# Everything differs from module to module, which is what the shards' headers have to tell.
HOW = {
    "q_proj": How(share=0.003),
    "k_proj": How(4, 32, "direct"),
    "v_proj": How(2, share=0.01),
    "o_proj": How(4, 64, "direct", permuted=True),
    "down_proj": How(4, 128, "direct", share=0.02),
}


def rtn(weight: torch.Tensor, how: How) -> SpqrMatrix:
    """Round to nearest within [min, max] of each group, and the largest errors as outliers. Quick, and not good."""
    w = weight.float().numpy()
    out, inn = w.shape
    top = 2**how.bits - 1
    layout = Layout(out, inn, how.bits, how.group, how.statistics)  # type: ignore[arg-type]
    perm = np.argsort(-np.abs(w).sum(0), kind="stable").astype(np.int32) if how.permuted else None
    stored = w if perm is None else w[:, perm]
    edges = np.arange(0, inn, how.group)
    low, high = (np.minimum.reduceat(stored, edges, 1).clip(max=0), np.maximum.reduceat(stored, edges, 1).clip(min=0))
    scale = np.maximum((high - low) / top, 1e-4).astype(np.float32)
    fields: dict[str, Any] = {}
    if how.statistics == "direct":
        half = scale.astype(np.float16)
        zero = np.clip(np.round(-low / half), 0, top)
        fields = {"group_scales": half, "group_zeros": zero.astype(np.uint8)}
        scale = half.astype(np.float32)
    else:
        tiles = np.add.reduceat(scale, np.arange(0, out, 16), 0) / np.diff([*range(0, out, 16), out])[:, None]
        stats = np.zeros((*tiles.shape, 4), np.float16)
        stats[..., 0], stats[..., 2] = tiles / 4, top / 7
        ss = stats[..., 0].repeat(16, 0)[:out].astype(np.float32)
        codes = np.clip(np.round(scale / ss), 1, 7)
        scale, step = ss * codes, np.float32(stats[0, 0, 2])
        zero_codes = np.clip(np.round(-low / scale / step), 0, 7)
        zero = step * zero_codes
        fields = {"scale_codes": codes.astype(np.uint8), "zero_codes": zero_codes.astype(np.uint8), "tile_stats": stats}
    columns = [x.repeat(how.group, 1)[:, :inn].astype(np.float32) for x in (scale, zero)]
    fields["codes"] = np.clip(np.round(stored / columns[0] + columns[1]), 0, top).astype(np.uint8)
    matrix = SpqrMatrix(layout, **fields, perm=perm)
    if how.share:
        error = w - matrix.dequantize()
        kept = np.zeros(w.size, bool)
        kept[np.argsort(-np.abs(error).ravel(), kind="stable")[: round(how.share * w.size)]] = True
        rows, cols = np.nonzero(kept.reshape(w.shape))
        pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=out))])
        fields |= {"crow_indices": pointers, "col_indices": cols, "values": error[rows, cols].astype(np.float16)}
        matrix = SpqrMatrix(layout, **fields, perm=perm)
    return matrix


class Quantized:
    """A quantized checkpoint: its folder, the matrices in it, and the dense state dict that it stands for."""

    def __init__(self, folder: Path, matrices: dict[str, SpqrMatrix], state: dict[str, torch.Tensor]) -> None:
        self.folder, self.matrices = folder, matrices
        self.dense = {name: tensor.float() for name, tensor in state.items()}
        for module, matrix in matrices.items():
            self.dense[f"{module}.weight"] = torch.from_numpy(matrix.dequantize())


def write(
    folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], modules: dict[str, How], **options: Any
) -> Quantized:
    """Writes a checkpoint in which the weights of `modules` are quantized as they say."""
    matrices = {module: rtn(state[f"{module}.weight"], how) for module, how in modules.items()}
    with CheckpointWriter(folder, config=config, quantization_config={}, **options) as writer:
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            if module not in matrices:
                writer.add_dense(name, tensor)
            elif leaf == "weight":
                writer.add_matrix(module, matrices[module], state.get(f"{module}.bias"))
        writer.finish()
    return Quantized(folder, matrices, state)


def write_model(folder: Path, model: Any, how: How, also: str = "_proj") -> Quantized:
    """Saves `model` by transformers, under its hub names, and writes those names again with every linear quantized."""
    model.save_pretrained(folder / "dense")
    state = load_file(folder / "dense" / "model.safetensors")
    config = json.loads((folder / "dense" / "config.json").read_text())
    modules = {
        name.removesuffix(".weight"): how
        for name, tensor in state.items()
        if name.endswith(("_proj.weight", f"{also}.weight")) and tensor.ndim == 2
    }
    return write(folder / "spqr", config, state, modules)


def dense_of(quantized: Quantized, source: Path = TINY) -> Any:
    """The dense fp32 model with the numbers of plain numpy: the oracle."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(quantized.dense, strict=False)
    return model


def layers(model: torch.nn.Module) -> dict[str, SpqrLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpqrLinear)}


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Writes the file again. The header's own digest is left out: these tests reach the rules behind it."""
    header["__metadata__"].pop("spqr_header_sha256", None)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def poke(folder: Path, leaf: str, dtype: str, change: Callable[[np.ndarray], Any]) -> None:
    """Changes one tensor's bytes in place."""
    path = shard_of(folder, f"{MODULE}.{leaf}")
    header, data = split(path)
    begin, end = header[f"{MODULE}.{leaf}"]["data_offsets"]
    array = np.frombuffer(data[begin:end], dtype).copy()
    change(array)
    path.write_bytes(path.read_bytes()[: -len(data)] + data[:begin] + array.tobytes() + data[end:])


def position_out_of_range(folder: Path) -> None:
    poke(folder, "outliers", "<u2", lambda x: x.__setitem__(-2, 4095))  # of the last one


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices here are small: waiting for other threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """tiny-llama, quantized, in several shards. Read-only: copy it to break it."""
    state = load_file(TINY / "model.safetensors")
    names = [name.removesuffix(".weight") for name in state if name.split(".")[-2] in LINEARS]
    config = json.loads((TINY / "config.json").read_text())
    modules = {name: HOW.get(name.rpartition(".")[2], How()) for name in names}
    quantized = write(tmp_path_factory.mktemp("tiny") / "spqr", config, state, modules, max_shard_bytes=1_500_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, quantized.folder)
    return quantized


@pytest.fixture
def copied(tiny: Quantized, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "copied"))

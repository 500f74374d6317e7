"""HQQ: packed here by stripes as its bitpack.py describes, and by the tool itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.hqq import HqqSource
from spqr_format.errors import SpqrError

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
STRIPES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def folder_of(path: Path, parts: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    tensors = {f"{MODULE}.{k}": v.contiguous() for k, v in parts.items()} | {"norm.weight": torch.ones(4)}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}))
    return path


def make(
    bits: int = 4, axis: int = 1, dtype: torch.dtype = torch.float16, out: int = 16, inn: int = 48, size: int = 16
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(bits)
    groups = out * inn // size
    rows, columns = (groups, size) if axis == 1 else (size, groups)
    codes = torch.randint(0, 2**bits, (rows, columns))
    scale = (torch.rand(groups) * 0.02 + 0.001).to(dtype)
    zero = (torch.rand(groups) * 2**bits).to(dtype)
    expand = (lambda x: x[:, None]) if axis == 1 else (lambda x: x[None])
    weight = ((codes.to(dtype) - expand(zero)) * expand(scale)).reshape(out, inn)
    stripes = STRIPES[bits]
    high = -(-rows // stripes)
    packed = [[0] * columns for _ in range(high)]
    for r in range(rows):
        for c in range(columns):
            packed[r % high][c] |= int(codes[r, c]) << (bits * (stripes - 1 - r // high))
    text = "3bit_32" if bits == 3 else f"{bits}bit_u8"
    parts = {
        "W_q": torch.tensor(packed, dtype=torch.int32 if bits == 3 else torch.uint8),
        "scale": expand(scale), "zero": expand(zero), "shape": torch.tensor([out, inn]), "nbits": torch.tensor(bits).int(),
        "axis": torch.tensor(axis).int(), "group_size": torch.tensor(size).int(),
        "packing": torch.tensor(list(text.encode()), dtype=torch.uint8), "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8), "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip
    return parts, weight


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_weights(tmp_path: Path, bits: int, axis: int, dtype: torch.dtype) -> None:
    parts, weight = make(bits, axis, dtype)
    parts["bias"] = torch.ones(16)
    source = open_source(folder_of(tmp_path / "x", parts))
    assert isinstance(source, HqqSource)
    assert set(source.entries) == {NAME, f"{MODULE}.bias", "norm.weight"}
    assert (source.entries[NAME].shape, source.entries[NAME].dtype) == ((16, 48), dtype)
    assert torch.equal(source.load(NAME), weight)
    with pytest.raises(SpqrError, match="requantizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"


def test_codes_stored_as_floats(tmp_path: Path) -> None:
    parts, weight = make()
    parts["W_q"] = parts["W_q"].view(torch.float16)
    assert torch.equal(open_source(folder_of(tmp_path / "x", parts)).load(NAME), weight)


def test_files_of_the_tool(shared: Path) -> None:
    source = open_source(shared / "checkpoints" / "hqq_4bit_axis1_g64")
    assert len(source.modules) == 14
    for name, weight in load_file(shared / "checkpoints" / "hqq_4bit_axis1_g64" / "expected.safetensors").items():
        assert torch.equal(source.load(name).float(), weight)


def broken() -> dict[str, dict]:
    parts, _ = make()

    def at(name, value):
        return {k: v for k, v in {**parts, name: value}.items() if v is not None}

    return {
        "codes short": at("W_q", parts["W_q"][:-1]),
        "codes of int64": at("W_q", parts["W_q"].long()),
        "codes of rank 1": at("W_q", parts["W_q"].reshape(-1)),
        "scales missing": at("scale", None),
        "scales short": at("scale", parts["scale"][:-1]),
        "scales of rank 1": at("scale", parts["scale"].reshape(-1)),
        "scales of integers": at("scale", parts["scale"].int()),
        "scales empty": at("scale", parts["scale"][:0]),
        "scale NaN": at("scale", parts["scale"] * float("nan")),
        "zeros missing": at("zero", None),
        "zeros short": at("zero", parts["zero"][:-1]),
        "zeros of another type": at("zero", parts["zero"].float()),
        "zero infinite": at("zero", parts["zero"] * float("inf")),
        "shape missing": at("shape", None),
        "shape other": at("shape", torch.tensor([16, 49])),
        "shape negative": at("shape", torch.tensor([-16, -48])),
        "shape huge": at("shape", torch.tensor([2**40, 2**40])),
        "shape of three": at("shape", torch.tensor([1, 16, 48])),
        "bits missing": at("nbits", None),
        "5 bits": at("nbits", torch.tensor(5)),
        "0 bits": at("nbits", torch.tensor(0)),
        "bits of floats": at("nbits", torch.tensor(4.0)),
        "2 bits": at("nbits", torch.tensor(2)),
        "axis 2": at("axis", torch.tensor(2)),
        "axis 0": at("axis", torch.tensor(0)),
        "another packing": at("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8)),
        "a long packing": at("packing", torch.zeros(100, dtype=torch.uint8)),
        "quantized scales": at("quant_scale", torch.tensor(1)),
        "quantized zeros": at("quant_zero", torch.tensor(1)),
    }


@pytest.mark.parametrize("case", list(broken()))
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = folder_of(tmp_path / "x", broken()[case])
    with bounded():
        with pytest.raises(SpqrError, match="q_proj") as caught:
            open_source(folder).load(NAME)
        assert caught.value.code == "E501"

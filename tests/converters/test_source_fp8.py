"""FP8 with scales by blocks, rows or tensors: against a loop over the elements in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.fp8 import Fp8Source
from spqr_format.errors import SpqrError

MODULE = "model.layers.0.mlp.down_proj"
NAME = f"{MODULE}.weight"


def folder_of(path: Path, parts: dict[str, torch.Tensor], quantization: dict | None) -> Path:
    path.mkdir()
    save_file({**{f"{MODULE}.{k}": v for k, v in parts.items()}, "norm.weight": torch.ones(4)}, path / "model.safetensors")
    config = {"model_type": "llama", **({} if quantization is None else {"quantization_config": quantization})}
    (path / "config.json").write_text(json.dumps(config))
    return path


def make(grid_of: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    out, inn = 40, 60  # no multiple of the blocks
    torch.manual_seed(0)
    high, wide = grid_of
    grid = (-(-out // high), -(-inn // wide))
    codes = torch.randn(out, inn).to(torch.float8_e4m3fn)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = torch.randint(118, 124, grid).to(torch.uint8)
        meant = 2.0 ** (exponents.double() - 127)
        scale = exponents if dtype == torch.uint8 else exponents.view(torch.float8_e8m0fnu)
    else:
        scale = (torch.rand(grid) * 0.01 + 0.001).to(dtype)
        meant = scale.double()
    weight = torch.tensor([[float(codes[o, i]) * float(meant[o // high, i // wide]) for i in range(inn)] for o in range(out)])
    return {"weight": codes, "weight_scale_inv": scale}, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_blocks(tmp_path: Path, dtype: torch.dtype) -> None:
    parts, weight = make((16, 32), dtype)
    source = open_source(folder_of(tmp_path / "x", parts, {"quant_method": "fp8", "weight_block_size": [16, 32]}))
    assert isinstance(source, Fp8Source)
    assert set(source.entries) == {NAME, "norm.weight"}
    assert torch.equal(source.load(NAME), weight)
    with pytest.raises(SpqrError, match="requantizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"
    assert source.matrix("norm.weight") is None


@pytest.mark.parametrize("grid_of", [(40, 60), (1, 60)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("flat", [False, True])
def test_tensors_and_rows(tmp_path: Path, grid_of: tuple[int, int], name: str, flat: bool) -> None:
    parts, weight = make(grid_of)
    scale = parts.pop("weight_scale_inv")
    parts[name] = scale.reshape(-1) if flat else scale
    source = open_source(folder_of(tmp_path / "x", parts, {"quant_method": "fp8"}))
    assert torch.equal(source.load(NAME), weight)


def test_without_a_config_the_names_tell(tmp_path: Path) -> None:
    parts, weight = make((40, 60))
    parts["weight_scale_inv"] = parts["weight_scale_inv"].reshape(())
    source = open_source(folder_of(tmp_path / "x", parts, None))
    assert torch.equal(source.load(NAME), weight)


def broken() -> dict[str, tuple[dict, dict]]:
    parts, _ = make((16, 32))
    good = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    nan = parts["weight_scale_inv"].clone()
    nan[1, 1] = float("nan")
    bits = parts["weight"].view(torch.uint8).clone()
    bits[3, 3] = 0x7F
    return {
        "no block size": (parts, {"quant_method": "fp8"}),
        "another block size": (parts, {**good, "weight_block_size": [16, 16]}),
        "block size 0": (parts, {**good, "weight_block_size": [0, 32]}),
        "block size text": (parts, {**good, "weight_block_size": "16"}),
        "block size of three": (parts, {**good, "weight_block_size": [1, 2, 3]}),
        "scale NaN": ({**parts, "weight_scale_inv": nan}, good),
        "scale of integers": ({**parts, "weight_scale_inv": parts["weight_scale_inv"].int()}, good),
        "weight NaN": ({**parts, "weight": bits.view(torch.float8_e4m3fn)}, good),
        "weight fp16": ({**parts, "weight": parts["weight"].half()}, good),
        "weight missing": ({"weight_scale_inv": parts["weight_scale_inv"]}, good),
        "weight of rank 1": ({**parts, "weight": parts["weight"].reshape(-1)}, good),
        "weight empty": ({**parts, "weight": parts["weight"][:0]}, good),
        "two scales": ({**parts, "weight_scale": torch.ones(1)}, good),
    }


@pytest.mark.parametrize("case", list(broken()))
def test_hostile(tmp_path: Path, case: str) -> None:
    parts, quantization = broken()[case]
    folder = folder_of(tmp_path / "x", parts, quantization)
    with pytest.raises(SpqrError) as caught:
        open_source(folder).load(NAME)
    assert caught.value.code == "E501"

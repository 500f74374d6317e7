"""bitsandbytes NF4, FP4 and INT8: against a loop over the elements, and against the tool's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.bitsandbytes import BitsAndBytesSource
from spqr_format.errors import SpqrError

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"


def folder_of(path: Path, parts: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    tensors = {f"{MODULE}.{k}": v.contiguous() for k, v in parts.items()} | {"norm.weight": torch.ones(4)}
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def state(**values) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def make(
    kind: str = "nf4", nested: bool = False, dtype: torch.dtype = torch.bfloat16, out: int = 6, inn: int = 40, block: int = 64
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """out * inn is no multiple of the block, and blocks cross rows."""
    torch.manual_seed(0)
    count = out * inn
    codes = torch.randint(0, 16, (count,))
    levels = torch.sort(torch.rand(16) * 2 - 1)[0]
    blocks = -(-count // block)
    values = {"quant_type": kind, "blocksize": block, "dtype": str(dtype).removeprefix("torch."), "shape": [out, inn]}
    parts = {"weight.quant_map": levels}
    if nested:
        second, table, offset = torch.rand(-(-blocks // 3)), torch.sort(torch.rand(256))[0], 0.0625
        bytes_ = torch.randint(0, 256, (blocks,)).to(torch.uint8)
        absmax = torch.tensor([float(table[bytes_[i].item()] * second[i // 3] + offset) for i in range(blocks)])
        values |= {"nested_blocksize": 3, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.absmax": bytes_, "weight.nested_absmax": second, "weight.nested_quant_map": table}
    else:
        absmax = torch.rand(blocks)
        parts["weight.absmax"] = absmax
    parts["weight"] = torch.tensor([[int(codes[i]) << 4 | int(codes[i + 1])] for i in range(0, count, 2)], dtype=torch.uint8)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = state(**values)
    weight = torch.stack([(levels[codes[i]] * absmax[i // block]).to(dtype) for i in range(count)]).reshape(out, inn)
    return parts, weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits(tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    parts, weight = make(kind, nested, dtype)
    parts["weight"] = parts["weight"].reshape(-1).view(storage).reshape(-1, 1)
    source = open_source(folder_of(tmp_path / "x", parts))
    assert isinstance(source, BitsAndBytesSource)
    assert set(source.entries) == {NAME, "norm.weight"}
    assert (source.entries[NAME].shape, source.entries[NAME].dtype) == ((6, 40), dtype)
    assert torch.equal(source.load(NAME), weight)
    with pytest.raises(SpqrError, match="requantizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"
    assert source.matrix("norm.weight") is None


def test_eight_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-127, 128, (6, 40)).to(torch.int8), torch.rand(6)
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    source = open_source(folder_of(tmp_path / "x", parts))
    exact = codes.double() * scale.double()[:, None] / 127
    torch.testing.assert_close(source.load(NAME).double(), exact, rtol=3e-7, atol=0)
    with pytest.raises(SpqrError, match="8-bit") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"
    parts["weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(SpqrError, match="row-major") as caught:
        open_source(folder_of(tmp_path / "y", parts))
    assert caught.value.code == "E501"


def test_files_of_the_tool(shared: Path) -> None:
    source = open_source(shared / "checkpoints" / "bnb_nf4")
    assert isinstance(source, BitsAndBytesSource)
    assert len(source.modules) == 14
    for name, weight in load_file(shared / "checkpoints" / "bnb_nf4" / "expected.safetensors").items():
        assert torch.equal(source.load(name).float(), weight)


def broken() -> dict[str, dict]:
    parts, _ = make(nested=True)
    key = "weight.quant_state.bitsandbytes__nf4"
    good = json.loads(bytes(parts[key].tolist()))

    def at(name, value):
        return {k: v for k, v in {**parts, name: value}.items() if v is not None}

    def with_(**values):
        return at(key, state(**{k: v for k, v in {**good, **values}.items() if v is not None}))

    return {
        "no state": at(key, None),
        "state no JSON": at(key, torch.zeros(20, dtype=torch.uint8)),
        "state a list": at(key, torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "state long": at(key, torch.full((5000,), 32, dtype=torch.uint8)),
        "state of int32": at(key, parts[key].int()),
        "shape other": with_(shape=[6, 42]),
        "shape huge": with_(shape=[2**31 - 1, 2**31 - 1]),
        "shape negative": with_(shape=[-6, -40]),
        "shape of three": with_(shape=[6, 40, 1]),
        "shape text": with_(shape="6x40"),
        "no block size": with_(blocksize=None),
        "block size 0": with_(blocksize=0),
        "block size other": with_(blocksize=32),
        "dtype unknown": with_(dtype="int8"),
        "dtype list": with_(dtype=["float16"]),
        "offset text": with_(nested_offset="0"),
        "offset missing": with_(nested_offset=None),
        "second block 0": with_(nested_blocksize=0),
        "second block other": with_(nested_blocksize=1),
        "codes short": at("weight", parts["weight"][:-1]),
        "codes missing": at("weight", None),
        "map short": at("weight.quant_map", parts["weight.quant_map"][:8]),
        "map missing": at("weight.quant_map", None),
        "map NaN": at("weight.quant_map", parts["weight.quant_map"] * float("nan")),
        "absmax short": at("weight.absmax", parts["weight.absmax"][:-1]),
        "absmax of floats": at("weight.absmax", parts["weight.absmax"].float()),
        "second absmax infinite": at("weight.nested_absmax", parts["weight.nested_absmax"] * float("inf")),
        "second absmax missing": at("weight.nested_absmax", None),
        "second map short": at("weight.nested_quant_map", parts["weight.nested_quant_map"][:255]),
    }


@pytest.mark.parametrize("case", list(broken()))
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = folder_of(tmp_path / "x", broken()[case])
    with bounded():
        with pytest.raises(SpqrError, match="q_proj") as caught:
            open_source(folder).load(NAME)
        assert caught.value.code == "E501"

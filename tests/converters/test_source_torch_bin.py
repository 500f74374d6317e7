"""pytorch_model.bin: zip and older files, one and several, and files that want to run code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from spqr_converters.sources import DenseSource, open_source
from spqr_converters.sources.torch_bin import TorchBinSource
from spqr_format.errors import SpqrError


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"layers.{i}.{name}.weight": torch.randn(16, 24) for i in range(2) for name in ("a", "b")}
    found["layers.0.a.weight"] = found["layers.0.a.weight"].half()
    found["layers.1.a.weight"] = found["layers.1.a.weight"].bfloat16()
    found["layers.0.b.weight"] = torch.randn(24, 16).t()  # not contiguous
    found["tied.weight"] = found["layers.1.b.weight"]  # one storage
    return found


def make(folder: Path, shards: int, zipped: bool, config: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    state, names = tensors(), list(tensors())
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: torch.nn.Parameter(state[name]) for name in names[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_tensors(tmp_path: Path, shards: int, zipped: bool) -> None:
    source = open_source(make(tmp_path / "x", shards, zipped))
    assert isinstance(source, TorchBinSource)
    assert set(source.entries) == set(tensors())
    assert len(source.fingerprint()) == shards
    for name, tensor in tensors().items():
        loaded = source.load(name)
        assert torch.equal(loaded, tensor)
        assert loaded.is_contiguous()
        assert (loaded.dtype, tuple(loaded.shape)) == (source.entries[name].dtype, source.entries[name].shape)
        loaded.zero_()  # its own memory
        assert torch.equal(source.load(name), tensor)
        assert source.matrix(name) is None
    with pytest.raises(SpqrError, match="E501"):
        source.load("absent")


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    folder = make(tmp_path / "x", 1, True)
    save_file({"layers.0.a.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert isinstance(open_source(folder), DenseSource)


def test_quantized_ones_are_not_taken_for_dense(tmp_path: Path) -> None:
    folder = make(tmp_path / "x", 1, True, {"quantization_config": {"quant_method": "quip"}})
    with pytest.raises(SpqrError, match="quip") as caught:
        open_source(folder)
    assert caught.value.code == "E501"


def test_real_shards(shared: Path) -> None:
    source = open_source(shared / "checkpoints" / "plain_bin_sharded")
    assert isinstance(source, TorchBinSource)
    assert len(source.entries) == 21
    for name, weight in load_file(shared / "checkpoints" / "plain_bin_sharded" / "expected.safetensors").items():
        np.testing.assert_array_equal(source.load(name).float().numpy(), weight)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/spqr-evil-bin"),))


def huge(numel: int) -> bytes:
    """A state dict of 400 bytes whose one storage states `numel` elements."""
    import io

    stream = io.BytesIO()
    torch.save({"w": torch.zeros(123457)}, stream, _use_new_zipfile_serialization=False)
    raw = stream.getvalue()
    return raw.replace(b"J" + (123457).to_bytes(4, "little"), b"J" + numel.to_bytes(4, "little"))[:-400_000]


def resized() -> bytes:
    """A tensor of 2**30 x 2**10 floats on a storage of 64."""
    import io

    stream = io.BytesIO()
    torch.save({"w": torch.zeros(7, 9)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(b"K\x07K\t\x86", b"M\xff\xffM\xff\xff\x86")


def cases() -> dict[str, bytes]:
    import io

    stream = io.BytesIO()
    torch.save(tensors(), stream)
    good = stream.getvalue()
    stream = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), stream)
    module = stream.getvalue()
    stream = io.BytesIO()
    torch.save([torch.zeros(2)], stream)
    return {
        "empty": b"",
        "not torch": b"hello, world",
        "safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "cut zip": good[:-100],
        "half": good[: len(good) // 2],
        "damaged structure": good.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_vX"),
        "code": pickle.dumps(Evil(), 2),
        "code, protocol 4": pickle.dumps(Evil(), 4),
        "a whole model": module,
        "a list": stream.getvalue(),
        "two billion elements": huge(2**31 - 1),
        "more elements than data": huge(200_000),
        "larger than its storage": resized(),
        "a deep structure": b"\x80\x02" + b"]" * 8_000_000 + b".",
        "memory of strings": b"\x80\x02" + b"X\xff\xff\xff\x7f" + b"a" * 100,
        "a compressed archive": _compressed(),
    }


def _compressed() -> bytes:
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": 1}, 2))
        archive.writestr("archive/data/0", bytes(50_000_000))
    return stream.getvalue()


@pytest.mark.parametrize("case", list(cases()))
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = make(tmp_path / "x", 1, True)
    (folder / "pytorch_model.bin").write_bytes(cases()[case])
    with bounded():
        with pytest.raises(SpqrError, match=r"pytorch_model\.bin") as caught:
            open_source(folder)
        assert caught.value.code == "E501"
    assert not Path("/tmp/spqr-evil-bin").exists()


@pytest.mark.parametrize(
    "index",
    [
        "", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', '{"weight_map": {"w": "../x.bin"}}',
        '{"weight_map": {"w": "absent.bin"}}', '{"weight_map": {"w": "pytorch_model-00001-of-00003.bin"}}',
        '{"weight_map": {"w": ["a"]}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_hostile_index(tmp_path: Path, index: str) -> None:
    folder = make(tmp_path / "x", 3, True)
    (folder / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(SpqrError, match="index") as caught:
        open_source(folder)
    assert caught.value.code == "E501"

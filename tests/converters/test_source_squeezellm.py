"""SqueezeLLM: packed here bit by bit, and by SqueezeLLM's own packer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from spqr_converters.sources import open_source
from spqr_converters.sources.squeezellm import SqueezeLlmSource
from spqr_format.errors import SpqrError

MODULE = "model.layers.0.mlp.down_proj"
NAME = f"{MODULE}.weight"


def pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [in / 32 * bits, out]: for each output a stream of bits, lowest first."""
    out, inn = codes.shape
    words = np.zeros((inn * bits // 32, out), np.uint32)
    for o in range(out):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[o]))
        for k in range(words.shape[0]):
            words[k, o] = stream >> (32 * k) & 0xFFFFFFFF
    return torch.from_numpy(words.view(np.int32))


def make(bits: int, sparse: bool = False, full: bool = False, out: int = 24, inn: int = 64) -> tuple[dict, np.ndarray]:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (out, inn))
    table = rng.normal(0, 0.02, (out, 2**bits)).astype(np.float32)
    weight = np.take_along_axis(table, codes, 1)
    parts = {"qweight": pack(codes, bits), "lookup_table": torch.from_numpy(table)}
    if sparse:
        mask = rng.random((out, inn)) < 0.05
        values = (rng.normal(0, 0.1, (out, inn)) * mask).astype(np.float32)
        csr = torch.from_numpy(values).to_sparse_csr()
        parts |= {"rows": csr.crow_indices().int(), "cols": csr.col_indices().int(), "vals": csr.values()}
        weight = weight + values
    if full:
        rows = np.array([3, 17])
        extra = rng.normal(0, 0.1, (inn, 2)).astype(np.float32)
        parts |= {"full_rows": torch.from_numpy(extra), "full_row_indices": torch.from_numpy(rows).int()}
        weight[rows] += extra.T
    return parts, weight


def folder_of(path: Path, parts: dict, bits: int | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    if bits is not None:
        (path / "quant_config.json").write_text(json.dumps({"wbits": bits}))
    state = {f"{MODULE}.{key}": value for key, value in parts.items()}
    state |= {"model.norm.weight": torch.ones(64), f"sparse_threshold.{MODULE}": 77}
    torch.save(state, path / "sq-model.pt")
    return path


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_the_weights(tmp_path: Path, bits: int, sparse: bool, full: bool) -> None:
    parts, weight = make(bits, sparse, full)
    source = open_source(folder_of(tmp_path / "x", parts, bits if sparse else None))
    assert isinstance(source, SqueezeLlmSource)
    assert set(source.entries) == {NAME, "model.norm.weight"}
    assert (source.entries[NAME].shape, source.entries[NAME].dtype) == ((24, 64), torch.float32)
    assert source.entries[NAME].end == sum(t.numel() * t.element_size() for t in parts.values())
    np.testing.assert_array_equal(source.load(NAME).numpy(), weight)
    assert source.matrix("model.norm.weight") is None
    with pytest.raises(SpqrError, match="requantizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"


@pytest.mark.parametrize(("folder", "exact"), [("squeezellm_w4_s0", True), ("squeezellm_w3_s45", False)])
def test_files_of_the_packer(shared: Path, folder: str, exact: bool) -> None:
    """Its own input; with outliers up to float32's last bit, as the packer stores outlier - table."""
    source = open_source(shared / "checkpoints" / folder)
    for name, weight in load_file(shared / "checkpoints" / folder / "expected.safetensors").items():
        loaded = source.load(name).numpy()
        if exact:
            np.testing.assert_array_equal(loaded, weight)
        else:
            np.testing.assert_array_max_ulp(loaded, weight, 1)
            assert (loaded != weight).mean() < 0.01


def broken(parts: dict) -> dict[str, dict]:
    def at(key, value):
        return {k: v for k, v in {**parts, key: value}.items() if v is not None}

    def one(key, place, value):
        changed = parts[key].clone()
        changed[place] = value
        return at(key, changed)

    n = parts["cols"].numel()
    return {
        "no codes": at("qweight", None),
        "codes int64": at("qweight", parts["qweight"].long()),
        "codes cut": at("qweight", parts["qweight"][:-1]),
        "codes of other rows": at("qweight", parts["qweight"][:, :-1]),
        "no codes at all": at("qweight", parts["qweight"][:0]),
        "table of 4": at("lookup_table", parts["lookup_table"][:, :4]),
        "table of 16": at("lookup_table", torch.zeros(24, 16)),
        "table of rank 1": at("lookup_table", parts["lookup_table"][0]),
        "table of integers": at("lookup_table", parts["lookup_table"].int()),
        "table NaN": one("lookup_table", 5, float("nan")),
        "no columns": at("cols", None),
        "no values": at("vals", None),
        "values short": at("vals", parts["vals"][:-1]),
        "value infinite": one("vals", 2, float("inf")),
        "column out of range": one("cols", 3, 64),
        "column negative": one("cols", 3, -1),
        "rows short": at("rows", parts["rows"][:-1]),
        "rows fall": one("rows", 4, n),
        "rows end high": one("rows", -1, n + 1),
        "rows start high": one("rows", 0, 2),
        "rows int64": at("rows", parts["rows"].long()),
        "full row out of range": one("full_row_indices", 0, 24),
        "full row negative": one("full_row_indices", 0, -1),
        "full rows short": at("full_rows", parts["full_rows"][:-1]),
        "full row indices missing": at("full_row_indices", None),
        "full row NaN": one("full_rows", 0, float("nan")),
    }


@pytest.mark.parametrize("case", list(broken(make(3, True, True)[0])))
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = folder_of(tmp_path / "x", broken(make(3, True, True)[0])[case], 3)
    with bounded():
        with pytest.raises(SpqrError, match="down_proj") as caught:
            open_source(folder).load(NAME)
        assert caught.value.code == "E501"


@pytest.mark.parametrize("text", ["", "{}", '{"wbits": 5}', '{"wbits": "3"}', "[" * 100_000, '{"wbits": 4}'])
def test_hostile_quant_config(tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path / "x", make(3)[0])
    (folder / "quant_config.json").write_text(text)
    with pytest.raises(SpqrError) as caught:
        open_source(folder)
    assert caught.value.code == "E501"


def test_two_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", make(3)[0])
    (folder / "other.pt").write_bytes((folder / "sq-model.pt").read_bytes())
    with pytest.raises(SpqrError, match="several") as caught:
        open_source(folder)
    assert caught.value.code == "E501"

"""SpQR's own dumps: made here in the same layout, and made by SpQR's main.py."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from spqr_converters.sources import open_source
from spqr_converters.sources.spqr_legacy import SpqrLegacySource
from spqr_format.errors import SpqrError
from spqr_format.matrix import SpqrMatrix
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"


def make_layer(
    out: int = 48, inn: int = 40, bits: int = 3, width: int = 16, tile: int = 16, dtype: torch.dtype = torch.float16,
    permuted: bool = True, second: bool = True, share: float = 0.03, integer_zeros: bool = False, seed: int = 0,
) -> dict:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        return (torch.rand(*shape, generator=rng) * (high - low) + low).to(dtype)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=rng).to(torch.int8)

    groups, middle = -(-inn // width), 2 ** (bits - 1)
    mask = torch.rand(out, inn, generator=rng) < share
    layer = {
        "quant_weights": integers(2**bits, out, inn),
        "save_float_dtype": dtype,
        "outliers_matrix": (torch.randn(out, inn, generator=rng) * 0.2 * mask).to(dtype).to_sparse(),
        "perm": (torch.randperm(inn, generator=rng) if permuted else torch.arange(inn)).to(torch.int32),
        "keep_last_columns": 0,
        "blocksize": 128,
        "weight_shape": torch.Size((out, inn)),
        "groupsize": width,
        "sublayer_name": "self_attn.q_proj",
    }
    if second:
        high = out // tile
        layer |= {
            "quant_layer_scale": [integers(8, high, tile) for _ in range(groups)],
            "quant_layer_zeros": [integers(8, high, tile) for _ in range(groups)],
            "quant_layer_scale_qq_scale": [rand(high, 1) * 0.003 for _ in range(groups)],
            "quant_layer_scale_qq_zero": [-rand(high, 1) * 2 for _ in range(groups)],
            "quant_layer_zero_qq_scale": [rand(high, 1) * 0.2 for _ in range(groups)],
            "quant_layer_zero_qq_zero": [-rand(high, 1) * middle * 2 for _ in range(groups)],
        }
    else:
        zeros = [rand(out, 1) * middle for _ in range(groups)]
        layer |= {
            "quant_layer_scale": [rand(out, 1) * 0.02 for _ in range(groups)],
            "quant_layer_zeros": [z.round() for z in zeros] if integer_zeros else zeros,
            **{f"quant_layer_{a}_qq_{b}": [] for a in ("scale", "zero") for b in ("scale", "zero")},
        }
    return layer


def meant(layer: dict, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Column by column as the reference does it, every operation in the dump's type, or in another one."""
    dtype = dtype or layer["save_float_dtype"]
    out, inn = layer["weight_shape"]
    result = torch.empty(out, inn, dtype=dtype)
    outliers = layer["outliers_matrix"].to_dense().to(dtype)
    for column in range(inn):
        group = column // layer["groupsize"]
        s, z = layer["quant_layer_scale"][group].to(dtype), layer["quant_layer_zeros"][group].to(dtype)
        if layer["quant_layer_scale_qq_scale"]:
            s = layer["quant_layer_scale_qq_scale"][group].to(dtype) * (s - layer["quant_layer_scale_qq_zero"][group].to(dtype))
            z = layer["quant_layer_zero_qq_scale"][group].to(dtype) * (z - layer["quant_layer_zero_qq_zero"][group].to(dtype))
        q = layer["quant_weights"][:, column].to(dtype)
        result[:, column] = s.reshape(-1) * (q - z.reshape(-1))
    result = torch.where(outliers != 0, outliers, result)
    return result[:, layer["perm"].long().argsort()]


def dump(path: Path, layer: dict, bits: int = 3, inside: bool = True) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 40}))
    root = path / "legacy" if inside else path
    (root / "0").mkdir(parents=True)
    torch.save(layer, root / "0" / "self_attn.q_proj")
    torch.save({"wbits": bits, "groupsize": 16}, root / "args.pt")
    others = {"model.embed_tokens.weight": torch.ones(8, 40).half(), "model.layers.0.norm.weight": torch.ones(40).half()}
    torch.save({k: torch.nn.Parameter(v) for k, v in others.items()}, root / "not_quantized_weights.pt")
    return path


def write_and_read(matrix: SpqrMatrix, folder: Path) -> np.ndarray:
    """Through a checkpoint on disk, which is valid."""
    with CheckpointWriter(folder, config={"model_type": "llama"}) as writer:
        writer.add_matrix(MODULE, matrix)
        writer.finish()
    report = validate(folder, deep=True)
    assert not report.findings, report.findings[:3]
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.matrix(MODULE).dequantize()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"permuted": False}, {"share": 0.0}, {"bits": 4, "width": 32}, {"bits": 2}, {"width": 48},
        {"second": False, "integer_zeros": True}, {"out": 32, "inn": 33},
    ],
)  # fmt: skip
def test_carried_over(tmp_path: Path, options: dict, inside: bool) -> None:
    layer = make_layer(**options)
    bits = options.get("bits", 3)
    source = open_source(dump(tmp_path / "x", layer, bits, inside))
    assert isinstance(source, SpqrLegacySource)
    assert set(source.entries) == {NAME, "model.embed_tokens.weight", "model.layers.0.norm.weight"}
    assert source.entries[NAME].shape == tuple(layer["weight_shape"])
    assert torch.equal(source.load("model.embed_tokens.weight"), torch.ones(8, 40).half())
    assert len(source.fingerprint()) == 3
    weight = source.load(NAME)
    assert weight.dtype == source.entries[NAME].dtype
    assert torch.equal(weight, meant(layer))

    matrix = source.matrix(NAME)
    assert matrix is not None
    np.testing.assert_array_equal(matrix.codes, layer["quant_weights"].numpy())
    assert (matrix.perm is not None) == options.get("permuted", True)
    decoded = write_and_read(matrix, tmp_path / "out")
    exact = meant(layer, torch.float64).numpy()
    replaced = np.zeros(exact.shape, bool)
    replaced[:, layer["perm"].numpy()] = layer["outliers_matrix"].to_dense().numpy() != 0
    np.testing.assert_allclose(decoded[~replaced], exact[~replaced], atol=1e-6)
    # The difference is rounded to fp16: half a unit in its last place.
    np.testing.assert_allclose(decoded[replaced], exact[replaced], atol=2**-11)
    assert (matrix.values is None) == (options.get("share") == 0.0)


def test_what_bfloat16_dumps_hold(tmp_path: Path) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    source = open_source(dump(tmp_path / "x", layer))
    assert torch.equal(source.load(NAME), meant(layer))
    matrix = source.matrix(NAME)
    assert matrix is not None
    np.testing.assert_allclose(matrix.dequantize(), meant(layer, torch.float64).numpy(), atol=5e-4)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"second": False}, "not integers"), ({"tile": 8}, "8 rows"), ({"width": 8}, "groups of 8"), ({"bits": 5}, "5 bits"),
        ({"dtype": torch.float32}, "fp16"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_still_read(tmp_path: Path, options: dict, what: str) -> None:
    layer = make_layer(**options)
    source = open_source(dump(tmp_path / "x", layer, options.get("bits", 3)))
    assert torch.equal(source.load(NAME), meant(layer))
    with pytest.raises(SpqrError, match=what) as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"
    assert "requantizes" in str(caught.value)


@pytest.mark.parametrize("folder", ["spqr_legacy_identity", "spqr_legacy_act_order"])
def test_files_of_the_reference(shared: Path, tmp_path: Path, folder: str) -> None:
    """Bit for bit what SpQR's own layer_weight_dequantization returns; carried over, within its fp16 rounding."""
    source = open_source(shared / "checkpoints" / folder)
    for name, weight in load_file(shared / "checkpoints" / folder / "expected.safetensors").items():
        np.testing.assert_array_equal(source.load(name).float().numpy(), weight)
        matrix = source.matrix(name)
        assert matrix is not None
        decoded = matrix.dequantize()
        assert np.abs(decoded - weight).max() < 1e-3 * np.abs(weight).max()
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "out"), decoded)


def test_the_dump_and_its_compressed_form_have_the_same_codes(shared: Path) -> None:
    """Two readers, two layouts, one quantization."""
    legacy = open_source(shared / "checkpoints" / "spqr_legacy_act_order")
    compressed = open_source(shared / "checkpoints" / "spqr_hf_csr_act_order")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        a, b = legacy.matrix(name), compressed.matrix(name)
        assert a is not None
        assert b is not None
        for field in ("codes", "scale_codes", "zero_codes", "tile_stats", "perm", "crow_indices", "col_indices"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/spqr-evil"),))


def broken(layer: dict) -> dict[str, dict]:
    def at(key, value):
        return {**layer, key: value}

    def first(key, value):
        return {**layer, key: [value, *layer[key][1:]]}

    codes, sparse = layer["quant_weights"], layer["outliers_matrix"]
    inn = codes.shape[1]
    return {
        "no codes": {k: v for k, v in layer.items() if k != "quant_weights"},
        "codes of float": at("quant_weights", codes.float()),
        "codes of rank 1": at("quant_weights", codes.reshape(-1)),
        "codes are a list": at("quant_weights", [1, 2]),
        "codes above": at("quant_weights", codes + 1),
        "codes below": at("quant_weights", codes - 1),
        "codes expanded": at("quant_weights", torch.zeros(1, dtype=torch.int8).expand(1 << 20, 1 << 20)),
        "type is text": at("save_float_dtype", "float16"),
        "type is integer": at("save_float_dtype", torch.int8),
        "groups missing": at("quant_layer_scale", layer["quant_layer_scale"][1:]),
        "statistics missing": at("quant_layer_zero_qq_zero", []),
        "statistics no list": at("quant_layer_zero_qq_zero", None),
        "scale codes short": first("quant_layer_scale", layer["quant_layer_scale"][0][:1]),
        "scale codes negative": first("quant_layer_scale", layer["quant_layer_scale"][0] - 8),
        "scale codes float": first("quant_layer_scale", layer["quant_layer_scale"][0].float()),
        "statistic NaN": first("quant_layer_zero_qq_zero", layer["quant_layer_zero_qq_zero"][0] * float("nan")),
        "statistic short": first("quant_layer_scale_qq_scale", layer["quant_layer_scale_qq_scale"][0][:1]),
        "perm out of range": at("perm", torch.arange(1, inn + 1).int()),
        "perm doubles": at("perm", torch.zeros(inn).int()),
        "perm negative": at("perm", -torch.arange(inn).int()),
        "perm short": at("perm", torch.arange(inn - 1).int()),
        "perm float": at("perm", torch.arange(inn).float()),
        "perm missing": at("perm", None),
        "outliers dense": at("outliers_matrix", sparse.to_dense()),
        "outliers of another shape": at("outliers_matrix", sparse.t().coalesce()),
        "outliers infinite": at("outliers_matrix", sparse * float("inf")),
        "outliers missing": at("outliers_matrix", None),
        "two outliers in a place": at(
            "outliers_matrix", torch.sparse_coo_tensor([[0, 0], [1, 1]], torch.ones(2).half(), tuple(sparse.shape))
        ),
        "group size text": at("groupsize", "16"),
        "group size 0": at("groupsize", 0),
        "group size huge": at("groupsize", 1 << 40),
    }


@pytest.mark.parametrize("case", list(broken(make_layer())))
def test_hostile_layers(tmp_path: Path, case: str, bounded) -> None:
    folder = dump(tmp_path / "x", broken(make_layer())[case])
    with bounded():
        for action in ("load", "matrix"):
            with pytest.raises(SpqrError, match=r"self_attn\.q_proj") as caught:
                getattr(open_source(folder), action)(NAME)
            assert caught.value.code == "E501"


def hostile_pickles(good: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"weights",
        "cut": good[: len(good) // 2],
        "cut at the end": good[:-30],
        "magic only": b"PK\x03\x04",
        "code": pickle.dumps(Evil(), 2),
        "a number of 2 GB": pickle.dumps({"x": b"0" * 10}, 2).replace(b"\n\x00\x00\x00", b"\xff\xff\xff\x7f"),
        "zeros": b"\x80" + bytes(1000),
    }


@pytest.mark.parametrize("case", list(hostile_pickles(b"")))
@pytest.mark.parametrize("file", ["0/self_attn.q_proj", "args.pt", "not_quantized_weights.pt"])
def test_hostile_pickles(tmp_path: Path, case: str, file: str, bounded) -> None:
    folder = dump(tmp_path / "x", make_layer())
    path = folder / "legacy" / file
    path.write_bytes(hostile_pickles(path.read_bytes())[case])
    with bounded():
        with pytest.raises(SpqrError, match=Path(file).name) as caught:
            open_source(folder)
        assert caught.value.code == "E501"
    assert not Path("/tmp/spqr-evil").exists()


def test_the_widest_layer_of_a_large_model_has_ten_thousand_tensors(tmp_path: Path) -> None:
    layer = make_layer(16, 16 * 1800)
    source = open_source(dump(tmp_path / "x", layer))
    assert source.entries[NAME].shape == (16, 28800)


def test_a_deep_structure(tmp_path: Path, bounded) -> None:
    folder = dump(tmp_path / "x", make_layer())
    path = folder / "legacy" / "0" / "self_attn.q_proj"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"]" * 5_000_000 + b".")
    with bounded():
        with pytest.raises(SpqrError, match="operations") as caught:
            open_source(folder)
        assert caught.value.code == "E501"


def test_missing_parts(tmp_path: Path) -> None:
    folder = dump(tmp_path / "x", make_layer())
    (folder / "legacy" / "0" / "self_attn.q_proj").unlink()
    with pytest.raises(SpqrError, match=r"E501.*no quantized layers"):
        open_source(folder)
    (folder / "legacy" / "not_quantized_weights.pt").unlink()
    with pytest.raises(SpqrError, match=r"E501.*missing"):
        open_source(folder)
    (folder / "legacy" / "args.pt").unlink()
    with pytest.raises(SpqrError, match=r"E501"):
        open_source(folder)

"""compressed-tensors: packed here with Python integers in every layout that its versions write, and by the tool itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.compressed_tensors import CompressedTensorsSource
from spqr_format.errors import SpqrError
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"


def pack(values: np.ndarray, bits: int, stream: bool) -> np.ndarray:
    """int32 [rows, words] from unsigned codes [rows, columns]."""
    rows = []
    for row in values:
        if stream:
            number = sum(int(v) << (bits * i) for i, v in enumerate(row))
            words = [number >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(row) * bits // 32))]
        else:
            per = 32 // bits
            words = [sum(int(v) << (bits * i) for i, v in enumerate(row[k : k + per])) for k in range(0, len(row), per)]
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def make(
    bits: int = 4, size: int = 32, asym: bool = False, order: bool = False, stream: bool = True, zeros_packed: bool = True,
    dtype: torch.dtype = torch.float16, out: int = 48, inn: int = 128, seed: int = 0,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """The tensors of one pack-quantized module (size -1: one group a row), and W as the tool computes it."""
    rng = np.random.default_rng(seed)
    half, groups = 2 ** (bits - 1), 1 if size == -1 else -(-inn // size)
    codes = rng.integers(-half, half, (out, inn))
    scale = torch.from_numpy(rng.uniform(0.005, 0.02, (out, groups))).to(dtype)
    zero = rng.integers(-half, half, (out, groups)) if asym else np.zeros((out, groups), int)
    g_idx = np.arange(inn) // (inn if size == -1 else size)
    if order:
        g_idx = rng.permutation(g_idx)
    weight = torch.from_numpy(codes - zero[:, g_idx]).to(dtype) * scale[:, torch.from_numpy(g_idx)]
    parts = {
        "weight_packed": torch.from_numpy(pack(codes + half, bits, stream)),
        "weight_scale": scale,
        "weight_shape": torch.tensor([out, inn]),
    }
    if asym:
        packed = np.ascontiguousarray(pack((zero + half).T, bits, stream).T)
        parts["weight_zero_point"] = torch.from_numpy(packed if zeros_packed else zero.astype(np.int8))
    if order:
        parts["weight_g_idx"] = torch.from_numpy(g_idx).int()
    return parts, weight


def section(bits: int = 4, size: int | None = 32, **more) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel" if size == -1 else "group"}
    weights = {**weights, "group_size": size, **more.pop("weights", {})}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}, **more.pop("groups", {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **more}


def folder_of(path: Path, parts: dict[str, torch.Tensor], quantization: object, key: str = "quantization_config") -> Path:
    path.mkdir()
    others = {"model.norm.weight": torch.ones(128), "lm_head.weight": torch.ones(8, 128).half()}
    save_file({**{f"{MODULE}.{k}": v.contiguous() for k, v in parts.items()}, **others}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", key: quantization}))
    return path


def check_carried(source, weight: torch.Tensor, folder: Path, perm: bool) -> None:
    matrix = source.matrix(NAME)
    assert (matrix.perm is not None) == perm
    with CheckpointWriter(folder, config={"model_type": "llama"}) as writer:
        writer.add_matrix(MODULE, matrix)
        writer.finish()
    assert not validate(folder, deep=True).findings
    decoded = torch.from_numpy(matrix.dequantize())
    # One product of an fp16 scale and a small integer: exact in float32, so rounding it gives the tool's own number.
    assert torch.equal(decoded.to(weight.dtype), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(("size", "order"), [(32, False), (-1, False), (32, True), (48, False)])
@pytest.mark.parametrize("stream", [True, False])
def test_packed(tmp_path: Path, bits: int, asym: bool, size: int, order: bool, stream: bool) -> None:
    parts, weight = make(bits, size, asym, order, stream, zeros_packed=stream)
    source = open_source(folder_of(tmp_path / "x", parts, section(bits, size)))
    assert isinstance(source, CompressedTensorsSource)
    assert set(source.entries) == {NAME, "model.norm.weight", "lm_head.weight"}
    assert (source.entries[NAME].shape, source.entries[NAME].dtype) == ((48, 128), torch.float16)
    loaded = source.load(NAME)
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded, weight)
    check_carried(source, weight, tmp_path / "out", order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    parts, weight = make(4, 32, asym=True, dtype=dtype)
    source = open_source(folder_of(tmp_path / "x", parts, section(), key="compression_config"))
    assert source.load(NAME).dtype == dtype
    assert torch.equal(source.load(NAME), weight)
    if dtype == torch.bfloat16:
        check_carried(source, weight, tmp_path / "out", False)
    else:
        with pytest.raises(SpqrError, match=r"fp16.*requantizes") as caught:
            source.matrix(NAME)
        assert caught.value.code == "E510"


def test_widths_that_both_packings_share_go_by_the_version(tmp_path: Path) -> None:
    for number, (version, stream) in enumerate([("0.20.0", True), ("0.17.1", False), (None, False)]):
        parts, weight = make(3, -1, stream=stream, inn=30)
        quantization = section(3, -1, **({"version": version} if version else {}))
        source = open_source(folder_of(tmp_path / f"x{number}", parts, quantization))
        assert torch.equal(source.load(NAME), weight)


def test_two_groups_are_told_apart_by_sizes(tmp_path: Path) -> None:
    other = {"group_1": {"targets": ["re:.*(a|a)*b"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    parts, weight = make(4, 32)
    assert torch.equal(open_source(folder_of(tmp_path / "a", parts, section(groups=other))).load(NAME), weight)
    parts, weight = make(8, -1)
    source = open_source(folder_of(tmp_path / "b", parts, section(groups=other)))
    assert torch.equal(source.load(NAME), weight)
    with pytest.raises(SpqrError, match="8 bits") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("kind", ["float", "int"])
def test_plain_codes(tmp_path: Path, strategy: str, kind: str) -> None:
    rng = torch.Generator().manual_seed(1)
    out, inn = 40, 56
    rows, columns = {"tensor": (out, inn), "channel": (1, inn), "block": (16, 32)}[strategy]
    grid = (-(-out // rows), -(-inn // columns))
    scale = (torch.rand(grid, generator=rng) * 0.01 + 0.001).to(torch.bfloat16)
    if kind == "float":
        codes = torch.randn(out, inn, generator=rng).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(-128, 128, (out, inn), generator=rng).to(torch.int8)
    weight = torch.empty(out, inn, dtype=torch.bfloat16)
    for o in range(out):
        for i in range(inn):
            weight[o, i] = codes[o, i].to(torch.bfloat16) * scale[o // rows, i // columns]
    stored = scale.reshape(1) if strategy == "tensor" else scale
    parts = {"weight": codes, "weight_scale": stored, "input_scale": torch.ones(1)}
    structure = {"block_structure": [16, 32]} if strategy == "block" else {}
    weights = {"type": kind, "strategy": strategy, "num_bits": 8, "group_size": None, **structure}
    source = open_source(folder_of(tmp_path / "x", parts, section(weights=weights)))
    assert set(source.entries) == {NAME, "model.norm.weight", "lm_head.weight"}
    assert torch.equal(source.load(NAME), weight)
    assert any("activations" in note for note in source.notes())
    with pytest.raises(SpqrError, match=r"8 bits.*requantizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"


def test_plain_codes_of_4_bits_are_carried_over(tmp_path: Path) -> None:
    parts, weight = make(4, 32, asym=True, zeros_packed=False)
    reference = open_source(folder_of(tmp_path / "x", parts, section()))
    codes = torch.from_numpy(reference.matrix(NAME).codes.astype(np.int16) - 8).to(torch.int8)
    plain = {k: v for k, v in parts.items() if k in ("weight_scale", "weight_zero_point")}
    source = open_source(folder_of(tmp_path / "y", {"weight": codes, **plain}, section()))
    assert torch.equal(source.load(NAME), weight)
    check_carried(source, weight, tmp_path / "out", False)


def test_a_g_idx_that_was_never_set(tmp_path: Path) -> None:
    parts, weight = make(4, 32)
    parts["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    source = open_source(folder_of(tmp_path / "x", parts, section()))
    assert torch.equal(source.load(NAME), weight)
    assert source.matrix(NAME).perm is None


def test_uneven_groups_and_small_groups_cannot_be_held(tmp_path: Path) -> None:
    parts, _ = make(4, 32, order=True)
    parts["weight_g_idx"][:] = 0
    source = open_source(folder_of(tmp_path / "x", parts, section()))
    source.load(NAME)
    with pytest.raises(SpqrError, match="other sizes") as caught:
        source.matrix(NAME)
    assert caught.value.code == "E510"
    parts, weight = make(4, 8)
    source = open_source(folder_of(tmp_path / "y", parts, section(size=8)))
    assert torch.equal(source.load(NAME), weight)
    with pytest.raises(SpqrError, match="groups of 8"):
        source.matrix(NAME)


@pytest.mark.parametrize("folder", ["ct_w3a16_g128_sym", "ct_w4a16_g128_sym", "ct_fp8_block"])
def test_files_of_the_tool(shared: Path, folder: str) -> None:
    """Bit for bit; what is carried over too, once it is rounded to fp16 as the tool does."""
    source = open_source(shared / "checkpoints" / folder)
    assert isinstance(source, CompressedTensorsSource)
    assert len(source.modules) == 14
    for name, weight in load_file(shared / "checkpoints" / folder / "expected.safetensors").items():
        assert torch.equal(source.load(name).float(), weight)
        if folder != "ct_fp8_block":
            matrix = source.matrix(name)
            assert matrix is not None
            assert torch.equal(torch.from_numpy(matrix.dequantize()).half().float(), weight)


def broken() -> dict[str, dict]:
    parts, _ = make(4, 32, asym=True, order=True)

    def at(key, value):
        return {k: v for k, v in {**parts, key: value}.items() if v is not None}

    def one(key, place, value):
        changed = parts[key].clone()
        changed[place] = value
        return at(key, changed)

    return {
        "no scales": at("weight_scale", None),
        "no shape": at("weight_shape", None),
        "codes of int64": at("weight_packed", parts["weight_packed"].long()),
        "codes of rank 3": at("weight_packed", parts["weight_packed"][None]),
        "codes cut": at("weight_packed", parts["weight_packed"][:, :-1]),
        "no codes": at("weight_packed", parts["weight_packed"][:, :0]),
        "shape of other rows": one("weight_shape", 0, 49),
        "shape huge": one("weight_shape", 1, 1 << 40),
        "shape negative": one("weight_shape", 1, -5),
        "shape zero": one("weight_shape", 1, 0),
        "shape of three": at("weight_shape", torch.tensor([48, 128, 1])),
        "shape of floats": at("weight_shape", torch.tensor([48.0, 128.0])),
        "scales short": at("weight_scale", parts["weight_scale"][:, :-1]),
        "scales of integers": at("weight_scale", parts["weight_scale"].int()),
        "scale NaN": one("weight_scale", 3, float("nan")),
        "scale infinite": one("weight_scale", 3, float("inf")),
        "zeros short": at("weight_zero_point", parts["weight_zero_point"][:-1]),
        "zeros of int64": at("weight_zero_point", parts["weight_zero_point"].long()),
        "zeros fraction": at("weight_zero_point", torch.full((48, 4), 0.5)),
        "zeros huge": at("weight_zero_point", torch.full((48, 4), 1e9)),
        "group out of range": one("weight_g_idx", 9, 4),
        "group negative": one("weight_g_idx", 9, -2),
        "groups short": at("weight_g_idx", parts["weight_g_idx"][:-1]),
        "groups of int64": at("weight_g_idx", parts["weight_g_idx"].long()),
        "a dense weight too": at("weight", torch.ones(48, 128)),
    }


@pytest.mark.parametrize("case", list(broken()))
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = folder_of(tmp_path / "x", broken()[case], section())
    with bounded():
        for action in ("load", "matrix"):
            with pytest.raises(SpqrError, match="q_proj") as caught:
                getattr(open_source(folder), action)(NAME)
            assert caught.value.code == "E501"


@pytest.mark.parametrize(
    "quantization",
    [
        section(bits=0), section(bits=99), section(size=0), section(size=10**30), section(size=64), section(bits=3),
        section(weights={"num_bits": "4"}), section(weights={"type": "complex"}), section(weights={"type": "float"}),
        section(weights={"strategy": "tensor_group"}), section(weights={"strategy": ["group"]}),
        section(weights={"strategy": "block", "block_structure": [128]}),
        section(weights={"strategy": "block", "block_structure": "128x128"}),
        section(transform_config={"config_groups": {"u": {}}}), section(sparsity_config={"format": "sparse-24-bitmask"}),
        {**section(), "config_groups": {}}, {**section(), "config_groups": [1]}, {**section(), "config_groups": {"a": 1}},
        {**section(), "config_groups": {"a": {"weights": None}}}, {"quant_method": "compressed-tensors"},
    ],
)  # fmt: skip
def test_hostile_configs(tmp_path: Path, quantization: dict) -> None:
    folder = folder_of(tmp_path / "x", make(4, 32)[0], quantization)
    with pytest.raises(SpqrError) as caught:
        open_source(folder)
    assert caught.value.code == "E501"

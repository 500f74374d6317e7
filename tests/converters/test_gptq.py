"""GPTQ sources, against packers written here from the layouts' descriptions, and against other tools' own weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.gptq import GptqSource
from spqr_converters.sources.packed import unpack_stream
from spqr_format.errors import SpqrError

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def pack_words(values: np.ndarray, bits: int, planar: bool = False) -> np.ndarray:
    """int32 [ceil(n * bits / 32), m] from values [n, m]: one Python integer of 32 bits at a time, the slow and plain way."""
    n, m = values.shape
    words = -(-n * bits // 32)
    out = np.zeros((words, m), np.uint64)
    for column in range(m):
        number = 0
        if planar:
            for block in range(-(-n // 32)):
                part = [int(v) for v in values[32 * block : 32 * block + 32, column]]
                at, low = 32 * bits * block, 0
                for width in PLANES[bits]:
                    for i, v in enumerate(part):
                        number |= ((v >> low) & (2**width - 1)) << (at + width * i)
                    at, low = at + 32 * width, low + width
        else:
            for i, v in enumerate(values[:, column]):
                number |= int(v) << (bits * i)
        for w in range(words):
            out[w, column] = (number >> (32 * w)) & 0xFFFFFFFF
    return out.astype(np.uint32).view(np.int32)


def gptq_linear(
    name: str, rows: int, columns: int, bits: int, group: int, *, v1: bool = True, sym: bool = False, act: bool = False,
    with_g_idx: bool = True, planar: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0, low: int = 1,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """Tensors of one layer, and its weight as the float64 formula gives it, rounded to the scales' dtype."""
    rng = np.random.default_rng(seed)
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes = rng.integers(0, 2**bits, (rows, columns))
    zeros = np.full((rows, groups), 2 ** (bits - 1)) if sym else rng.integers(low, 2**bits, (rows, groups))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, groups))).to(dtype)
    g_idx = np.arange(columns) // size
    if act:
        g_idx = g_idx[rng.permutation(columns)]
    weight = scales.double().numpy()[:, g_idx] * (codes - zeros[:, g_idx])
    tensors = {
        f"{name}.qweight": torch.from_numpy(pack_words(codes.T, bits, planar)),
        f"{name}.qzeros": torch.from_numpy(np.ascontiguousarray(pack_words(zeros - (1 if v1 else 0), bits, planar).T)),
        f"{name}.scales": scales.t().contiguous(),
    }
    if with_g_idx:
        tensors[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return tensors, torch.from_numpy(weight).to(dtype)


def gptq_folder(folder: Path, tensors: dict[str, torch.Tensor], options: dict[str, Any] | None, **where: Any) -> Path:
    """config.json holds the options, or the file named `file` does; the weights lie in `weights`."""
    folder.mkdir(exist_ok=True, parents=True)
    config: dict[str, Any] = {"model_type": "llama"}
    if options is not None:
        if "file" in where:
            (folder / where["file"]).write_text(json.dumps(options))
        else:
            config["quantization_config"] = {"quant_method": "gptq", **options}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / where.get("weights", "model.safetensors"), where.get("metadata"))
    return folder


def assert_same(folder: Path, expected: dict[str, torch.Tensor], **options: Any) -> GptqSource:
    """`load` is exact, and `matrix` holds the same weights before the source's rounding."""
    source = GptqSource(folder, **options) if options else open_source(folder)
    assert isinstance(source, GptqSource)
    for name, weight in expected.items():
        assert source.entries[name].shape == tuple(weight.shape)
        loaded = source.load(name)
        assert loaded.dtype == weight.dtype == source.entries[name].dtype
        assert torch.equal(loaded, weight), name
    return source


def assert_carried(source: Any, name: str, group: int | None = None, permuted: bool | None = None) -> None:
    matrix = source.matrix(name)
    assert matrix is not None
    assert matrix.layout.statistics == "direct"
    assert permuted is None or matrix.layout.permuted == permuted
    assert group is None or matrix.layout.group_size == group
    assert source.layout(name) == matrix.layout
    loaded = source.load(name)
    assert torch.equal(torch.from_numpy(matrix.dequantize()).to(loaded.dtype), loaded)


# Packing


@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 100), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_streams(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    packed = np.ascontiguousarray(pack_words(codes.T, bits).T).view(np.uint8)
    assert (unpack_stream(packed, bits, count) == codes).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_every_setting(tmp_path: Path, bits: int, v1: bool, act: bool, group: int) -> None:
    tensors, weight = gptq_linear("a.q", 64, 256, bits, group, v1=v1, act=act, seed=bits)
    options = {"bits": bits, "group_size": group, "checkpoint_format": "gptq" if v1 else "gptq_v2", "sym": False}
    source = assert_same(gptq_folder(tmp_path, tensors, options), {"a.q.weight": weight})
    if bits == 8:
        with pytest.raises(SpqrError, match=r"E510.*8 bits.*without --lossless"):
            source.matrix("a.q.weight")
    else:
        assert_carried(source, "a.q.weight", 256 if group == -1 else group, act and group != -1)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planar(tmp_path: Path, bits: int) -> None:
    tensors, weight = gptq_linear("a.q", 64, 128, bits, 64, v1=False, planar=True)
    options = {"bits": bits, "group_size": 64, "checkpoint_format": "gptq_p", "sym": False}
    assert_same(gptq_folder(tmp_path, tensors, options), {"a.q.weight": weight})


@pytest.mark.parametrize("act", [True, False])
def test_a_short_last_group(tmp_path: Path, act: bool) -> None:
    tensors, weight = gptq_linear("a.q", 40, 176, 4, 128, act=act)
    source = assert_same(gptq_folder(tmp_path, tensors, {"bits": 4, "group_size": 128, "sym": False}), {"a.q.weight": weight})
    assert_carried(source, "a.q.weight", 128, act)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "quantization_config.json"])
def test_old_files_without_g_idx(tmp_path: Path, name: str) -> None:
    tensors, weight = gptq_linear("a.q", 64, 128, 4, 32, with_g_idx=False)
    other = {"x.weight": torch.zeros(3)}
    options = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    folder = gptq_folder(tmp_path, {**tensors, **other}, options, file=name, weights="gptq_model-4bit-32g.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "other.safetensors")
    source = assert_same(folder, {"a.q.weight": weight, "x.weight": other["x.weight"]})
    assert source.files == ["gptq_model-4bit-32g.safetensors"]
    assert_carried(source, "a.q.weight", 32)
    assert source.matrix("x.weight") is None
    assert source.layout("x.weight") is None


def test_no_options_at_all(tmp_path: Path) -> None:
    """What shapes and the file's metadata say is enough."""
    tensors, weight = gptq_linear("a.q", 64, 128, 3, 32, v1=False)
    metadata = {"gptq_bits": "3", "gptq_group_size": "32", "gptq_checkpoint_format": "gptq_v2"}
    assert_same(gptq_folder(tmp_path / "a", tensors, None, metadata=metadata), {"a.q.weight": weight})
    tensors, weight = gptq_linear("a.q", 64, 128, 3, 32)
    assert_same(gptq_folder(tmp_path / "b", tensors, None), {"a.q.weight": weight})


def test_settings_of_single_modules(tmp_path: Path) -> None:
    a, first = gptq_linear("model.layers.0.a", 64, 128, 4, 128)
    b, second = gptq_linear("model.layers.1.b", 64, 128, 8, 64)
    c, third = gptq_linear("lm_head", 96, 128, 3, 32, with_g_idx=False)
    options = {
        "bits": 4, "group_size": 128, "sym": False, "lm_head": True,
        "dynamic": {
            "-:.*x.*": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 64}, "(a+)+$": {"bits": 2},
            "lm_head": {"bits": 3, "group_size": 32},
        },
    }  # fmt: skip
    folder = gptq_folder(tmp_path, {**a, **b, **c}, options)
    source = assert_same(folder, {"model.layers.0.a.weight": first, "model.layers.1.b.weight": second, "lm_head.weight": third})
    assert_carried(source, "lm_head.weight", 32)


def test_groups_that_are_no_multiple_of_16(tmp_path: Path) -> None:
    tensors, weight = gptq_linear("a.q", 64, 96, 4, 24)
    source = assert_same(gptq_folder(tmp_path, tensors, {"bits": 4, "group_size": 24, "sym": False}), {"a.q.weight": weight})
    with pytest.raises(SpqrError, match=r"E510.*24 columns.*without --lossless"):
        source.matrix("a.q.weight")


def test_uneven_groups_repeat_their_statistics(tmp_path: Path) -> None:
    """64 columns of group 0, 32 of group 2, none of group 1, 16 of group 3: groups of 32."""
    tensors, _ = gptq_linear("a.q", 64, 112, 4, 32)
    g_idx = np.array([0] * 64 + [2] * 32 + [3] * 16, np.int32)[np.random.default_rng(0).permutation(112)]
    tensors["a.q.g_idx"] = torch.from_numpy(g_idx)
    source = open_source(gptq_folder(tmp_path, tensors, {"bits": 4, "group_size": 32, "sym": False}))
    assert_carried(source, "a.q.weight", 32, True)


def test_scales_that_are_not_fp16(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors, weight = gptq_linear("a.q", 64, 128, 4, 64, dtype=dtype)
        folder = gptq_folder(tmp_path / str(dtype), tensors, {"bits": 4, "group_size": 64, "sym": False})
        source = assert_same(folder, {"a.q.weight": weight})
        if dtype == torch.float32:
            with pytest.raises(SpqrError, match=r"E510.*no fp16"):
                source.matrix("a.q.weight")
        else:
            assert_carried(source, "a.q.weight", 64)


# Zeros


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("v1", [True, False])
def test_a_symmetric_checkpoint_tells_its_zeros(tmp_path: Path, label: str | None, v1: bool) -> None:
    tensors, weight = gptq_linear("a.q", 64, 128, 4, 64, v1=v1, sym=True)
    options = {"bits": 4, "group_size": 64, "sym": True} | ({"checkpoint_format": label} if label else {})
    folder = gptq_folder(tmp_path, tensors, options)
    source = assert_same(folder, {"a.q.weight": weight})
    (note,) = source.notes()
    assert ("although" in note) == ((label == "gptq_v2") == v1)
    assert source.zeros_version == ("v1" if v1 else "v2")
    for asked in ("v1", "v2"):
        forced = GptqSource(folder, zeros=asked)
        assert torch.equal(forced.load("a.q.weight"), weight) == (asked == source.zeros_version)
        assert "as asked" in forced.notes()[0]


@pytest.mark.parametrize("writer", ["gptqmodel", "autogptq", "autogptq act", "auto-round"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_v1_zeros_that_are_0_or_2_to_the_bits(tmp_path: Path, writer: str, bits: int) -> None:
    """GPTQModel subtracts 1 from every field with borrow from the word; auto-round's and AutoGPTQ's readers do not wrap."""
    rng = np.random.default_rng(bits)
    tensors, _ = gptq_linear("a.q", 64, 128, bits, 64, v1=False)
    low = 0 if writer in ("gptqmodel", "autogptq") and not (writer == "autogptq" and bits == 3) else 1
    zeros = rng.integers(low, 2**bits + low, (64, 2))
    if writer == "gptqmodel" and bits != 3:
        words = pack_words(zeros, bits).T.copy().view(np.uint32)
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        stored = (words - np.uint32(ones)).view(np.int32)
    else:
        stored = pack_words((zeros - 1) % 2**bits, bits).T
    tensors["a.q.qzeros"] = torch.from_numpy(np.ascontiguousarray(stored))
    codes_from = GptqSource(gptq_folder(tmp_path / "v2", tensors, {"bits": bits, "group_size": 64}), zeros="v2")
    matrix = codes_from.matrix("a.q.weight")
    assert matrix is not None
    scales = tensors["a.q.scales"].double().numpy().T
    weight = scales.repeat(64, 1) * (matrix.codes.astype(int) - zeros.repeat(64, 1))
    options: dict[str, Any] = {"bits": bits, "group_size": 64, "sym": False, "desc_act": writer == "autogptq act"}
    if writer == "gptqmodel":
        options["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    if writer == "auto-round":
        options["autoround_version"] = "0.16.1"
    folder = gptq_folder(tmp_path / "v1", tensors, options)
    source = assert_same(folder, {"a.q.weight": torch.from_numpy(weight).half()})
    assert_carried(source, "a.q.weight")
    assert any("2**bits - 1" in note for note in source.notes())


def test_auto_rounds_own_packings(tmp_path: Path) -> None:
    for v1, packing in ((True, "auto_round:auto_gptq"), (False, "auto_round"), (False, "auto_round:gptqmodel")):
        tensors, weight = gptq_linear("a.q", 64, 128, 4, 64, v1=v1, with_g_idx=False, low=2)
        options = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 64, "sym": False}
        assert_same(gptq_folder(tmp_path / packing.replace(":", "-"), tensors, options), {"a.q.weight": weight})


# Other tools' own weights


def exact_folders() -> list[str]:
    root = Path(__file__).parents[2].parent / "shared" / "checkpoints"
    found = [*root.glob("*gptq*"), *root.glob("autoround_*")]
    return sorted({path.name for path in found if path.is_dir()}) or ["none"]


@pytest.mark.parametrize("name", exact_folders())
def test_the_writers_own_weights(shared: Path, name: str) -> None:
    folder = shared / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip("no checkpoints of other tools")
    source = open_source(folder)
    for tensor, weight in load_file(folder / "expected.safetensors").items():
        assert torch.equal(source.load(tensor).float(), weight.float()), tensor
        if source.layout(tensor) is not None:
            assert_carried(source, tensor)


# Hostile files


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _good(**changes: Any) -> dict[str, torch.Tensor]:
    tensors, _ = gptq_linear("a.q", 64, 128, 4, 64)
    for leaf, value in changes.items():
        if value is None:
            del tensors[f"a.q.{leaf}"]
        else:
            tensors[f"a.q.{leaf}"] = value
    return tensors


I32 = torch.int32
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qzeros missing": ({"qzeros": None}, {}),
    "scales missing": ({"scales": None}, {}),
    "qweight missing": ({"qweight": None}, {}),
    "g_idx negative": ({"g_idx": torch.full((128,), -1, dtype=I32)}, {}),
    "g_idx too large": ({"g_idx": torch.full((128,), 2, dtype=I32)}, {}),
    "g_idx huge": ({"g_idx": torch.full((128,), 2**31 - 1, dtype=I32)}, {}),
    "g_idx of floats": ({"g_idx": torch.zeros(128)}, {}),
    "g_idx too short": ({"g_idx": torch.zeros(100, dtype=I32)}, {}),
    "g_idx empty": ({"g_idx": torch.zeros(0, dtype=I32)}, {}),
    "g_idx of rank 2": ({"g_idx": torch.zeros(128, 1, dtype=I32)}, {}),
    "a group too many": ({"scales": torch.ones(3, 64).half(), "qzeros": torch.zeros(3, 8, dtype=I32)}, {}),
    "a group too few": ({"scales": torch.ones(1, 64).half(), "qzeros": torch.zeros(1, 8, dtype=I32)}, {}),
    "no groups": ({"scales": torch.ones(0, 64).half(), "qzeros": torch.zeros(0, 8, dtype=I32)}, {}),
    "scales and qzeros disagree": ({"scales": torch.ones(4, 64).half()}, {}),
    "scales of integers": ({"scales": torch.ones(2, 64, dtype=torch.int16)}, {}),
    "scales of doubles": ({"scales": torch.ones(2, 64, dtype=torch.float64)}, {}),
    "scales of rank 1": ({"scales": torch.ones(128).half()}, {}),
    "qweight of int64": ({"qweight": torch.zeros(16, 64, dtype=torch.int64)}, {}),
    "qweight of rank 3": ({"qweight": torch.zeros(16, 64, 1, dtype=I32)}, {}),
    "qweight empty": ({"qweight": torch.zeros(0, 64, dtype=I32)}, {}),
    "qweight cut": ({"qweight": torch.zeros(15, 64, dtype=I32)}, {}),
    "qzeros too wide": ({"qzeros": torch.zeros(2, 9, dtype=I32)}, {}),
    "qzeros of int16": ({"qzeros": torch.zeros(2, 8, dtype=torch.int16)}, {}),
    "bits 5": ({}, {"bits": 5}),
    "bits 3": ({}, {"bits": 3}),
    "bits huge": ({}, {"bits": 10**18}),
    "bits no number": ({}, {"bits": [4]}),
    "bits true": ({}, {"bits": True}),
    "group_size 0": ({}, {"group_size": 0}),
    "group_size -2": ({}, {"group_size": -2}),
    "group_size 1e30": ({}, {"group_size": 1e30}),
    "group_size of another": ({}, {"group_size": 32}),
    "a format not read": ({}, {"checkpoint_format": "bitblas"}),
    "rotated": ({}, {"rotation": "hadamard"}),
    "dynamic of a bad number": ({}, {"dynamic": {"x": {"bits": "many"}}}),
}


def load_all(folder: Path) -> None:
    source = open_source(folder)
    for name in source.entries:
        source.load(name)


@pytest.fixture
def refused(bounded) -> Callable[..., str]:
    return lambda folder, code="E501": _refused(bounded, folder, code)


def _refused(bounded, folder: Path, code: str) -> str:
    with bounded(), pytest.raises(SpqrError) as caught:
        load_all(folder)
    assert caught.value.code == code, caught.value
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(tmp_path: Path, refused, case: str) -> None:
    changes, options = HOSTILE[case]
    refused(gptq_folder(tmp_path / "x", _good(**changes), {"bits": 4, "group_size": 64, "sym": False, **options}))


def test_scales_that_are_not_finite(tmp_path: Path, refused) -> None:
    tensors = _good()
    tensors["a.q.scales"][0, 0] = float("nan")
    refused(gptq_folder(tmp_path, tensors, {"bits": 4, "group_size": 64}), "E502")


def _entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, bytes | dict[str, Any]] = {
    "huge shape": {"a.q.qweight": _entry("I32", [2**30, 2**30], 0, 64), "a.q.scales": _entry("F16", [1, 1], 64, 66)},
    "negative shape": {"a.q.qweight": _entry("I32", [-4, -4], 0, 64)},
    "text for a shape": {"a.q.qweight": _entry("I32", ["4"], 0, 16)},
    "overlap": {"a.q.qweight": _entry("I32", [4], 0, 16), "a.q.scales": _entry("F16", [4], 8, 16)},
    "past the end": {"a.q.qweight": _entry("I32", [1000], 0, 4000)},
    "unknown dtype": {"a.q.qweight": _entry("I3", [4], 0, 16)},
    "not JSON": b"{nonsense",
    "nested": b"[" * 5000,
    "ten megabytes": b"{" + b" " * 10_000_001,
    "a long number": b'{"a.q.qweight":{"dtype":"I32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_hostile_headers(tmp_path: Path, refused, case: str) -> None:
    folder = gptq_folder(tmp_path / "x", _good(), {"bits": 4, "group_size": 64})
    raw_file(folder / "model.safetensors", BROKEN[case], bytes(128))
    refused(folder)


@pytest.mark.parametrize("length", [0, 4, 8, 100])
def test_cut_files(tmp_path: Path, refused, length: int) -> None:
    folder = gptq_folder(tmp_path / "x", _good(), {"bits": 4, "group_size": 64})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:length])
    refused(folder)
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map":{"a":"../x"}}', b'{"weight_map":{"a":3}}', b'{"weight_map":{}}']
)
def test_hostile_indices(tmp_path: Path, refused, index: bytes) -> None:
    folder = gptq_folder(tmp_path / "x", _good(), {"bits": 4, "group_size": 64})
    (folder / "model.safetensors.index.json").write_bytes(index)
    refused(folder)

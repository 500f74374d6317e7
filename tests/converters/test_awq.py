"""AWQ sources, against packers written here from the layouts' descriptions, and against AutoAWQ's own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.awq import AwqSource, _gemv_fast, _marlin, _nibbles_of_words
from spqr_format.errors import SpqrError

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words_of(fields: np.ndarray) -> np.ndarray:
    """int32 [..., m] from fields [..., m, 8], the first in the lowest bits."""
    words = np.zeros(fields.shape[:-1], np.uint64)
    for k in range(8):
        words |= fields[..., k].astype(np.uint64) << np.uint64(4 * k)
    return words.astype(np.uint32).view(np.int32)


def gemm_words(values: np.ndarray) -> np.ndarray:
    """[n, m / 8] from [n, m]: nibble k of a word is column ORDER[k] of its eight."""
    n, m = values.shape
    return words_of(values.reshape(n, m // 8, 8)[..., ORDER])


def gemv_words(values: np.ndarray) -> np.ndarray:
    """[m, n / 8] from [m, n], in natural order."""
    m, n = values.shape
    return words_of(values.reshape(m, n // 8, 8))


def gemv_fast_words(codes: np.ndarray) -> np.ndarray:
    """int16 [m / 4, n] as llm-awq's pack_intweight describes it: 32 columns as 4 x 4 x 2 transposed, the even ones of 8
    before the odd ones, then 4 rows interleaved by 64 columns, 4 nibbles a word."""
    m, n = codes.shape
    packed = codes.reshape(m, n // 32, 32).reshape(m, n // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    packed = packed.reshape(m, n // 32, 4, 8).reshape(m, n // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    packed = packed.reshape(m, n)
    packed = packed.reshape(m // 4, 4, n // 64, 64).transpose(0, 2, 1, 3).reshape(m // 4, n // 64, 64, 4).astype(np.uint16)
    words = packed[..., 0] | packed[..., 1] << 4 | packed[..., 2] << 8 | packed[..., 3] << 12
    return words.reshape(m // 4, n).view(np.int16)


def marlin_words(codes: np.ndarray) -> np.ndarray:
    """int32 [n / 16, 2 * m] from [n, m]: 16 x 16 tiles, four of them a 1024-long unit in the order of the tensor cores."""
    n, m = codes.shape
    perm = []
    for i in range(32):
        single = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1):
                single.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            perm.extend(p + 256 * j for p in single)
    order = np.array(perm).reshape(-1, 8)[:, ORDER].ravel()
    tiles = codes.reshape(n // 16, 16, m // 16, 16).transpose(0, 2, 1, 3).reshape(n // 16, m * 16)
    units = tiles.reshape(-1, 1024)[:, order].reshape(n // 16, m * 2, 8)
    return words_of(units)


def marlin_scales(scales: torch.Tensor) -> torch.Tensor:
    groups, m = scales.shape
    if groups > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.reshape(-1, len(order))[:, order].reshape(groups, m).contiguous()


def awq_linear(
    name: str, kind: str, rows: int, columns: int, group: int, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one layer, and fp16(s * (q - z)) from float64."""
    rng = np.random.default_rng(seed)
    size = columns if group == -1 else group
    groups = columns // size
    codes = rng.integers(0, 16, (rows, columns))
    zeros = np.full((rows, groups), 8) if kind == "marlin" else rng.integers(0, 16, (rows, groups))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, groups))).half()
    weight = scales.double().numpy().repeat(size, 1) * (codes - zeros.repeat(size, 1))
    tensors: dict[str, Any]
    if kind == "gemm":
        tensors = {"qweight": gemm_words(codes.T), "qzeros": gemm_words(zeros.T), "scales": scales.t()}
    elif kind == "marlin":
        tensors = {"qweight": marlin_words(codes.T), "scales": marlin_scales(scales.t().contiguous())}
    else:
        repeat = {128: 1, 64: 2, 32: 4}.get(size, 1)
        eights = (groups + 7) // 8
        width = (eights + repeat - 1) // repeat * repeat * 8
        padded = np.zeros((rows, width), int)
        padded[:, :groups] = zeros
        wide = torch.zeros(rows, width).half()
        wide[:, :groups] = scales
        if kind == "gemv":
            tensors = {"qweight": gemv_words(codes), "qzeros": gemv_words(padded), "scales": wide}
        else:
            offsets = -(wide.double() * torch.from_numpy(padded)).half()
            tensors = {"qweight": gemv_fast_words(codes), "qzeros": offsets.t(), "scales": wide.t()}
    made = {
        f"{name}.{leaf}": (value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value)))
        for leaf, value in tensors.items()
    }
    return {leaf: value.contiguous() for leaf, value in made.items()}, torch.from_numpy(weight).half()


def awq_folder(folder: Path, tensors: dict[str, torch.Tensor], options: dict[str, Any], file: str | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    config: dict[str, Any] = {"model_type": "llama"}
    if file:
        (folder / file).write_text(json.dumps(options))
    else:
        config["quantization_config"] = {"quant_method": "awq", **options}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@given(st.sampled_from([16, 64, 80]), st.sampled_from([64, 128, 192]), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_packings(rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, columns))
    assert (_nibbles_of_words(gemm_words(codes.T)) == codes).all()
    assert (_gemv_fast(gemv_fast_words(codes)) == codes).all()
    if rows % 64 == 0:
        scales = torch.randn(2, rows)
        back, plain = _marlin(marlin_words(codes.T), marlin_scales(scales), 2)
        assert (back == codes).all()
        assert torch.equal(plain, scales.t())


@pytest.mark.parametrize("kind", ["gemm", "gemv", "gemv_fast", "marlin"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 256), (192, 1152)])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_every_kind(tmp_path: Path, kind: str, rows: int, columns: int, group: int) -> None:
    tensors, weight = awq_linear("a.q", kind, rows, columns, group)
    other = {"a.o.weight": torch.ones(4, 4), "a.q.bias": torch.ones(rows).half()}
    options = {"w_bit": 4, "q_group_size": group, "version": kind.upper(), "modules_to_not_convert": ["o"]}
    source = open_source(awq_folder(tmp_path, {**tensors, **other}, options))
    assert isinstance(source, AwqSource)
    assert source.entries.keys() == {"a.q.weight", "a.o.weight", "a.q.bias"}
    assert torch.equal(source.load("a.o.weight"), other["a.o.weight"])
    assert source.matrix("a.o.weight") is None
    loaded = source.load("a.q.weight")
    matrix = source.matrix("a.q.weight")
    assert matrix is not None
    assert source.layout("a.q.weight") == matrix.layout
    assert matrix.layout.group_size == (columns if group == -1 else group)
    carried = torch.from_numpy(matrix.dequantize())
    assert torch.equal(carried.half(), weight)
    if kind == "gemv_fast":  # adds a rounded offset, as its kernel does
        assert (loaded.float() - carried).norm() < 1e-3 * carried.norm()
        assert any("gemv_fast" in note for note in source.notes())
    else:
        assert torch.equal(loaded, weight)


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_options_in_a_file(tmp_path: Path, file: str) -> None:
    tensors, weight = awq_linear("a.q", "gemm", 64, 128, 32)
    source = open_source(awq_folder(tmp_path, tensors, {"w_bit": 4, "q_group_size": 32}, file))
    assert torch.equal(source.load("a.q.weight"), weight)


def test_auto_rounds_awq_packing(tmp_path: Path) -> None:
    tensors, weight = awq_linear("a.q", "gemm", 64, 128, 32)
    options = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    source = open_source(awq_folder(tmp_path, tensors, options))
    assert isinstance(source, AwqSource)
    assert torch.equal(source.load("a.q.weight"), weight)


def test_llm_awqs_names(tmp_path: Path) -> None:
    tensors, _ = awq_linear("a.q", "gemv_fast", 64, 256, 128)
    tensors["a.q.scaled_zeros"] = tensors.pop("a.q.qzeros")
    source = open_source(awq_folder(tmp_path, tensors, {"w_bit": 4, "q_group_size": 128}))
    assert source.matrix("a.q.weight") is not None


def test_gemv_fast_zeros_that_are_no_integers(tmp_path: Path) -> None:
    tensors, _ = awq_linear("a.q", "gemv_fast", 64, 256, 128)
    tensors["a.q.qzeros"][0, 0] = tensors["a.q.scales"][0, 0] * -3.5
    source = open_source(awq_folder(tmp_path, tensors, {"w_bit": 4, "q_group_size": 128}))
    assert torch.isfinite(source.load("a.q.weight")).all()
    with pytest.raises(SpqrError, match=r"E510.*1 groups.*without --lossless"):
        source.matrix("a.q.weight")


@pytest.mark.parametrize("dense", [False, True])
def test_activation_scales_are_folded(tmp_path: Path, dense: bool) -> None:
    tensors, weight = awq_linear("h.0.mlp.c_proj", "gemm", 64, 128, 32)
    scales = torch.rand(128).half() + 0.5
    if dense:
        more, _ = awq_linear("h.0.mlp.c_fc", "gemm", 128, 64, 32)
        tensors = {"h.0.mlp.c_proj.weight": weight, **more}
    source = open_source(awq_folder(tmp_path, {**tensors, "h.0.mlp.act.scales": scales}, {"bits": 4, "group_size": 32}))
    assert "h.0.mlp.act.scales" not in source.entries
    expected = (weight.float() / scales.float()).half()
    assert torch.equal(source.load("h.0.mlp.c_proj.weight"), expected)
    if not dense:
        with pytest.raises(SpqrError, match=r"E510.*activation scales"):
            source.matrix("h.0.mlp.c_proj.weight")


def exact_folders() -> list[str]:
    root = Path(__file__).parents[2].parent / "shared" / "checkpoints"
    return sorted(path.name for path in root.glob("awq_*") if path.is_dir()) or ["none"]


@pytest.mark.parametrize("name", exact_folders())
def test_autoawqs_own_weights(shared: Path, name: str) -> None:
    folder = shared / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip("no checkpoints of other tools")
    source = open_source(folder)
    assert isinstance(source, AwqSource)
    for tensor, weight in load_file(folder / "expected.safetensors").items():
        loaded = source.load(tensor)
        if "gemv_fast" in name:  # expected is the weight before packing, which rounds the offsets
            assert (loaded.float() - weight.float()).abs().max() < 5e-4
            matrix = source.matrix(tensor)
            assert matrix is not None
            assert torch.equal(torch.from_numpy(matrix.dequantize()).half().float(), weight.float())
        else:
            assert torch.equal(loaded.float(), weight.float())


I32 = torch.int32
HOSTILE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scales missing": ("gemm", {"scales": None}, {}),
    "qzeros missing": ("gemm", {"qzeros": None}, {}),
    "qzeros missing in gemv": ("gemv", {"qzeros": None}, {}),
    "qweight missing": ("gemm", {"qweight": None}, {}),
    "qweight of int64": ("gemm", {"qweight": torch.zeros(128, 8, dtype=torch.int64)}, {}),
    "qweight empty": ("gemm", {"qweight": torch.zeros(0, 8, dtype=I32)}, {}),
    "qweight of rank 1": ("gemm", {"qweight": torch.zeros(128, dtype=I32)}, {}),
    "qweight too wide": ("gemm", {"qweight": torch.zeros(128, 9, dtype=I32)}, {}),
    "a group too many": ("gemm", {"scales": torch.ones(5, 64).half()}, {}),
    "scales empty": ("gemm", {"scales": torch.ones(0, 64).half()}, {}),
    "scales of bytes": ("gemm", {"scales": torch.ones(4, 64, dtype=torch.uint8)}, {}),
    "qzeros of another shape": ("gemm", {"qzeros": torch.zeros(4, 9, dtype=I32)}, {}),
    "qzeros of halves": ("gemm", {"qzeros": torch.zeros(4, 8).half()}, {}),
    "gemv with too few scales": ("gemv", {"scales": torch.ones(64, 2).half()}, {}),
    "gemv with very many scales": (
        "gemv", {"scales": torch.ones(64, 4096).half(), "qzeros": torch.zeros(64, 512, dtype=I32)}, {},
    ),
    "gemv_fast of odd columns": ("gemv_fast", {"qweight": torch.zeros(16, 96, dtype=torch.int16)}, {}),
    "gemv_fast with integer zeros": ("gemv_fast", {"qzeros": torch.zeros(16, 64, dtype=I32)}, {}),
    "marlin with a wrong width": ("marlin", {"qweight": torch.zeros(8, 130, dtype=I32)}, {}),
    "8 bits": ("gemm", {}, {"bits": 8}),
    "bits of text": ("gemm", {}, {"bits": "4x"}),
    "group_size 0": ("gemm", {}, {"group_size": 0}),
    "group_size of text": ("gemm", {}, {"group_size": "32"}),
    "group_size of another": ("gemm", {}, {"group_size": 64}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path: Path, bounded, case: str) -> None:
    kind, changes, options = HOSTILE[case]
    tensors, _ = awq_linear("a.q", kind, 64, 128, 32)
    for leaf, value in changes.items():
        if value is None:
            del tensors[f"a.q.{leaf}"]
        else:
            tensors[f"a.q.{leaf}"] = value
    folder = awq_folder(tmp_path / "x", tensors, {"bits": 4, "group_size": 32, **options})
    with bounded(), pytest.raises(SpqrError, match="E501") as caught:
        load_all(folder)
    assert len(str(caught.value)) < 1000


def load_all(folder: Path) -> None:
    source = open_source(folder)
    for name in source.entries:
        source.load(name)

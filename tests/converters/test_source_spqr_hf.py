"""SpQR's Hugging Face checkpoints: a packer written from the layout's description, and files that SpQR itself wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from spqr_converters.sources import open_source
from spqr_converters.sources.spqr_hf import SpqrHfSource
from spqr_format.errors import SpqrError
from spqr_format.matrix import SpqrMatrix
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate
from spqr_format.writer import CheckpointWriter

NAME = "model.layers.0.self_attn.q_proj"
H = np.float16


def random_parts(out: int, inn: int, seed: int = 0, share: float = 0.02) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = -(-inn // 16)
    return {
        "codes": rng.integers(0, 8, (out, inn)),
        "sq": rng.integers(0, 8, (out, groups)),
        "zq": rng.integers(0, 8, (out, groups)),
        "stats": (rng.uniform(0.5, 1.5, (out // 16, groups, 4)) * [0.003, -2, 0.3, -1]).astype(H),  # ss sz zs zz
        "outliers": np.where(rng.random((out, inn)) < share, rng.normal(0, 0.1, (out, inn)), 0).astype(H),  # stored columns
        "perm": rng.permutation(inn),
    }


def pack(parts: dict[str, np.ndarray], tiled: bool, permuted: bool) -> dict[str, np.ndarray]:
    """One Python int a word, straight from the description."""
    out = parts["codes"].shape[0]
    groups = parts["sq"].shape[1]
    words = []
    for tile in range(out // 16):
        for group in range(groups):
            ss, sz, zs, zz = (int(x) for x in parts["stats"][tile, group].view(np.uint16))
            second = ss | zs << 16 | sz << 32 | zz << 48
            for r in range(16):
                row = tile * 16 + r
                word = int(parts["sq"][row, group]) | int(parts["zq"][row, group]) << 3
                for j, code in enumerate(parts["codes"][row, group * 16 : group * 16 + 16]):
                    word |= int(code) << (6 + 3 * j)
                words.append(word | (second >> (8 * (r // 2)) & 0xFF) << 54)
    entries = [
        [
            int(parts["outliers"][row, c : c + 1].view(np.uint16)[0]) << 16 | int(c)
            for c in np.nonzero(parts["outliers"][row])[0]
        ]
        for row in range(out)
    ]
    offsets, stream = [0], []
    if tiled:
        for tile in range(out // 16):
            rows = entries[16 * tile : 16 * tile + 16]
            for k in range(max(len(row) for row in rows)):
                stream += [row[k] if k < len(row) else 0 for row in rows]
            offsets.append(len(stream))
    else:
        for row_entries in entries:
            stream += row_entries
            offsets.append(len(stream))
    perm = parts["perm"].astype(np.uint16) if permuted else np.zeros(0, np.uint16)
    return {
        "dense_weights": np.array(words, np.uint64).view(np.int64),
        "row_offsets": np.array(offsets, np.int32),
        "col_vals": np.array(stream, np.uint32).view(np.int32) if stream else np.zeros(0, np.float32),
        "in_perm": np.ascontiguousarray(perm).view(np.int32),
    }


def meant(parts: dict[str, np.ndarray], permuted: bool, dtype: type = H) -> np.ndarray:
    """The reference's arithmetic: every operation in fp16, the outlier added in fp32 and rounded; or all in float64."""
    stats = parts["stats"].repeat(16, 0).astype(dtype)
    s = stats[..., 0] * (parts["sq"].astype(dtype) - stats[..., 1])
    z = stats[..., 2] * (parts["zq"].astype(dtype) - stats[..., 3])
    inn = parts["codes"].shape[1]
    s, z = s.repeat(16, 1)[:, :inn], z.repeat(16, 1)[:, :inn]
    dense = s * (parts["codes"].astype(dtype) - z)
    stored = (dense.astype(np.float64) + parts["outliers"]).astype(dtype)
    if not permuted:
        return stored
    result = np.empty_like(stored)
    result[:, parts["perm"]] = stored
    return result


def folder_of(path: Path, tensors: dict[str, np.ndarray], hidden: int = 48, **section) -> Path:
    path.mkdir(exist_ok=True)
    others = {"model.embed_tokens.weight": np.ones((8, hidden), H), "model.norm.weight": np.ones(hidden, H)}
    save_file({**{f"{NAME}.{k}": v for k, v in tensors.items()}, **others}, path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 80, "architectures": [], "torch_dtype": None}
    config["quantization_config"] = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, **section}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_and_read(matrix: SpqrMatrix, folder: Path) -> np.ndarray:
    """Through a checkpoint on disk, which is valid."""
    with CheckpointWriter(folder, config={"model_type": "llama"}) as writer:
        writer.add_matrix(NAME, matrix)
        writer.finish()
    report = validate(folder, deep=True)
    assert not report.findings, report.findings[:3]
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.matrix(NAME).dequantize()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("out", "inn"), [(48, 48), (80, 48), (48, 80), (48, 40)])
def test_codes_and_weights(tmp_path: Path, tiled: bool, permuted: bool, out: int, inn: int) -> None:
    parts = random_parts(out, inn, seed=out + inn + tiled)
    source = open_source(folder_of(tmp_path / "x", pack(parts, tiled, permuted), inn))
    assert isinstance(source, SpqrHfSource)
    entry = source.entries[f"{NAME}.weight"]
    assert (entry.shape, entry.dtype) == ((out, inn), torch.float16)
    assert entry.end - entry.begin > out * inn * 3 // 8
    assert set(source.entries) == {f"{NAME}.weight", "model.embed_tokens.weight", "model.norm.weight"}
    np.testing.assert_array_equal(source.load(f"{NAME}.weight").numpy(), meant(parts, permuted))

    matrix = source.matrix(f"{NAME}.weight")
    assert matrix is not None
    np.testing.assert_array_equal(matrix.codes, parts["codes"])
    np.testing.assert_array_equal(matrix.scale_codes, parts["sq"])
    np.testing.assert_array_equal(matrix.zero_codes, parts["zq"])
    np.testing.assert_array_equal(matrix.tile_stats, parts["stats"])
    assert (matrix.perm is not None) == permuted
    decoded = write_and_read(matrix, tmp_path / "out")
    np.testing.assert_allclose(decoded, meant(parts, permuted, np.float64), atol=1e-6)  # exact up to fp32
    assert source.matrix("model.norm.weight") is None
    assert "quantization_config" not in source.config
    assert source.config["torch_dtype"] == "float16"


def test_without_outliers_and_with_the_identity(tmp_path: Path) -> None:
    parts = random_parts(48, 48, share=0)
    parts["perm"] = np.arange(48)
    matrix = open_source(folder_of(tmp_path / "x", pack(parts, False, True))).matrix(f"{NAME}.weight")
    assert matrix is not None
    assert matrix.perm is None
    assert matrix.values is None


@pytest.mark.parametrize("folder", ["spqr_hf_csr_act_order", "spqr_hf_no_outliers"])
def test_files_of_the_reference(shared: Path, tmp_path: Path, folder: str) -> None:
    """Bit for bit what SpQR's own QuantizedLinear.dequantize() returns."""
    source = open_source(shared / "checkpoints" / folder)
    expected = load_file(shared / "checkpoints" / folder / "expected.safetensors")
    assert len(source.modules) == 14
    for name, weight in expected.items():
        np.testing.assert_array_equal(source.load(name).float().numpy(), weight)
        matrix = source.matrix(name)
        assert matrix is not None
        decoded = matrix.dequantize()
        # The reference rounds each of six operations to fp16; z is up to 8 and s about 0.01.
        assert np.abs(decoded - weight).max() < 1e-3 * np.abs(weight).max()
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "out"), decoded)


def broken(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    def with_(**changes):
        return {k: v for k, v in {**tensors, **changes}.items() if v is not None}

    def at(leaf, place, value):
        changed = tensors[leaf].copy()
        changed[place] = value
        return with_(**{leaf: changed})

    n = tensors["col_vals"].size
    return {
        "offsets missing": with_(row_offsets=None),
        "perm missing": with_(in_perm=None),
        "outliers missing": with_(col_vals=None),
        "words of int32": with_(dense_weights=tensors["dense_weights"].astype(np.int32)),
        "words of rank 2": with_(dense_weights=tensors["dense_weights"].reshape(-1, 16)),
        "words cut": with_(dense_weights=tensors["dense_weights"][:-16]),
        "no words": with_(dense_weights=tensors["dense_weights"][:0]),
        "offsets cut": with_(row_offsets=tensors["row_offsets"][:-1]),
        "offsets of int64": with_(row_offsets=tensors["row_offsets"].astype(np.int64)),
        "no offsets": with_(row_offsets=tensors["row_offsets"][:0]),
        "offsets fall": at("row_offsets", 5, n),
        "offsets end high": at("row_offsets", -1, n + 1),
        "offsets start high": at("row_offsets", 0, 1),
        "column out of range": at("col_vals", 0, 0x3C000030),
        "column 65535": at("col_vals", 0, 0x3C00FFFF),
        "outlier NaN": at("col_vals", 0, 0x7E000000),
        "outliers of float32": with_(col_vals=tensors["col_vals"].view(np.float32)),
        "two outliers in a place": with_(col_vals=np.full_like(tensors["col_vals"], 0x3C000000)),
        "perm doubles": at("in_perm", 0, tensors["in_perm"][1]),
        "perm out of range": at("in_perm", 0, 0x00300000),
        "perm short": with_(in_perm=tensors["in_perm"][:-8]),
        "bit 63": at("dense_weights", 3, -1),
        "statistic NaN": at("dense_weights", slice(0, 16), 0xFF << 54),
        "pair of rows disagrees": at("dense_weights", 0, tensors["dense_weights"][0] ^ 1 << 54),
    }


CASES = list(broken(pack(random_parts(48, 48), False, True)))


@pytest.mark.parametrize("case", CASES)
def test_hostile(tmp_path: Path, case: str, bounded) -> None:
    folder = folder_of(tmp_path / "x", broken(pack(random_parts(48, 48), False, True))[case])
    with bounded():
        for action in ("load", "matrix"):
            with pytest.raises(SpqrError) as caught:
                getattr(open_source(folder), action)(f"{NAME}.weight")
            assert caught.value.code == "E501"
            assert NAME in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_cut_files(tmp_path: Path, keep: int) -> None:
    folder = folder_of(tmp_path / "x", pack(random_parts(48, 48), False, True))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SpqrError, match=r"model\.safetensors") as caught:
        open_source(folder)
    assert caught.value.code == "E501"


@pytest.mark.parametrize("section", [{"bits": 4}, {"beta1": 32}, {"beta2": 8}, {"bits": "3"}])
def test_other_geometries_are_refused(tmp_path: Path, section: dict) -> None:
    folder = folder_of(tmp_path / "x", pack(random_parts(48, 48), False, True), **section)
    with pytest.raises(SpqrError, match=next(iter(section))) as caught:
        open_source(folder)
    assert caught.value.code == "E501"

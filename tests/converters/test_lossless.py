"""Codes of other tools carried over bit for bit, from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from spqr_converters import Calibration, SolverOptions, convert, predict
from spqr_converters.lossless import compare, rows_of
from spqr_converters.sources import GptqSource, open_source
from spqr_format.cli import main
from spqr_format.errors import SpqrError
from spqr_format.journal import Journal
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

QUICK = SolverOptions(rounds=1, sweeps=1)


def assert_exact(folder: Path, out: Path) -> None:
    """Every module of the output, read back from its file, is the source's weight; every other tensor is the same."""
    assert not validate(out, deep=True).findings
    source, checkpoint = open_source(folder), Checkpoint.open(out)
    for tensor in source.entries:
        module = tensor.removesuffix(".weight")
        loaded = source.load(tensor)
        if module in checkpoint.modules and tensor != module:
            carried = torch.from_numpy(checkpoint.matrix(module).dequantize())
            assert torch.equal(carried.to(loaded.dtype), loaded), tensor
            matrix = source.matrix(tensor)
            assert matrix is not None
            assert np.array_equal(checkpoint.matrix(module).codes, matrix.codes)
        elif tensor in checkpoint.place:
            assert checkpoint.info(tensor).shape == tuple(loaded.shape)


@pytest.mark.parametrize(("bits", "group", "act"), [(4, 16, False), (4, 16, True), (3, 32, True), (2, -1, False)])
def test_codes_are_carried_over(gptq_llama, tmp_path: Path, monkeypatch, bits: int, group: int, act: bool) -> None:
    monkeypatch.delattr(Journal, "shard_written")  # all comes as expected: no spool is copied
    folder = gptq_llama(bits=bits, group=group, act=act, dense="k_proj")
    if bits == 3:
        folder = gptq_llama(bits=bits, group=group, act=act, dense="k_proj", hidden=96, mlp=96)
    predicted = predict(folder, lossless=True)
    report = convert(folder, tmp_path / "out", lossless=True, max_shard_bytes=30_000)
    assert_exact(folder, tmp_path / "out")
    assert len(report.modules) == predicted.modules == 12
    assert all(module.weight_error == 0 and module.different == 0 for module in report.modules)
    assert all(module.method == "lossless" and module.weight_bits == bits for module in report.modules)
    assert sum(module.rounded or 0 for module in report.modules) > 0
    assert report.bits == predicted.bits
    assert (report.quantised_bytes, report.dense_bytes) == (predicted.quantised_bytes, predicted.dense_bytes)
    assert report.totals()["dense_parameters_by_reason"].keys() == {
        "embedding", "lm_head", "stored dense by the source", "vector",
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "spqr_report.json").read_text())
    assert (written["source"], written["mode"], written["source_error"]) == ("GPTQ", "lossless", "unknown")
    assert any("read as v1" in note for note in written["notes"])
    assert any("rounds" in note for note in written["notes"])
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["provenance"]["mode"] == section["provenance"]["method"] == "lossless"
    assert section["provenance"]["source_kind"] == "GPTQ"
    assert section["provenance"]["notes"] == written["notes"]
    assert section["provenance"]["solver"] is None
    assert (section["weight_bits"], section["statistics"]) == (bits, "direct")
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_transformers_loads_it(gptq_llama, tmp_path: Path) -> None:
    """With a quantized output embedding and act-order; the logits are those of the source's dense weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import spqr_loaders  # noqa: F401

    folder = gptq_llama(act=True, lm_head=True, bias=0.0)
    report = convert(folder, tmp_path / "out", lossless=True)
    assert len(report.modules) == 15
    assert any("14 biases" in note for note in report.notes)
    source = open_source(folder)
    state = {name: source.load(name).float() for name in source.entries if not name.endswith("_proj.bias")}
    dense = LlamaForCausalLM(LlamaConfig.from_dict(source.config)).float().eval()
    dense.load_state_dict(state)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits, dense(tokens).logits
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()


def test_requantizing_is_named_so(gptq_llama, tmp_path: Path) -> None:
    folder = gptq_llama(eight="layers.1.mlp.down_proj")
    report = convert(folder, tmp_path / "out", solver=QUICK)
    assert not validate(tmp_path / "out", deep=True).findings
    assert report.mode == "requantized"
    assert all(0 < module.weight_error < 0.5 and module.method == "data-free" for module in report.modules)
    assert any("its own error is unknown" in note for note in report.notes)
    with pytest.raises(SpqrError, match=r"E510 model.layers.1.mlp.down_proj.*8 bits.*without --lossless"):
        convert(folder, tmp_path / "lossless", lossless=True)
    assert not (tmp_path / "lossless").exists()
    with pytest.raises(SpqrError, match="E510"):
        predict(folder, lossless=True)


def test_an_output_embedding_of_8_bits_stays_dense(gptq_llama, tmp_path: Path) -> None:
    folder = gptq_llama(lm_head=True, eight="lm_head")
    report = convert(folder, tmp_path / "out", lossless=True)
    assert report.dense["lm_head.weight"]["reason"].startswith("lm_head, dequantized: codes of 8 bits")
    assert_exact(folder, tmp_path / "out")


def test_a_source_without_codes(random_llama, tmp_path: Path) -> None:
    folder = random_llama()
    with pytest.raises(SpqrError, match=r"E510.*no codes.*without --lossless"):
        convert(folder, tmp_path / "out", lossless=True)
    assert not (tmp_path / "out").exists()
    report = convert(folder, tmp_path / "out", solver=QUICK)
    assert (report.mode, report.source, report.notes) == ("quantized", "dense safetensors", [])


def test_options_that_do_not_fit(gptq_llama, tmp_path: Path, calibration_text: Path) -> None:
    folder = gptq_llama()
    for options in ({"calibration": Calibration(text=calibration_text)}, {"outlier_share": 0.1}, {"outlier_threshold": 0.1}):
        for call in (
            lambda o: convert(folder, tmp_path / "out", lossless=True, **o),
            lambda o: predict(folder, lossless=True, **o),
        ):
            with pytest.raises(SpqrError, match="E505"):
                call(options)
    assert not (tmp_path / "out").exists()


def test_biases_that_the_model_lacks(gptq_llama, tmp_path: Path) -> None:
    with pytest.raises(SpqrError, match=r"E501.*bias.*LlamaForCausalLM has none"):
        convert(gptq_llama(bias=0.5), tmp_path / "out", lossless=True)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_source_object(gptq_llama, tmp_path: Path) -> None:
    report = convert(GptqSource(gptq_llama(), zeros="v2"), tmp_path / "out", lossless=True)
    assert "zero points read as v2, as asked" in report.notes


def test_the_same_bytes_twice(gptq_llama, tmp_path: Path) -> None:
    folder = gptq_llama(act=True)
    for name in ("a", "b"):
        convert(folder, tmp_path / name, lossless=True)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


# The comparison


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
@pytest.mark.parametrize("permuted", [False, True])
def test_rows_of_a_matrix(random_matrix, statistics: str, permuted: bool) -> None:
    matrix = random_matrix(75, 64, statistics=statistics, permuted=permuted, outliers=0.05)
    whole = matrix.dequantize()
    for begin, end in ((0, 16), (16, 64), (64, 75), (0, 75)):
        assert np.array_equal(rows_of(matrix, begin, end).dequantize(), whole[begin:end])


def test_a_wrong_code_is_found(random_matrix, monkeypatch) -> None:
    monkeypatch.setattr("spqr_converters.lossless._CHUNK", 1024)
    matrix = random_matrix(80, 64, statistics="direct", outliers=0)
    weight = torch.from_numpy(matrix.dequantize())
    assert compare(matrix, weight, "x") == {"weight_error": 0.0, "rounded": 0, "different": 0, "rounding_error": 0.0}
    figures = compare(matrix, weight.half(), "x")
    assert figures["weight_error"] == figures["different"] == 0
    assert figures["rounded"] == int((weight.half().float() != weight).sum())
    assert figures["rounding_error"] == pytest.approx(float((weight.half().float() - weight).norm() / weight.norm()), rel=1e-3)
    near = weight.clone()
    near[70, 3] += 1e-6
    figures = compare(matrix, near, "x")
    assert figures["different"] == 1
    assert 0 < figures["weight_error"] < 1e-5
    matrix.codes[70, 3] ^= 4
    with pytest.raises(SpqrError, match=r"E510.*differ"):
        compare(matrix, weight, "x")


# Other tools' files, and the command


def folders() -> list[str]:
    root = Path(__file__).parents[2].parent / "shared" / "checkpoints"
    names = {path.name for kind in ("*gptq*", "awq_*", "autoround_*") for path in root.glob(kind) if path.is_dir()}
    return sorted(names) or ["none"]


@pytest.mark.parametrize("name", folders())
def test_other_tools_checkpoints(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip("no checkpoints of other tools")
    if name in ("gptq_v1_dynamic", "gptq_v1_8bit_g128", "autogptq_8bit_gm1_fp32scales"):
        with pytest.raises(SpqrError, match=r"E510.*without --lossless"):
            convert(folder, tmp_path / "out", lossless=True)
        assert convert(folder, tmp_path / "out", solver=QUICK).mode == "requantized"
        return
    report = convert(folder, tmp_path / "out", lossless=True)
    assert report.mode == "lossless"
    assert not validate(tmp_path / "out", deep=True).findings
    checkpoint = Checkpoint.open(tmp_path / "out")
    for tensor, weight in load_file(folder / "expected.safetensors").items():
        module = tensor.removesuffix(".weight")
        if module in checkpoint.modules:
            carried = torch.from_numpy(checkpoint.matrix(module).dequantize()).half().float()
            assert torch.equal(carried, weight.float()), tensor


def test_the_command(gptq_llama, tmp_path: Path) -> None:
    folder = gptq_llama()
    run = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out"), "--lossless", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "source: GPTQ, lossless" in run.output
    assert "note: zero points read as v1" in run.output
    assert "weight error: 0 in all 14 modules" in run.output
    run = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "b"), "--lossless", "-b", "3"])
    assert run.exit_code == 2
    assert "--weight-bits" in run.output
    run = CliRunner().invoke(
        main, ["convert", str(folder), str(tmp_path / "b"), "--lossless", "--gptq-zeros", "v2", "--dry-run"]
    )
    assert run.exit_code == 0, run.output
    assert not (tmp_path / "b").exists()


def test_the_tolerance_is_the_precision_of_the_source(random_matrix) -> None:
    """A tool that rounds every operation to bf16 differs by 4e-3 and is carried; the same distance in fp16 is an error."""
    matrix = random_matrix(32, 64)
    weights = torch.from_numpy(matrix.dequantize())
    off = weights * (1 + 4e-3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    assert 0 < compare(matrix, off.bfloat16(), "w")["weight_error"] < 8e-3
    with pytest.raises(SpqrError, match="E510"):
        compare(matrix, off.half(), "w")

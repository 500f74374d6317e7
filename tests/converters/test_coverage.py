"""What stays dense: as asked, and never much of a model without anyone asking."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert, predict
from spqr_converters.sources import open_source
from spqr_format.cli import main
from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

QUICK = SolverOptions(rounds=1, sweeps=0)


def with_tower(folder: Path, parameters: int) -> Path:
    """Two more matrices that the model does not know, of so many parameters in all."""
    tensors = load_file(folder / "model.safetensors")
    for number in range(2):
        tensors[f"visual.blocks.{number}.fc.weight"] = torch.ones(8, parameters // 16).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("mode", [{"solver": QUICK}, {"lossless": True}])
def test_more_than_a_twentieth_dense_is_an_error(random_llama, gptq_llama, tmp_path, mode) -> None:
    make = gptq_llama if "lossless" in mode else random_llama
    linear = 2 * (4 * 48 * 48 + 3 * 48 * 96)
    model = {"hidden": 48, "mlp": 96}
    convert(with_tower(make(**model), linear * 5 // 100), tmp_path / "under", **mode)
    source = with_tower(make(**model), linear * 6 // 100)
    with pytest.raises(SpqrError) as caught:
        convert(source, tmp_path / "over", **mode)
    assert caught.value.code == "E513"
    assert "5.6 %" in caught.value.what or "5.7 %" in caught.value.what
    assert "visual.blocks.0.fc (not a parameter of the model)" in caught.value.what
    assert "--keep-dense 'visual.blocks.*'" in caught.value.what
    assert not (tmp_path / "over").exists()
    with pytest.raises(SpqrError, match="SPQR-E513"):
        predict(source, **mode)
    report = convert(source, tmp_path / "asked", keep=["visual.blocks.*"], **mode)
    assert validate(tmp_path / "asked", deep=True).ok
    assert report.totals()["dense_parameters_by_reason"]["asked for"] == linear * 6 // 100 // 16 * 16
    entries = open_source(source).entries
    assert sum(entry.numel for entry in entries.values()) == report.quantised_parameters + report.dense_parameters


@pytest.mark.parametrize("calibrated", [False, True])
def test_modules_stay_dense_when_asked(random_llama, tmp_path, monkeypatch, calibration_text, calibrated) -> None:
    """Whole sets of layers with one input, and one of a set; the rest is quantized, and the dense ones are the source's."""
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: lambda text, **_: {"input_ids": [ord(c) % 300 for c in text]})
    source = random_llama()
    data = Calibration(calibration_text, tokens=256, seqlen=64) if calibrated else None
    keep = ["*.down_proj", "model.layers.0.self_attn.q_proj"]
    report = convert(source, tmp_path / "out", keep=keep, calibration=data, solver=QUICK)
    assert validate(tmp_path / "out", deep=True).ok
    kept = {name for name, row in report.dense.items() if row["reason"] == "asked for"}
    assert kept == {"model.layers.0.self_attn.q_proj.weight", *(f"model.layers.{k}.mlp.down_proj.weight" for k in range(2))}
    assert len(report.modules) == 14 - 3
    checkpoint, origin = Checkpoint.open(tmp_path / "out"), open_source(source)
    for name in kept:
        np.testing.assert_array_equal(checkpoint.read(name), origin.load(name).numpy())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["provenance"]["keep_dense"] == keep
    assert predict(source, keep=keep).modules == 11


def test_patterns_that_make_no_sense(random_llama, tmp_path) -> None:
    source = random_llama()
    with pytest.raises(SpqrError, match=r"SPQR-E505 keep_dense: 'model\.layer\.\*' matches no module"):
        convert(source, tmp_path / "out", keep=["model.layer.*"])
    with pytest.raises(SpqrError, match="SPQR-E504"):
        convert(source, tmp_path / "out", keep=["*_proj"])


def test_the_command_takes_patterns(random_llama, tmp_path) -> None:
    arguments = ["convert", str(random_llama()), str(tmp_path / "out"), "--device", "cpu", "--keep-dense", "*.q_proj"]
    done = CliRunner().invoke(main, [*arguments, "--keep-dense", "*.k_proj"])
    assert done.exit_code == 0, done.output
    assert "left dense: 9,216 parameters, asked for" in done.output

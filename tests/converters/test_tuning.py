"""Tuning of continuous numbers: the decode with gradients, and a whole checkpoint from folder to folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spqr_converters import Calibration, SolverOptions, TuningOptions, convert, tune
from spqr_converters.evaluation import evaluate, read_text, windows_of
from spqr_converters.student import TunableVector
from spqr_converters.tunable import TunableMatrix
from spqr_format import SpqrMatrix
from spqr_format.errors import SpqrError
from spqr_format.reader import Checkpoint
from spqr_format.validate import validate

CPU = torch.device("cpu")
SHAPES = [
    {"out_features": 32, "in_features": 48},
    {"out_features": 21, "in_features": 40, "permuted": True},  # a torn tile, a torn group
    {"out_features": 32, "in_features": 48, "statistics": "direct", "outliers": 0.0},
    {"out_features": 16, "in_features": 64, "group_size": 32, "weight_bits": 4, "outliers": 0.1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decode_is_bit_for_bit_that_of_the_format(random_matrix, shape) -> None:
    matrix = random_matrix(**shape)
    tunable = TunableMatrix(matrix, CPU)
    np.testing.assert_array_equal(tunable().detach().numpy(), matrix.dequantize())
    with torch.no_grad():
        for parameter in tunable.parameters():
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    moved = tunable.matrix()
    assert not np.array_equal(moved.dequantize(), matrix.dequantize())
    np.testing.assert_array_equal(tunable().detach().numpy(), moved.dequantize())
    assert moved.layout == matrix.layout
    for frozen in ("codes", "scale_codes", "zero_codes", "group_zeros", "crow_indices", "col_indices", "perm"):
        np.testing.assert_array_equal(getattr(moved, frozen), getattr(matrix, frozen))


def decoded(matrix: SpqrMatrix, numbers: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """W in float64 with other statistics and outliers, weight by weight from spec 3."""
    layout = matrix.layout
    found = np.zeros((layout.out_features, layout.in_features))
    for i in range(layout.out_features):
        for j in range(layout.in_features):
            g = j // layout.group_size
            if layout.statistics == "bilevel":
                ss, sz, zs, zz = numbers[i // 16, g]
                scale, zero = ss * (matrix.scale_codes[i, g] - sz), zs * (matrix.zero_codes[i, g] - zz)
            else:
                scale, zero = numbers[i, g], matrix.group_zeros[i, g]
            found[i, j if matrix.perm is None else matrix.perm[j]] = scale * (float(matrix.codes[i, j]) - zero)
    if values is not None:
        for i in range(layout.out_features):
            for k in range(matrix.crow_indices[i], matrix.crow_indices[i + 1]):
                found[i, matrix.col_indices[k]] += values[k]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula(random_matrix, shape) -> None:
    matrix = random_matrix(**shape)
    weights = np.random.default_rng(2).normal(size=(matrix.layout.out_features, matrix.layout.in_features))
    tunable = TunableMatrix(matrix, CPU)
    (tunable() * torch.from_numpy(weights).float()).sum().backward()
    stored = matrix.tile_stats if matrix.layout.statistics == "bilevel" else matrix.group_scales
    numbers = stored.astype(np.float64)
    values = None if matrix.values is None else matrix.values.astype(np.float64)

    def slope(array: np.ndarray, at: tuple[int, ...]) -> float:
        step, old = 1e-4, array[at]
        array[at] = old + step
        up = (decoded(matrix, numbers, values) * weights).sum()
        array[at] = old - step
        down = (decoded(matrix, numbers, values) * weights).sum()
        array[at] = old
        return (up - down) / (2 * step)

    unit = tunable.unit.numpy()
    last = tuple(size - 1 for size in numbers.shape[:2])
    for at in [(0, 0), last]:
        for k in range(4) if numbers.ndim == 3 else [None]:
            place = at if k is None else (*at, k)
            assert tunable.statistics.grad[place] == pytest.approx(slope(numbers, place) * unit[place], rel=1e-3, abs=1e-4)
    if values is not None:
        expected = slope(values, (0,)) * float(tunable.values_unit)
        assert tunable.values.grad[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_vector_stays_as_it_is_until_it_learns(dtype) -> None:
    stored = torch.linspace(-1, 2, 7).to(dtype)
    vector = TunableVector(stored, CPU)
    assert torch.equal(vector.tensor(), stored)
    with torch.no_grad():
        vector.offset.fill_(0.1)
    expected = (stored.float() + 0.1 * stored.float().abs().mean()).to(dtype)
    assert torch.equal(vector.tensor(), expected)
    assert torch.equal(vector(), expected.float())


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    """The bundled model, roughly quantized: there is much to gain."""
    folder = tmp_path_factory.mktemp("tuning") / "quantized"
    convert(tiny_llama, folder, outlier_share=0.002, device="cpu", solver=SolverOptions(rounds=1))
    return folder


DATA = Path(__file__).parents[1] / "data"
TEXT = Calibration(DATA / "calibration.txt", tokens=2048, seqlen=128)
SHORT = TuningOptions(epochs=2, learning_rate=1e-3, batch=2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def tuned(quantized, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "tuned"
    return folder, tune(quantized, tiny_llama, folder, TEXT, SHORT, device="cpu")


def test_a_tuned_checkpoint_is_nearer_to_the_original(quantized, tiny_llama, tuned) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, report = tuned
    assert not validate(folder, deep=True).findings
    assert report.after < report.before
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    windows = windows_of(read_text(DATA / "wikitext2_test.txt"), AutoTokenizer.from_pretrained(tiny_llama), 128, 8192)

    def kl(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        with Checkpoint.open(path) as checkpoint, torch.no_grad():
            for module in checkpoint.modules:
                model.get_submodule(module).weight.copy_(torch.from_numpy(checkpoint.matrix(module).dequantize()))
            dense = load_file(path / "model.safetensors")
            for name in checkpoint.dense:
                model.get_parameter(name).copy_(dense[name])
        return evaluate(model, windows, reference=original, batch=8).kl.mean

    assert kl(folder) < 0.98 * kl(quantized)  # on a text of another kind


def moved_kinds(old: Path, new: Path) -> set[str]:
    """The leaves, or "norm", of the tensors that differ; all others are there and equal, and so are the layouts."""
    with Checkpoint.open(old) as before, Checkpoint.open(new) as after:
        assert before.modules == after.modules
        assert before.place.keys() == after.place.keys()
        names = [name for name in before.place if not np.array_equal(before.read(name), after.read(name))]
        for name in names:
            if name.endswith(".outliers"):  # their low halves are positions
                np.testing.assert_array_equal(before.read(name) & 0xFFFF, after.read(name) & 0xFFFF)
    return {"norm" if "norm" in name else name.rpartition(".")[2] for name in names}


def test_only_continuous_numbers_change(quantized, tuned) -> None:
    assert moved_kinds(quantized, tuned[0]) == {"tile_stats", "outliers", "norm"}


def test_the_report_and_the_provenance_say_what_was_done(quantized, tiny_llama, tuned) -> None:
    folder, report = tuned
    section = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    old = json.loads((quantized / "config.json").read_bytes())["quantization_config"]
    (made,) = section["provenance"].pop("tuning")
    assert section == old
    assert (made["kl_before"], made["kl_after"]) == (report.before, report.after)
    assert made["options"] == dataclasses.asdict(SHORT)
    weights = load_file(tiny_llama / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        for row in json.loads((folder / "spqr_report.json").read_bytes())["modules"]:
            weight = weights[row["name"] + ".weight"].double().numpy()
            error = np.linalg.norm(checkpoint.matrix(row["name"]).dequantize() - weight) / np.linalg.norm(weight)
            assert row["weight_error"] == pytest.approx(error, rel=1e-4)
    assert f"{report.after:.5f} after" in (folder / "README.md").read_text()


def test_what_does_not_help_is_not_kept(quantized, tiny_llama, tmp_path: Path) -> None:
    wild = TuningOptions(epochs=1, learning_rate=0.3, batch=2)
    report = tune(quantized, tiny_llama, tmp_path / "out", TEXT, wild, device="cpu")
    assert report.epochs[0]["held_out"] > report.before == report.after
    assert report.best == 0
    assert moved_kinds(quantized, tmp_path / "out") == set()


def test_a_killed_run_goes_on_to_the_same_bytes(quantized, tiny_llama, tuned, tmp_path: Path) -> None:
    def die(what: str, step: int, steps: int) -> None:
        if what == "epoch 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(quantized, tiny_llama, tmp_path / "out", TEXT, SHORT, device="cpu", progress=die)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tuning.spqr-partial"]
    with pytest.raises(SpqrError, match="E511"):
        tune(quantized, tiny_llama, tmp_path / "out", TEXT, dataclasses.replace(SHORT, epochs=3), device="cpu")
    steps: list[str] = []
    report = tune(
        quantized, tiny_llama, tmp_path / "out", TEXT, SHORT, device="cpu", progress=lambda what, *_: steps.append(what)
    )
    assert set(steps) == {"epoch 2"}
    assert report.epochs == tuned[1].epochs
    assert files_of(tmp_path / "out") == files_of(tuned[0])


@pytest.mark.parametrize(("learn", "moved"), [("matrices", {"tile_stats", "outliers"}), ("vectors", {"norm"})])
def test_only_what_is_asked_for_is_learnt(quantized, tiny_llama, tmp_path: Path, learn, moved) -> None:
    # bf16 holds three digits: with the usual rate these few steps would not leave a norm's rounding.
    options = TuningOptions(epochs=1, learning_rate=5e-3, batch=2, learn=learn)
    report = tune(quantized, tiny_llama, tmp_path / "out", TEXT, options, device="cpu")
    assert report.best == 1
    assert moved_kinds(quantized, tmp_path / "out") == moved


def test_another_model_is_refused(quantized, tiny_llama, random_llama, tmp_path: Path) -> None:
    source = random_llama()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    with pytest.raises(SpqrError, match="E508"):
        tune(quantized, source, tmp_path / "out", dataclasses.replace(TEXT, seqlen=32), SHORT, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_was_begun_is_not_thrown_away(quantized, tiny_llama, tmp_path: Path) -> None:
    (tmp_path / "journal.spqr-partial").write_text("{}")
    with pytest.raises(SpqrError, match="E511"):
        tune(quantized, tiny_llama, tmp_path, TEXT, SHORT, device="cpu")
    assert (tmp_path / "journal.spqr-partial").read_text() == "{}"


def test_too_few_windows_to_hold_one_out(tiny_llama) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(SpqrError, match="E507"):
        dataclasses.replace(TEXT, tokens=128).split(AutoTokenizer.from_pretrained(tiny_llama), 512, 0, 0.1)


def test_no_token_of_a_held_out_window_is_trained_on() -> None:
    class Numbers:
        """Every token of the text is another one."""

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(range(2000))}

    train, held_out, figures = TEXT.split(Numbers(), None, 0, 0.25)
    assert not set(train.flatten().tolist()) & set(held_out.flatten().tolist())
    assert 0 < len(train) < 12
    assert figures["train_tokens"] == train.numel()
    assert held_out.shape == (4, 128)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"batch": 0}, {"held_out": 0.0}, {"learn": "codes"}])
def test_options_out_of_range(wrong) -> None:
    with pytest.raises(SpqrError, match="E505"):
        TuningOptions(**wrong)

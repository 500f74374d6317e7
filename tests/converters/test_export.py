"""The way out, compared with plain numpy's dequantization and with what transformers, gguf-py and our own sources read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_converters.export import Output, dequantized, export, gptq_tensors, pack_words
from spqr_converters.sources import open_source
from spqr_format import SpqrMatrix
from spqr_format.cli import main
from spqr_format.errors import SpqrError
from spqr_format.writer import CheckpointWriter

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 6, 7, 8, 900, 33, 1200]])
TEXT = "The history of the town, in 1921,  began — <|endoftext|> with é and 漢字.\n\n\tIt's over."


class Made:
    def __init__(self, folder: Path, dense: dict[str, torch.Tensor], matrices: dict[str, SpqrMatrix]) -> None:
        self.folder, self.dense, self.matrices = folder, dense, matrices


def make(folder: Path, source: Path, random_matrix: Any, shards: int = 10**9, **how: Any) -> Made:
    """tiny-llama with random matrices in place of its linears, and their dense numbers by numpy."""
    state = load_file(source / "model.safetensors")
    dense, matrices = dict(state), {}
    config = json.loads((source / "config.json").read_text())
    with CheckpointWriter(folder, config=config, max_shard_bytes=shards) as writer:
        for number, (name, tensor) in enumerate(state.items()):
            module = name.removesuffix(".weight")
            if not name.endswith("_proj.weight"):
                writer.add_dense(name, tensor)
                continue
            matrix = random_matrix(*tensor.shape, seed=number, **how)
            writer.add_matrix(module, matrix)
            matrices[module] = matrix
            dense[name] = torch.from_numpy(matrix.dequantize())
        writer.finish()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    return Made(folder, dense, matrices)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama, random_matrix) -> Made:
    return make(tmp_path_factory.mktemp("export") / "spqr", tiny_llama, random_matrix, shards=1_500_000)


@pytest.fixture(scope="module")
def direct(tmp_path_factory, tiny_llama, random_matrix) -> Made:
    """What a lossless import leaves: direct statistics, an order of columns, no outliers."""

    def matrix(out: int, inn: int, seed: int) -> SpqrMatrix:
        found = random_matrix(out, inn, weight_bits=4, group_size=32, statistics="direct", outliers=0, permuted=True, seed=seed)
        found.group_zeros = np.minimum(found.group_zeros, 15)
        return found

    return make(tmp_path_factory.mktemp("export") / "direct", tiny_llama, matrix)


@pytest.fixture(scope="module")
def oracle(made, tiny_llama) -> torch.Tensor:
    """Logits of the float32 model with numpy's weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in made.dense.items()}, strict=False)
    return model(IDS).logits


def test_dense_float32_is_exact(made, oracle, tmp_path):
    report = export(made.folder, tmp_path / "out", to="safetensors", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == made.dense.keys()
    assert all(torch.equal(found[name], made.dense[name].float()) for name in found)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert torch.equal(model(IDS).logits, oracle)
    assert report.as_dict()["largest_rounding"] == 0
    assert report.parameters == sum(tensor.numel() for tensor in found.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT) == AutoTokenizer.from_pretrained(made.folder)(TEXT)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
@pytest.mark.parametrize("outliers", [0, 0.001, 0.2])
def test_pieces_of_rows_are_the_whole(statistics, outliers, random_matrix, monkeypatch):
    matrix = random_matrix(75, 70, statistics=statistics, outliers=outliers, permuted=outliers > 0)
    monkeypatch.setattr(sys.modules["spqr_converters.export"], "_PIECE", 32)
    np.testing.assert_array_equal(dequantized(matrix), matrix.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_halves_are_rounded_once(made, dtype, tmp_path):
    report = export(made.folder, tmp_path / "out", to="safetensors", dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], made.dense[name].to(getattr(torch, dtype))) for name in found)
    assert 0 < report.as_dict()["largest_rounding"] < (2**-9 if dtype == "bfloat16" else 2**-12)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_auto_keeps_the_models_dtype(made, tmp_path):
    assert export(made.folder, tmp_path / "out", to="safetensors").dtype == "bfloat16"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], made.dense[name].bfloat16()) for name in found)


def test_shards_hold_the_same_tensors(made, oracle, tmp_path):
    report = export(made.folder, tmp_path / "out", to="safetensors", dtype="float32", max_shard_bytes=5_000_000)
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) == 4
    assert all((tmp_path / "out" / name).stat().st_size < 5_100_000 for name in shards)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, oracle)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_reread_by_our_source_is_the_same(made, dtype, tmp_path):
    export(made.folder, tmp_path / "out", to="gguf", dtype=dtype)
    source = open_source(tmp_path / "out")
    assert source.entries.keys() == made.dense.keys()
    for name, tensor in made.dense.items():
        kind = getattr(torch, dtype) if tensor.dim() > 1 else torch.float32
        assert torch.equal(source.load(name), tensor.to(kind)), name
    ours = json.loads((made.folder / "config.json").read_text())
    for key, found in source.config.items():
        assert found == ours[key] or key == "dtype", key
    theirs, found = AutoTokenizer.from_pretrained(made.folder), AutoTokenizer.from_pretrained(source.companions())
    text = TEXT + (ROOT / "tests" / "data" / "wikitext2_test.txt").read_text()[:5000]
    assert found(text).input_ids == theirs(text).input_ids
    assert found.decode(found(TEXT).input_ids) == theirs.decode(theirs(TEXT).input_ids)
    assert (found.bos_token, found.eos_token, found.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)


def test_gguf_is_what_transformers_and_gguf_py_read(made, oracle, tmp_path):
    export(made.folder, tmp_path / "out", to="gguf", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-F32.gguf", dtype=torch.float32)
    assert torch.equal(model(IDS).logits, oracle)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-F32.gguf")
    assert len(reader.tensors) == len(made.dense)
    assert reader.fields["general.architecture"].contents() == "llama"


def test_gguf_q8_0_is_gguf_pys_rounding(made, tmp_path):
    report = export(made.folder, tmp_path / "out", to="gguf", dtype="q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    source = open_source(tmp_path / "out")
    for name, tensor in made.dense.items():
        expected = tensor.float()
        if tensor.dim() > 1 and tensor.shape[1] % 32:
            expected = tensor.half()  # 688 columns: no whole blocks
        elif tensor.dim() > 1:
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(expected.numpy(), kind), kind))
        assert torch.equal(source.load(name), expected), name
    assert 0 < max(report.rounding.values()) < 0.01


def test_gguf_with_a_sentencepiece_vocabulary_and_llama3_scaling(random_llama, random_matrix, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    source = random_llama(rope_parameters=scaling, head_dim=16, tied=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=296, special_tokens=special, show_progress=False, initial_alphabet=list("▁the"))
    tokenizer.train_from_iterator(["the then there at the earth"] * 4, trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    (source / "tokenizer.json").write_text(json.dumps(whole))
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        )
    )
    state = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    with CheckpointWriter(tmp_path / "spqr", config=config) as writer:
        for name, tensor in state.items():
            if name.endswith("_proj.weight"):
                writer.add_matrix(name.removesuffix(".weight"), random_matrix(*tensor.shape))
            else:
                writer.add_dense(name, tensor)
        writer.finish()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "spqr")
    export(tmp_path / "spqr", tmp_path / "out", to="gguf", dtype="float32")
    export(tmp_path / "spqr", tmp_path / "dense", to="safetensors", dtype="float32")
    found, dense = open_source(tmp_path / "out"), load_file(tmp_path / "dense" / "model.safetensors")
    assert found.config["rope_parameters"] == scaling
    assert all(torch.equal(found.load(name), tensor) for name, tensor in dense.items())
    ours, theirs = AutoTokenizer.from_pretrained(found.companions()), AutoTokenizer.from_pretrained(tmp_path / "spqr")
    for text in ("the then there", "earth, é 漢!", "the  the"):
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids


# GPTQ


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """[k, m] from [k * bits / 32, m]: bit i of each column's stream, in plain Python integers."""
    columns = []
    for column in words.view(np.uint32).T:
        stream = sum(int(word) << (32 * i) for i, word in enumerate(column))
        columns.append([stream >> (bits * i) & (2**bits - 1) for i in range(32 * len(column) // bits)])
    return np.array(columns).T


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_words_are_one_stream_of_bits(bits):
    rows = 96 if bits == 3 else 112
    codes = np.random.default_rng(0).integers(0, 2**bits, (rows, 5)).astype(np.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows * bits // 32, 5)
    np.testing.assert_array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_tensors_mean_the_same_weights(bits, random_matrix):
    matrix = random_matrix(64, 160, weight_bits=bits, group_size=64, statistics="direct", outliers=0, permuted=True)
    matrix.group_zeros = np.minimum(matrix.group_zeros, 2**bits - 1)
    found = gptq_tensors(matrix, "x")
    codes, zeros, groups = unpack(found["qweight"], bits), unpack(found["qzeros"].T, bits).T, found["g_idx"]
    weight = found["scales"].astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)
    np.testing.assert_array_equal(weight.T, matrix.dequantize())


def test_gptq_reread_by_our_source_is_the_same(direct, tmp_path):
    report = export(direct.folder, tmp_path / "out", to="gptq")
    source = open_source(tmp_path / "out")
    assert source.entries.keys() == direct.dense.keys()
    for module, matrix in direct.matrices.items():
        found = source.matrix(f"{module}.weight")
        assert found is not None
        np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["bits"] == 4
    assert section["desc_act"] is True
    assert section["checkpoint_format"] == "gptq_v2"
    assert report.notes


def test_gptq_has_no_place_for_bilevel(made, direct, random_matrix, tiny_llama, tmp_path):
    with pytest.raises(SpqrError, match="--to safetensors") as caught:
        export(made.folder, tmp_path / "out", to="gptq")
    assert caught.value.code == "E510"
    assert not (tmp_path / "out").exists()
    with_outliers = make(
        tmp_path / "o", tiny_llama, random_matrix, statistics="direct", weight_bits=4, group_size=32, outliers=0.001
    )
    with pytest.raises(SpqrError, match="outliers") as caught:
        export(with_outliers.folder, tmp_path / "out", to="gptq")
    assert caught.value.code == "E510"


# Requests that cannot be met, and runs that end early


def test_refusals(made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for arguments, code in (
        ({"destination": tmp_path / "full", "to": "safetensors"}, "E506"),
        ({"destination": tmp_path / "out", "to": "onnx"}, "E505"),
        ({"destination": tmp_path / "out", "to": "safetensors", "dtype": "q8_0"}, "E505"),
        ({"destination": tmp_path / "out", "to": "gptq", "dtype": "float16"}, "E505"),
    ):
        with pytest.raises(SpqrError) as caught:
            export(made.folder, **arguments)
        assert caught.value.code == code
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_a_value_too_large_for_float16_is_named(made, tiny_llama, random_matrix, tmp_path):
    state = load_file(tiny_llama / "model.safetensors")
    config = json.loads((tiny_llama / "config.json").read_text())
    with CheckpointWriter(tmp_path / "spqr", config=config) as writer:
        writer.add_matrix("model.layers.0.mlp.up_proj", random_matrix(688, 256))
        writer.add_dense("model.norm.weight", state["model.norm.weight"].float() * 1e6)
        writer.finish()
    with pytest.raises(SpqrError, match=r"model\.norm\.weight.*bfloat16") as caught:
        export(tmp_path / "spqr", tmp_path / "out", to="safetensors", dtype="float16")
    assert caught.value.code == "E505"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_a_failure_leaves_nothing(made, to, tmp_path):
    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made.folder, tmp_path / "out", to=to, progress=stop)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_nothing_that_loads(made, tmp_path):
    code = f"""
import os, signal
from spqr_converters.export import export
export({str(made.folder)!r}, {str(tmp_path / "out")!r}, to="safetensors", max_shard_bytes=2_000_000,
       progress=lambda name, done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left
    assert all(name.endswith(".spqr-partial") for name in left)
    export(made.folder, tmp_path / "out", to="safetensors")  # and does not stand in the way
    assert not list((tmp_path / "out").glob("*.spqr-partial"))


def test_the_command(made, tmp_path):
    arguments = ["export", str(made.folder), str(tmp_path / "out"), "--to", "gguf", "--dtype", "float16"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == ["model-F16.gguf"]
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "SPQR-E506" in again.output
    shown = CliRunner().invoke(main, ["export", str(made.folder), str(tmp_path / "dense")])
    assert shown.exit_code == 0
    assert "bfloat16" in shown.output


def test_two_writers_in_one_folder(made, tmp_path):
    """A second export, or a conversion, into a folder that an export is writing."""
    with Output(tmp_path / "out", []) as output:
        output.put("a", b"1")
        for other in (
            lambda: export(made.folder, tmp_path / "out", to="safetensors"),
            lambda: CheckpointWriter(tmp_path / "out", config={}),
        ):
            with pytest.raises(SpqrError, match="SPQR-E512"):
                other()
        output.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]

"""The command line as a user meets it: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from spqr_converters.presets import PRESETS
from spqr_format.cli import COMMANDS, generate_command, main
from spqr_format.cli.generate_command import speed

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "data" / "wikitext2_test.txt"
CALIBRATION = ROOT / "tests" / "data" / "calibration.txt"


def spqr(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_llama) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama-spqr"
    result = spqr(
        "convert",
        tiny_llama,
        folder,
        "--calibration",
        CALIBRATION,
        "--tokens",
        4096,
        "--outlier-share",
        "0.3%",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    result = spqr(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert command in (ROOT / "README.md").read_text()


def test_convert_reports_what_it_did(converted):
    report = json.loads((converted / "spqr_report.json").read_bytes())
    assert report["totals"]["modules"] == 28
    assert 3.6 < report["totals"]["bits_per_quantised_weight"] < 3.9
    assert report["totals"]["dense_parameters_by_reason"]
    provenance = json.loads((converted / "config.json").read_bytes())["quantization_config"]["provenance"]
    assert provenance["calibration"]["tokens"] == 4096
    assert str(ROOT) not in json.dumps(provenance)
    assert (converted / "tokenizer.json").is_file()


def test_the_model_card_says_what_the_file_is(converted):
    card = (converted / "README.md").read_text()
    report = json.loads((converted / "spqr_report.json").read_bytes())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "tiny-llama in SpQR format" in card
    assert "Mode: quantized" in card
    assert f"{report['totals']['bits_per_quantised_weight']:.3f} a quantized weight, 0.30 % outliers" in card
    assert "4096 tokens of calibration.txt" in card
    assert f"{max(module['weight_error'] for module in report['modules']):.4f}" in card
    assert str(ROOT) not in card


def test_convert_refuses_a_destination_that_is_not_empty(converted, tiny_llama):
    result = spqr("convert", tiny_llama, converted, "--device", "cpu")
    assert result.exit_code == 1
    assert "SPQR-E506" in result.output


def test_dry_run_predicts_and_writes_nothing(tmp_path, tiny_llama, converted):
    target = tmp_path / "none"
    result = spqr("convert", tiny_llama, target, "--dry-run", "--outlier-share", "0.3%", "--json")
    assert result.exit_code == 0, result.output
    assert not target.exists()
    predicted = json.loads(result.stdout)
    totals = json.loads((converted / "spqr_report.json").read_bytes())["totals"]
    assert predicted["bits"] == pytest.approx(totals["bits_per_quantised_weight"], rel=1e-3)


def test_dry_run_prints_the_plan_of_a_budget(tmp_path, tiny_llama):
    """One block of the model, each of its matrices with its own bits, in the bytes of the preset."""
    arguments = ["convert", tiny_llama, tmp_path / "none", "--dry-run", "--preset", "small", "--device", "cpu"]
    kept = [option for layer in "123" for option in ("--keep-dense", f"model.layers.{layer}.*")]
    predicted = json.loads(spqr(*arguments, *kept, "--json").stdout)
    assert predicted["bits"] == predicted["budget"]["planned_bits"]
    assert 0.995 * PRESETS["small"] < predicted["bits"] <= PRESETS["small"]
    assert len(predicted["budget"]["modules"]) == 7
    assert not (tmp_path / "none").exists()


def test_a_budget_and_uniform_bits_exclude_each_other(tmp_path, tiny_llama):
    for given in (("--preset", "small", "--weight-bits", 3), ("--preset", "small", "--bits-per-weight", 3.9)):
        result = spqr("convert", tiny_llama, tmp_path / "none", *given)
        assert result.exit_code == 2
        assert "choose one of the two" in result.output


def test_the_help_tells_the_budgets_of_the_presets():
    shown = " ".join(spqr("convert", "--help").output.split())
    assert "[near-lossless|balanced|small]" in shown
    assert list(PRESETS) == ["near-lossless", "balanced", "small"]
    assert "{}, {} or {} stored bits".format(*PRESETS.values()) in shown


def test_validate_says_valid(converted):
    result = spqr("validate", converted, "--deep")
    assert result.exit_code == 0
    assert result.output.startswith("valid: 28 quantized modules")
    report = json.loads(spqr("validate", converted, "--json").output)
    assert report["ok"] is True
    assert report["findings"] == []


def test_validate_names_the_broken_rule(converted, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    result = spqr("validate", broken)
    assert result.exit_code == 1
    assert "SPQR-E0" in result.output


def test_a_missing_path_is_wrong_usage(tmp_path):
    result = spqr("validate", tmp_path / "missing")
    assert result.exit_code == 2
    assert spqr("validate").exit_code == 2


def test_a_file_that_cannot_be_read_is_an_input_error(converted, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error", "model.safetensors")

    monkeypatch.setattr("spqr_format.validate.validate", fail)
    result = spqr("validate", converted)
    assert result.exit_code == 3
    assert "model.safetensors: Input/output error" in result.output


def test_a_reader_that_leaves_early_is_no_input_error(converted, monkeypatch):
    """`spqr inspect | head -1`: click ends such a command quietly, with its own exit code."""

    def leave(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("spqr_format.cli.inspect_command.print_json", leave)
    result = spqr("inspect", converted, "--json")
    assert result.exit_code == 1
    assert "Broken pipe" not in result.output


def test_inspect_counts_bits_from_the_bytes_on_disk(converted):
    summary = json.loads(spqr("inspect", converted, "--json").output)
    totals = summary["totals"]
    on_disk = (converted / "model.safetensors").stat().st_size
    header = int.from_bytes((converted / "model.safetensors").read_bytes()[:8], "little")
    assert totals["bytes"] + totals["dense_bytes"] + 8 + header == on_disk
    assert totals["bits"] == pytest.approx(8 * totals["bytes"] / totals["weights"])
    assert all(0 < m["weight_error"] < 0.5 for m in summary["modules"].values())
    shown = spqr("inspect", converted).output
    assert "model.layers.3.mlp.down_proj" in shown
    assert "256 x 688" in shown


def test_eval_measures_the_distance_to_the_original(converted, tiny_llama):
    arguments = ["eval", converted, TEXT, "--reference", tiny_llama, "--context", 128, "--tokens", 2048, "--device", "cpu"]
    figures = json.loads(spqr(*arguments, "--json").stdout)
    assert figures["tokens"] == 16 * 127
    assert 0.01 < figures["kl"]["mean"] < 0.5
    assert 0.5 < figures["top1"]["mean"] < 1
    assert figures["perplexity"]["mean"] > figures["reference_perplexity"]["mean"] * 0.95
    assert "KL to the original" in spqr(*arguments).output


def test_eval_of_the_original_against_itself_is_zero(tiny_llama):
    arguments = ["--reference", tiny_llama, "--context", 128, "--tokens", 512, "--device", "cpu", "--json"]
    figures = json.loads(spqr("eval", tiny_llama, TEXT, *arguments).stdout)
    assert figures["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert figures["top1"]["mean"] == 1


def test_eval_compares_models_beside_each_other(converted, tiny_llama, tmp_path):
    """What `eval` says of each alone; the bits are those of `inspect`, and of a model in another format there are none."""
    pytest.importorskip("matplotlib")
    common = [TEXT, "--reference", tiny_llama, "--context", 128, "--tokens", 1024, "--device", "cpu"]
    alone = json.loads(spqr("eval", converted, *common, "--json").stdout)
    figures = tmp_path / "bits.svg"
    arguments = ["eval", "--compare", converted, tiny_llama, *common, "--plot", figures]
    both = json.loads(spqr(*arguments, "--json").stdout)
    assert both["protocol"] == {"tokens": 8 * 127, "windows": 8, "context": 128, "stride": 128}
    ours, dense = both["models"]
    bits = json.loads(spqr("inspect", converted, "--json").output)["totals"]["bits"]
    assert ours == {"name": str(converted), "bits": pytest.approx(bits), **alone}
    assert dense["bits"] is None
    assert dense["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    drawn = figures.read_bytes()
    texts = [element.text for element in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert str(converted) in texts
    assert str(tiny_llama) not in texts
    shown = spqr(*arguments).output
    assert f"{bits:.3f}" in shown
    assert "stride 128" in shown
    assert figures.read_bytes() == drawn


def test_eval_of_several_models_needs_compare_and_an_original(converted, tiny_llama):
    for arguments in ([converted, tiny_llama, TEXT], ["--compare", converted, TEXT], [converted, TEXT, "--plot", "x.svg"]):
        result = spqr("eval", *arguments, "--device", "cpu")
        assert result.exit_code == 2
        assert "--reference" in result.output or "--compare" in result.output


def test_eval_refuses_models_of_two_tokenizers(converted, tiny_llama, tmp_path):
    """They would be compared at other words."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["Ġthe"], ids["Ġof"] = ids["Ġof"], ids["Ġthe"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    result = spqr("eval", converted, TEXT, "--reference", other, "--tokens", 1024, "--context", 128, "--device", "cpu")
    assert result.exit_code == 1
    assert "SPQR-E508" in result.output
    assert str(other) in result.output.replace("\n", "")


def test_eval_refuses_a_text_that_is_too_short(converted, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    result = spqr("eval", converted, short, "--device", "cpu")
    assert result.exit_code == 1
    assert "SPQR-E507" in result.output


def test_generate_continues_the_prompt(converted):
    result = spqr("generate", converted, "The old man", "--max-new-tokens", 8, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "The old man" in result.stdout
    assert len(result.stdout) > len("The old man") + 8
    assert re.search(r"the first token after .* s, then [\d.]+ tokens/s", result.stderr)


def test_generate_compiles_on_a_gpu_alone(converted):
    result = spqr("generate", converted, "The old man", "--compile", "--device", "cpu")
    assert result.exit_code == 2
    assert "--compile needs a GPU" in result.output
    result = spqr("generate", converted, "The old man", "--compile", "--eager", "--device", "cuda")
    assert result.exit_code == 2
    assert "--compile or --eager" in result.output


@pytest.mark.gpu
def test_generate_compiled(converted):
    arguments = ["generate", converted, "The old man", "--max-new-tokens", 24, "--device", "cuda"]
    eager, recorded, compiled = spqr(*arguments, "--eager"), spqr(*arguments), spqr(*arguments, "--compile")
    for result in (recorded, compiled):
        assert result.exit_code == 0, result.output
        assert "did not compile" not in result.stderr
        assert result.stdout[:20] == eager.stdout[:20]


def test_generate_says_what_to_do_where_a_step_cannot_be_recorded(monkeypatch):
    """On a GPU that is made up: torch's message is told, and --eager."""
    from spqr_loaders import RecordingError

    class Model:
        device = SimpleNamespace(type="cuda")

        def generate(self, **how):
            assert how["cache_implementation"] == "static"
            raise RecordingError("no graph") from RuntimeError("operation not permitted when stream is capturing")

    class Tokenizer:
        def __call__(self, prompt, return_tensors):
            return SimpleNamespace(to=lambda device: {})

    monkeypatch.setattr("spqr_format.cli.generate_command.load_model", lambda *_: Model())
    monkeypatch.setattr("spqr_format.cli.generate_command.load_tokenizer", lambda _: Tokenizer())
    result = spqr("generate", ".", "The old man")
    assert result.exit_code == 1
    assert "use --eager (operation not permitted when stream is capturing)" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("device", "begins", "said"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)])
def test_generate_says_what_a_gpu_waits_for(monkeypatch, capsys, device, begins, said):
    monkeypatch.setattr(generate_command, "_PATIENCE", 0.2)
    with generate_command._explained(device) as begun:
        if begins:
            begun()
        time.sleep(0.6)
    assert ("compiling kernels" in capsys.readouterr().err) == said


def test_the_speed_of_generate():
    assert speed([1.0, 1.5, 1.6, 1.9, 2.0]) == "the first token after 0.5 s, then 10.0 tokens/s (median)"
    assert speed([1.0, 1.5]) == "the first token after 0.5 s"
    assert speed([1.0]) == "no token"


def test_validate_starts_fast(converted):
    """Under half a second of a user's wait before the first byte is read; the best of three, for the machine is shared."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from spqr_format.cli import main; main()", "validate", "--help"],
            check=True,
            capture_output=True,
        )
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5

"""The house: what is importable under which name, and in which direction imports run."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"spqr_format", "spqr_converters", "spqr_kernels", "spqr_loaders"}


def run(program: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("root", ["converters", "kernels", "loaders", "spec", "tests"])
def test_source_roots_are_not_packages(root):
    """A regular package `kernels` on sys.path would hide Hugging Face's, which transformers imports."""
    found = [path for path in (ROOT / root).glob("**/__init__.py") if path.parent.name in ("converters", "kernels", "loaders")]
    assert found == []
    assert not (ROOT / root / "__init__.py").exists()


def test_hugging_face_kernels_is_not_hidden():
    """From the repository's root, with its folder `kernels` on sys.path, a model still builds."""
    if not any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("Hugging Face's package `kernels` is not installed")
    program = (
        "import sys, kernels; assert 'site-packages' in kernels.__file__, kernels.__file__\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)\n"
        "AutoModelForCausalLM.from_config(LlamaConfig(**small)); print('built')"
    )
    done = run(program)
    assert done.stdout.strip() == "built", done.stderr[-2000:]


def test_the_wheel_holds_exactly_our_packages(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'hatchling'" in done.stdout + done.stderr or "hatchling" in done.stderr:
        command.remove("--no-isolation")
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == PACKAGES
    assert any(name.endswith(".json") and "schema" in name for name in names)


@pytest.mark.parametrize("module", ["spqr_format", "spqr_format.validate", "spqr_format.reader", "spqr_format.cli"])
def test_the_core_imports_neither_torch_nor_transformers(module):
    done = run(f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_no_pickle_is_ever_executed():
    """Nothing unpickles with code execution, evaluates text or trusts remote code."""
    forbidden = ("pickle.load", "torch.load(", "eval(", "exec(", "trust_remote_code=True")
    found = []
    for root in ("spqr_format", "converters", "kernels", "loaders"):
        for path in (ROOT / root).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.replace(".eval()", "")
                if any(word in code for word in forbidden) and "weights_only=True" not in code:
                    found.append(f"{path}:{number}: {line.strip()}")
    assert not found


def test_a_version_is_said_once():
    import spqr_format

    assert importlib.metadata.version("spqr-format") == spqr_format.__version__

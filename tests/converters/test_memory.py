"""Memory: activations in RAM and on disk are the same bits, predictions hold, limits are kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert, predict, prediction
from spqr_converters.activations import Activations, Room
from spqr_converters.footprint import Footprint
from spqr_format.cli import main
from spqr_format.errors import SpqrError

ROOT = Path(__file__).parents[2]
QUICK = SolverOptions(rounds=1, sweeps=0)


class Tokens:
    """The random models have no tokenizer."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(sign) % 300 for sign in text]}


def test_activations_come_back_bit_for_bit_from_ram_and_from_the_file(tmp_path: Path) -> None:
    """Three tensors of 400 bytes with room for one in RAM; NaN payloads and signed zeros too."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3, 10, 10), dtype=torch.int64).to(torch.int32)
    tensors = list(bits.view(torch.float32))
    with Room("cpu", in_ram=500, folder=tmp_path / "out") as room:
        held = Activations(room, tensors)
        copy = Activations(room, held)
        assert [room.choose(400), len(held), len(copy)] == ["file", 3, 3]
        for expected, found, copied in zip(bits, held, copy, strict=True):
            assert torch.equal(found.view(torch.int32), expected)
            assert torch.equal(copied.view(torch.int32), expected)
        for number in range(3):
            held[number] = tensors[2 - number]
        assert torch.equal(held[0].view(torch.int32), bits[2])
        assert torch.equal(held[2].view(torch.int32), bits[0])
        assert torch.equal(copy[2].view(torch.int32), bits[2])  # is not the same place
        with pytest.raises(ValueError, match="in the place of"):
            held[1] = torch.zeros(3)
        if sys.platform == "linux":  # the file has no name, so that a kill leaves nothing
            assert os.listdir(tmp_path / "out") == []
    with Room("cpu", folder=tmp_path / "unused") as room:
        Activations(room, tensors)
    assert not (tmp_path / "unused").exists()


def test_activations_on_disk_change_no_byte(random_llama, tmp_path, monkeypatch, calibration_text) -> None:
    """All of them in the file, in the pass of the budget and in that of the quantizer, with a drift."""
    monkeypatch.setattr(job, "load_tokenizer", lambda folder: Tokens())
    options = {
        "calibration": Calibration(calibration_text, tokens=1024, seqlen=64, batch=3), "solver": QUICK,
        "bits_per_weight": 3.9, "device": "cpu", "keep": ["*.mlp.*", "*.[kvo]_proj"],
    }  # fmt: skip
    source = random_llama()
    convert(source, tmp_path / "in-ram", **options)
    written: list[int] = []
    real, choose = Room.write, Room.choose
    monkeypatch.setattr(Room, "choose", lambda self, nbytes: "file")
    monkeypatch.setattr(Room, "write", lambda self, tensor, offset: [written.append(tensor.nbytes), real(self, tensor, offset)])
    convert(source, tmp_path / "on-disk", **options)
    monkeypatch.setattr(Room, "choose", choose)
    # 1024 tokens of 48 floats: two streams made, and replaced before the second of two blocks; for the budget embeddings, the
    # states before two blocks, two outputs, and the gradients at three places.
    assert sum(written) == 4 * 48 * 1024 * (2 + 2 + 1 + 2 + 2 + 3)
    assert digests(tmp_path / "in-ram") == digests(tmp_path / "on-disk")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


CONVERSION = """
import json, sys
import torch
torch.set_num_threads(1)
import spqr_converters.job as job
from spqr_converters import Calibration, SolverOptions, convert
class Tokens:
    def __call__(self, text, **_): return {"input_ids": [ord(c) % 300 for c in text]}
job.load_tokenizer = lambda folder: Tokens()
asked = json.loads(sys.argv[1])
data = Calibration(sys.argv[4], **asked.pop("calibration")) if "calibration" in asked else None
plans = []
convert(sys.argv[2], sys.argv[3], calibration=data, solver=SolverOptions(rounds=1, sweeps=0), device="cpu",
        announce=plans.append, **asked)
# Not ru_maxrss: that of a child starts at what its parent, the test runner, held.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": 1024 * int(peak), **plans[0].as_dict()}))
"""


# Memory of a tensor goes back to the system at once: else peaks differ by 30 MB from run to run.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def converted(source: Path, target: Path, text: Path, environment: dict[str, str] | None = None, **asked) -> dict:
    """A conversion in a process of its own: its peak of memory as the system counts it, and what was predicted."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERSION, json.dumps(asked), str(source), str(target), str(text)],
        capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}:{ROOT / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1",
             **(environment or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_is_kept_by_activations_on_disk(random_llama, tmp_path, calibration_text) -> None:
    """Two streams of 25 MB in all, with a limit 20 MB too low for them: they lie on disk, and the bytes are the same."""
    source = random_llama(layers=2, hidden=192, mlp=192)
    asked = {"calibration": {"tokens": 16384, "seqlen": 64, "batch": 32}, "environment": RETURNED}
    free = converted(source, tmp_path / "free", calibration_text, **asked)
    assert free["scratch_file"] == 0
    assert free["peak"] <= free["peak_memory"]
    limit = free["peak_memory"] - 20_000_000
    tight = converted(source, tmp_path / "tight", calibration_text, **asked, max_memory={"cpu": limit})
    assert 17_000_000 < tight["scratch_file"] <= 2 * 4 * 192 * 16384
    assert tight["peak"] <= tight["peak_memory"] <= limit
    assert tight["peak"] < free["peak"] - 15_000_000
    assert digests(tmp_path / "free") == digests(tmp_path / "tight")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 1, "hidden": 768, "mlp": 6144},  # without data
        {"layers": 1, "hidden": 192, "mlp": 4608, "calibration": {"tokens": 2048, "seqlen": 64, "batch": 4}},  # one Hessian
        {"layers": 2, "hidden": 192, "mlp": 192, "calibration": {"tokens": 65536, "seqlen": 64, "batch": 512}},  # a batch
        {"layers": 24, "hidden": 192, "mlp": 96, "calibration": {"tokens": 65536, "seqlen": 64}, "bits_per_weight": 3.9},
    ],
)
def test_the_predicted_memory_is_the_measured_one(random_llama, tmp_path, calibration_text, shape) -> None:
    """Never below, and above by a third at most, in conversions whose peaks are of different kinds."""
    source = random_llama(**{key: shape.pop(key) for key in ("layers", "hidden", "mlp")})
    found = converted(source, tmp_path / "out", calibration_text, workers=1, **shape)
    assert found["peak"] <= found["peak_memory"] <= 4 / 3 * found["peak"], found


def test_on_a_gpu_scores_count_where_heads_share_keys(tiny_llama, monkeypatch, calibration_text) -> None:
    """torch has no fused kernel for these in float32; a mini-llama took 1.18 GB of an H200 where 0.70 were predicted."""
    asked: list[tuple[tuple, dict]] = []

    def footprint(*args, **kwargs) -> Footprint:
        asked.append((args, kwargs))
        return Footprint(*args, **kwargs)

    monkeypatch.setattr(prediction, "Footprint", footprint)
    predict(tiny_llama, calibration=Calibration(calibration_text, tokens=32768, seqlen=512), device="cpu")
    (model, *others, text, _), kwargs = asked[0]

    def on_gpu() -> int:
        return Footprint(model, *others, text, torch.device("cuda"), **kwargs).needs()["blocks"].device

    shared = on_gpu()
    model.config.num_key_value_heads = model.config.num_attention_heads
    a_score = text.batch * text.length**2
    assert shared - on_gpu() == (3 * 4 * 4 - 1) * a_score, "three copies in float32 for four heads, beside a mask of bytes"


def test_limits_that_cannot_be_met_are_refused(random_llama, tmp_path, calibration_text) -> None:
    """With the figures, before anything is written, by the conversion and by its prediction."""
    source = random_llama(hidden=96, mlp=160)
    data = Calibration(calibration_text, tokens=256, seqlen=64)
    for limits, where in (
        ({"cpu": 100_000_000}, r"cpu: 100,000,000 bytes, and .* takes [\d,]{11,} at least"),
        ({"cuda": 10**12}, "cuda: this conversion takes memory of cpu"),
        ({"cpu": 0}, "cpu: 0, expected at least 1 byte"),
    ):
        with pytest.raises(SpqrError, match=f"SPQR-E505 max_memory: {where}"):
            predict(source, max_memory=limits, calibration=data, device="cpu")
        with pytest.raises(SpqrError, match=f"SPQR-E505 max_memory: {where}"):
            convert(source, tmp_path / "out", max_memory=limits, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_limit_lowers_the_number_of_workers(random_llama) -> None:
    source = random_llama(hidden=768, mlp=3072, layers=1)
    many = predict(source, workers=7, device="cpu").memory
    each = (many.host - predict(source, workers=1, device="cpu").memory.host) / 6
    assert many.workers == 7
    assert each > 24 * 768 * 3072
    fewer = predict(source, workers=7, device="cpu", max_memory={"cpu": int(many.host - 2.5 * each)}).memory
    assert fewer.workers == 4
    assert fewer.host <= many.host - 2.5 * each


def test_the_command_says_what_it_takes(random_llama, tmp_path) -> None:
    """On stderr before it begins, in a dry run, and in JSON."""
    source = random_llama(layers=1)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--device", "cpu", "--weight-bits", "3", "--max-memory", "8GB"]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    predicted = json.loads(dry.stdout)["memory"]
    assert 400_000_000 < predicted["peak_memory"] < 8_000_000_000
    assert CliRunner().invoke(main, [*arguments, "--dry-run"]).stdout.count("matrices") == 1
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert re.search(r"takes about [\d.]+ [MG]B of RAM\n", done.stderr)  # of this process, whatever it holds already
    assert json.loads(done.stdout)["memory"]["workers"] == predicted["workers"]
    refused = CliRunner().invoke(main, [*arguments, "--max-memory", "1MB", "--dry-run"])
    assert refused.exit_code == 1
    assert "SPQR-E505 max_memory: cpu: 1,000,000 bytes" in refused.output
    assert CliRunner().invoke(main, [*arguments, "--max-memory", "much"]).exit_code == 2

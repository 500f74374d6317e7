"""Conversions by several ranks: the bytes of one process, one error on all of them, resumption by any number."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spqr_converters.hessian import Accumulator, tree_sum
from spqr_converters.ranks import Ranks

from .conftest import as_gptq

ROOT = Path(__file__).parents[2]
PATHS = {**os.environ, "OMP_NUM_THREADS": "1"}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def few(ranks: int, rank: int = 0) -> Ranks:
    """A group of so many, of which nothing is asked that needs a wire."""
    made = object.__new__(Ranks)
    made.size, made.rank = ranks, rank
    return made


# What is dealt out


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
def test_shards_are_dealt_out_in_subtrees(size: int) -> None:
    """Each shard to one rank, in order; with a power of two of ranks each has one subtree, so that one Hessian is sent."""
    ranks = few(size)
    owners = [ranks.of_shard(shard) for shard in range(8)]
    spans = list(ranks._spans(0, 8))
    assert owners == sorted(owners)
    assert max(owners) < size
    assert [owner for first, last, owner in spans for _ in range(first, last)] == owners
    assert [first for first, _, _ in spans] == [0, *(last for _, last, _ in spans[:-1])]
    for first, last, _ in spans:
        assert (last - first).bit_count() == 1
        assert first % (last - first) == 0
    if size in (1, 2, 8):
        assert len(spans) == size


@pytest.mark.parametrize("costs", [[5, 4, 3, 3, 3], [1], [2] * 7, [], [9, 1, 1, 1]])
def test_work_is_dealt_out_greedily(costs: Sequence[int]) -> None:
    """No rank has more than the mean and one piece, and all ranks find the same."""
    found = [few(3, rank).owners(costs) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    loads = [sum(cost for cost, owner in zip(costs, found[0], strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) <= sum(costs) / 3 + max(costs, default=0)


def test_the_tree_is_the_one_that_the_text_says() -> None:
    """((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) in float32, with shards that saw nothing left out; at most four are held."""
    torch.manual_seed(0)
    inputs = [torch.randn(50, 4) for _ in range(8)]
    alive = most = 0

    class Counted(Accumulator):
        def __init__(self) -> None:
            nonlocal alive, most
            super().__init__(4, "x")
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def part(number: int) -> Accumulator | None:
        if number in (3, 6, 7):
            return None
        sums = Counted()
        sums.add(inputs[number])
        return sums

    found = tree_sum(part, 0, 8)
    s = [x.T @ x for x in inputs]
    assert found is not None
    assert torch.equal(found.sum, ((s[0] + s[1]) + s[2]) + (s[4] + s[5]))
    assert not torch.equal(found.sum, s[0] + (s[1] + (s[2] + (s[4] + s[5]))))  # the order is seen
    assert found.tokens == 250
    assert most <= 4
    assert tree_sum(lambda number: None, 0, 8) is None


# Conversions


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """What rank_conversions.py did, and the folder of its outputs."""
    if not hasattr(os, "fork") or not torch.distributed.is_available():
        pytest.skip("forks ranks of torch.distributed")
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    llama = LlamaConfig(**small, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(llama).half().save_pretrained(folder / "llama")
    moe = Qwen3MoeConfig(
        **small, moe_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1, num_experts=4,
        head_dim=8, mlp_only_layers=[],
    )  # fmt: skip
    Qwen3MoeForCausalLM(moe).half().save_pretrained(folder / "moe")
    as_gptq(shutil.copytree(folder / "llama", folder / "gptq"))
    (folder / "out").mkdir()
    script = Path(__file__).with_name("rank_conversions.py")
    text = ROOT / "tests" / "data" / "calibration.txt"
    done = subprocess.run(
        [sys.executable, script, folder / "llama", folder / "moe", folder / "gptq", folder / "out", text],
        env=PATHS, stdout=subprocess.PIPE, check=True, timeout=900,
    )  # fmt: skip
    return folder / "out", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("calibrated-1", ["calibrated-2", "calibrated-3", "calibrated-4"]),
        ("experts-1", ["experts-2"]),
        ("data-free-1", ["data-free-2"]),
        ("budget-1", ["budget-2"]),
        ("lossless-1", ["lossless-2", "lossless-3"]),
    ],
)
def test_any_number_of_ranks_gives_the_bytes_of_one_process(runs, one: str, others: list[str]) -> None:
    folder, results = runs
    assert results[one] == ["done"]
    whole = digests(folder / one)
    assert len(whole) >= 4
    for other in others:
        assert results[other] == ["done"] * int(other[-1])
        assert digests(folder / other) == whole, other


def test_an_error_on_one_rank_ends_all_with_the_code_of_the_first(runs) -> None:
    folder, results = runs
    (broken,) = set(results["broken-weight"])  # the same sentence on both
    assert broken.startswith("SPQR-E502 model.layers.0.")
    assert broken.endswith("of rank 1")
    assert results["broken-input"] == ["SPQR-E503 activation: of rank 1"] * 3
    assert results["full-disk"] == ["OSError", "OSError"]
    for name in ("broken-weight", "broken-input"):
        assert list((folder / name).iterdir()) == []


def test_ranks_that_were_told_different_things_are_refused(runs) -> None:
    folder, results = runs
    expected = "SPQR-E505 process_group: rank 1 has another identity.provenance.seed than rank 0"
    assert results["other-seed"] == [expected, expected]
    assert not (folder / "other-seed").exists()


def test_a_stopped_run_goes_on_with_another_number_of_ranks(runs) -> None:
    """A full disk after ten of fourteen modules, taken up by three, or two; a rank killed in the second block, taken up by
    one."""
    folder, results = runs
    assert results["full-disk-resumed"] == ["done"] * 3
    assert results["killed"][1] == "killed"
    assert results["killed"][0] != "done"
    assert results["killed-resumed"] == ["done"]
    assert results["full-disk-lossless"] == ["OSError"] * 3
    assert results["full-disk-lossless-resumed"] == ["done"] * 2
    for name, whole in (("full-disk", "calibrated-1"), ("killed", "calibrated-1"), ("full-disk-lossless", "lossless-1")):
        assert digests(folder / name) == digests(folder / whole), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "method"),
    [("cpu", "lossless"), ("cpu", "calibrated"), pytest.param("cuda", "calibrated", marks=pytest.mark.gpu)],
)
def test_torchrun_and_the_command(
    tiny_llama: Path, gptq_llama, tmp_path: Path, calibration_text: Path, device: str, method: str
) -> None:
    """`torchrun ... spqr convert` with two ranks, Gloo on a CPU and NCCL on two GPUs, against the command alone."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spqr = [sys.executable, "-c", "from spqr_format.cli import main; main()"]
    source, options = tiny_llama, ["--calibration", calibration_text, "--tokens", "4096", "--context", "128"]
    options += ["--weight-bits", "3"]
    if method == "lossless":
        source, options = gptq_llama(), ["--lossless"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    for name, command in (("one", spqr), ("two", [*torchrun, *spqr])):
        arguments = [*command, "convert", source, tmp_path / name, "--device", device, *options]
        done = subprocess.run(list(map(str, arguments)), env=PATHS, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("\nwrote ") == 1  # rank 0 alone speaks
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    shutil.rmtree(tmp_path / "two")

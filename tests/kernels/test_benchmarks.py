"""The benchmark runs: on a CPU with a clock that is made up, so that it does not break unseen between GPU runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from spqr_format import Layout
from spqr_format.payload import check_payload

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
MODULES = ("beside", "linear", "peers", "power", "random_weights", "report", "timing", "tune_gemlite")
ABOUT = {
    "gpu": "Some GPU", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3", "python": "3", "date": "2026-11-22",
    "commit": "abc", "peers": {"spqr_quant": "0.2.0", "gemlite": "absent"}, "read_bytes_per_s": 4.3e12,
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("linear")
    for name in MODULES:
        sys.modules.pop(name, None)


def clock(calls):
    """Every call is made; the first took 10 us, and so on."""
    return 10.0 * len([call() for call in calls]), "graph"


def measured(benchmark, peer, batches=(1, 3), shape=(64, 128), share=0.01, **kind):
    return benchmark.measure(peer, benchmark.Case(shape, share, **kind), batches, clock, "cpu")


@pytest.mark.parametrize("kind", [{}, {"weight_bits": 4, "statistics": "direct", "group_size": 64}], ids=["bilevel", "direct"])
@pytest.mark.parametrize("peer", ["ours", "ours_bf16", "fp16", "bf16", "csr"])
def test_each_product_agrees_with_float64(benchmark, peer, kind):
    rows = measured(benchmark, peer, (1, 3, 40), **kind)
    assert [(row["batch"], row["status"], row["us"]) for row in rows] == [(b, "ok", 10.0) for b in (1, 3, 40)]
    assert all(row["error"] < (1e-2 if "bf16" in peer else 1e-3) for row in rows)
    assert all(row["bytes_per_s"] == pytest.approx(row["bytes"] / 10e-6) for row in rows)
    assert rows[0]["weight_bits"] == (kind.get("weight_bits", 3) if "ours" in peer else None)
    assert rows[0]["share"] == (0.01 if peer in ("ours", "ours_bf16", "csr") else None)


def test_random_matrices_are_valid(benchmark):
    """Kernels follow their outliers without a check."""
    from random_weights import random_tensors

    tensors, layout = random_tensors(Layout(40, 4400, permuted=True), 0.01, 0, "cpu")
    assert 1700 < layout.outliers <= 1760
    check_payload(layout, {leaf: tensor.numpy() for leaf, tensor in tensors.items() if leaf not in ("weight", "stat_codes")} | {
        leaf: np.zeros_like(tensors[leaf].numpy()) for leaf in ("weight", "stat_codes")  # padding is random, too
    }, "m")  # fmt: skip


def test_bytes_of_ours_are_those_of_the_layout(benchmark):
    layout = benchmark.Case((64, 128)).layout
    assert measured(benchmark, "ours", share=0.0)[0]["bytes"] == layout.stored_bytes()


def test_a_wrong_result_has_no_time(benchmark, monkeypatch):
    for product in (lambda x, w: torch.zeros(x.shape[0], 64), lambda x, w: torch.full((x.shape[0], 64), torch.nan)):
        monkeypatch.setattr(torch.nn.functional, "linear", product)
        row = measured(benchmark, "fp16")[1]
        assert row["status"] == "wrong"
        assert row["error"] == pytest.approx(1.0)
        assert "us" not in row


def test_an_error_is_a_row(benchmark, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no such product\nand more")

    monkeypatch.setattr(torch.nn.functional, "linear", fails)
    assert measured(benchmark, "fp16")[1]["status"] == "failed: ValueError: no such product"
    assert "error" not in measured(benchmark, "fp16")[1]
    monkeypatch.setattr(torch, "randn", fails)  # already the matrix cannot be made
    rows = measured(benchmark, "fp16")
    assert [row["status"] for row in rows] == ["failed: ValueError: no such product"] * 2


def test_after_the_deadline_nothing_starts(benchmark):
    assert benchmark.measure("fp16", benchmark.Case((64, 128)), (1, 2), clock, "cpu", deadline=0.0) == []


def test_what_is_not_installed_is_absent(benchmark, monkeypatch, tmp_path):
    peers = sys.modules["peers"]
    monkeypatch.syspath_prepend(str(tmp_path))
    peer = peers.Peer(None, (), "spqr_no_such_kernel")
    assert peers.state(peer) == "absent"
    (tmp_path / "spqr_no_such_kernel.py").write_text("import spqr_no_such_need")
    importlib.invalidate_caches()
    assert peers.state(peer) == "failed: No module named 'spqr_no_such_need'"
    (tmp_path / "spqr_no_such_kernel.py").write_text("raise RuntimeError('nvcc: not found')" + " " * 20)
    importlib.invalidate_caches()
    assert peers.state(peer) == "failed: RuntimeError: nvcc: not found"


def half(byte_pair):
    return struct.unpack("<e", bytes(byte_pair))[0]


def spqr_quant_mul(m, n, bits, beta1, beta2, dense, offsets, entries, nnz, x, flag, _, y):
    """What spqr_quant's kernel computes, number by number (spqr_cuda_kernel.cu and its class QuantizedLinear)."""
    assert (bits, beta1, beta2, flag, nnz) == (3, 16, 16, 0b1_0001_0001, entries.numel())
    result = np.zeros(m)
    vector = x.double().numpy()
    for number, word in enumerate(dense.tolist()):
        tile, k = divmod(number, 16)
        row, column = tile // (n // 16) * 16 + k, tile % (n // 16) * 16
        stats = bytes(dense[tile * 16 + 2 * b].item() >> 54 for b in range(8))
        assert all(dense[tile * 16 + 2 * b + 1].item() >> 54 == stats[b] for b in range(8))
        scale_scale, zero_scale, scale_zero, zero_zero = (half(stats[i : i + 2]) for i in (0, 2, 4, 6))
        scale = scale_scale * ((word & 7) - scale_zero)
        zero = zero_scale * ((word >> 3 & 7) - zero_zero)
        for i in range(16):
            result[row] += scale * ((word >> (6 + 3 * i) & 7) - zero) * vector[column + i]
    for row in range(m):
        for entry in entries[offsets[row] : offsets[row + 1]].tolist():
            result[row] += half(struct.pack("<i", entry)[2:]) * vector[entry & 0xFFFF]
    y.copy_(torch.from_numpy(result))


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_spqr_quant_gets_its_own_layout(benchmark, monkeypatch, share):
    inference = types.ModuleType("spqr_quant.inference")
    inference.FeatureFlags = types.SimpleNamespace(SPARSE_FUSED_FP32_ASYNC=1 << 8 | 1 << 4 | 1)
    kernel = types.ModuleType("spqr_quant.inference_kernels.cuda_kernel")
    kernel.call_spqr_mul = spqr_quant_mul
    for module in (inference, kernel, types.ModuleType("spqr_quant"), types.ModuleType("spqr_quant.inference_kernels")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    rows = measured(benchmark, "spqr_quant", shape=(32, 48), share=share)
    assert all(row["status"] == "ok" and row["error"] < 1e-3 for row in rows)
    weights = 32 * 48
    assert rows[0]["bytes"] == weights * 8 // 16 + 33 * 4 + 4 * round(weights * share)
    weight = sys.modules["peers"].tile_weights(sys.modules["peers"].spqr_words(64, 64, "cpu"))
    assert weight.mean().abs() < 0.005
    assert 0.005 < weight.std() < 0.1


def fake_gemlite():
    module = types.ModuleType("gemlite")
    module.DType = types.SimpleNamespace(FP16="fp16")
    module.loaded = []
    module.reset_config = module.loaded.clear
    module.load_config = module.loaded.append

    class Linear:
        def __init__(self, bits, group, inn, out, of_input, of_output):
            assert (bits, group, of_input, of_output) == (4, 128, "fp16", "fp16")
            self.out = out

        def pack(self, codes, scales, zeros, bias):
            assert bias is None
            assert int(codes.max()) <= 15
            self.codes = codes
            self.scales = scales.view(self.out, -1).t().contiguous()
            self.zeros = (-zeros.float() * scales.float()).half().view(self.out, -1).t().contiguous()

        def get_tensor_args(self):
            return [self.codes, self.scales, self.zeros, torch.tensor(0.0)]

        def get_meta_args(self):
            return [4]

    def forward(x, bias, tensors, meta):
        codes, scales, zeros, _ = tensors
        groups = codes.float().view(codes.shape[0], -1, 128)
        return x @ (groups * scales.t()[..., None] + zeros.t()[..., None]).view(codes.shape).half().T

    module.GemLiteLinear, module.forward_functional = Linear, forward
    return module


def test_gemlite(benchmark, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemlite", fake_gemlite())
    rows = measured(benchmark, "gemlite", shape=(64, 384))
    assert all(row["status"] == "ok" and row["error"] < 5e-3 for row in rows)
    assert rows[0]["share"] is None
    tuned = tmp_path / "tuned.json"
    peers = sys.modules["peers"]
    peers.gemlite_load("cpu", tuned)
    assert sys.modules["gemlite"].loaded == []
    tuned.write_text("{}")
    peers.gemlite_load("cpu", tuned)
    assert sys.modules["gemlite"].loaded == [str(tuned)]
    tuned.write_text("{")
    with pytest.raises(json.JSONDecodeError):
        peers.gemlite_load("cpu", tuned)


def test_options_and_jobs(benchmark):
    asked = benchmark.options([])
    assert (asked.shapes, asked.batches, asked.shares) == (benchmark.SHAPES, benchmark.BATCHES, benchmark.SHARES)
    asked = benchmark.options(["--quick", "--batches", "5"])
    assert (asked.batches, asked.peers, asked.bits) == ([5], ["ours", "fp16"], [3])
    asked = benchmark.options(["--full", "--shapes", "7b", "mixtral", "64x128"])
    assert asked.shapes == [*benchmark.MODELS["7b"], (1024, 4096), (14336, 4096), (4096, 14336), (64, 128)]
    assert (asked.batches[0], asked.batches[-1], asked.shares[-1]) == (1, 4096, 0.02)
    cases = [benchmark.Case(s, share, bits) for s in ((64, 128), (128, 64)) for bits in (3, 4) for share in (0.0, 0.01)]
    jobs = benchmark.jobs(["ours", "fp16", "spqr_quant", "csr", "gemlite"], cases)
    counts = {peer: sum(job[0] == peer for job in jobs) for peer in sys.modules["peers"].PEERS}
    assert counts == {"ours": 8, "ours_bf16": 0, "fp16": 2, "bf16": 0, "spqr_quant": 4, "csr": 2, "gemlite": 1}
    assert jobs[-1] == ("gemlite", cases[0])  # 64 columns are no group of 128


def test_run_and_report(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "machine", lambda peers, commit: {**ABOUT, "commit": commit})
    wanted = ["--shapes", "64x128", "128x128", "--batches", "1", "32", "--out", str(tmp_path / "run"), "--commit", "abc"]
    wide = ["--groups", "32", "64", "--peers", "ours", "--shares", "0", "--batches", "1", "--out", str(tmp_path / "wide")]
    benchmark.main([*wanted[:3], *wide], clock, "cpu")
    groups = [row["group_size"] for row in json.loads((tmp_path / "wide" / "results.json").read_text())["results"]]
    assert groups == [32, 64, 32, 64]
    capsys.readouterr()
    benchmark.main(wanted, clock, "cpu")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["left_out"] == 0
    counts = {}
    for row in results["results"]:
        counts[row["peer"]] = counts.get(row["peer"], 0) + 1
    # spqr_quant is said to be there, is not, and goes to batch 16 only; gemlite is absent
    assert counts == {"ours": 12, "fp16": 4, "csr": 8, "spqr_quant": 6}
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "run" / "table.md").read_text())
    assert printed.count("| 64 x 128 | 3 bilevel 16 |") == 6
    assert "4.30 TB/s" in printed
    assert "spqr_quant: failed: ModuleNotFoundError" in printed
    assert "gemlite absent" in printed
    benchmark.main([*wanted, "--minutes", "0"], clock, "cpu")
    assert "30 products were not measured" in capsys.readouterr().out


def some_rows():
    ours = {"peer": "ours", "weight_bits": 3, "statistics": "bilevel", "group_size": 16, "clock": "graph", "status": "ok"}
    none = dict.fromkeys(("share", "weight_bits", "statistics", "group_size"))
    rows = []
    for batch in (1, 8):
        for shape in ((4096, 4096), (8192, 28672)):
            about = {"shape": list(shape), "batch": batch, "error": 4e-4, "bytes": 7e6, "bytes_per_s": 2.15e12}
            rows += [{**about, **ours, "share": share, "us": 5.0} for share in (0.0, 0.01)]
            rows.append({**about, **none, "peer": "fp16", "us": 15.0, "clock": "graph", "status": "ok"})
        rows.append({**about, **none, "peer": "spqr_quant", "share": 0.01, "status": "wrong", "error": 1.0})
        rows.append({**about, **none, "peer": "gemlite", "us": 7.5, "clock": "loop", "status": "ok", "error": 3e-3})
    return rows


def test_narrow_table(benchmark, tmp_path, capsys):
    report = sys.modules["report"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": ABOUT, "left_out": 0, "results": some_rows()}))
    report.main([str(path), "--batches", "8", "1", "--shares", "0.01", "0.02"])
    assert capsys.readouterr().out.splitlines() == [
        "| out x in | fp16, batch 8 | 1 % | 2 % | fp16, batch 1 | 1 % | 2 % |", "|---|---:|---:|---:|---:|---:|---:|",
        "| 4096 x 4096 | 15.0 | 5.0 (3.00 x) | — | 15.0 | 5.0 (3.00 x) | — |",
        "| 8192 x 28672 | 15.0 | 5.0 (3.00 x) | — | 15.0 | 5.0 (3.00 x) | — |", "",
    ]  # fmt: skip
    report.main([str(path), "--batches", "1"])
    assert "| fp16, batch 1 | none | 1 % |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_table_and_plot_come_from_the_json_alone(benchmark, tmp_path):
    report = sys.modules["report"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": ABOUT, "left_out": 0, "results": some_rows()}))
    text = report.write(path)
    assert "| 4096 x 4096 | 3 bilevel 16 | 0 | 5.0 (3.00 x) | 15.0 | — | — | 2.15 | 50 | 4.0e-04 |" in text
    assert "| 8192 x 28672 | 3 bilevel 16 | 1 | 5.0 (3.00 x) | 15.0 | wrong | 7.5 (2.00 x) | 2.15 | 50 | 4.0e-04 |" in text
    assert "| 8192 x 28672 | 3 bilevel 16 | 0 | 5.0 (3.00 x) | 15.0 | — | 7.5 (2.00 x) |" in text
    assert "ours 4.0e-04, fp16 cuBLAS 4.0e-04, gemlite 4 bit 3.0e-03" in text
    assert "Launched one by one, as no CUDA graph could capture it (some rows at least): gemlite 4 bit." in text
    pytest.importorskip("matplotlib")
    picture = (tmp_path / "roofline.svg").read_text()
    for said in ("batch 8", "ours, 1 % outliers", "ceiling: a plain sum", "gemlite 4 bit", "8192 x 28672"):
        assert f">{said}<" in picture
    assert ">spqr_quant" not in picture  # nothing that is right was measured
    report.write(path)
    assert (tmp_path / "roofline.svg").read_text() == picture


def test_a_loop_is_timed_where_no_graph_can_be(benchmark, monkeypatch):
    timing = sys.modules["timing"]

    def fails(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "loop_microseconds", lambda calls: 3.0)
    monkeypatch.setattr(timing, "graph_microseconds", lambda calls: 2.0)
    assert timing.microseconds([]) == (2.0, "graph")
    monkeypatch.setattr(timing, "graph_microseconds", fails)
    assert timing.microseconds([]) == (3.0, "loop")


def test_a_graph_is_as_many_rounds_as_take_its_time(benchmark, monkeypatch):
    """On a GPU that is made up: what a call takes is a part of all that were captured."""
    timing = sys.modules["timing"]
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: types.SimpleNamespace(replay=None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_settle", lambda run: None)
    monkeypatch.setattr(timing, "_median", lambda run, repeats: 3.3 if run is None else 0.6)  # ms: of the graph, of a round
    made = []
    calls = [lambda k=k: made.append(k) for k in range(3)]
    assert timing.graph_microseconds(calls) == pytest.approx(3300 / (5 * 3))
    assert made == [0, 1, *[0, 1, 2] * 5]  # two before it, then what is captured


def test_power_is_read_from_what_nvidia_smi_writes(benchmark):
    power = importlib.import_module("power")
    lines = ["345, 78.10, 0x0000000000000001"] * 3  # before the product runs as it does
    lines += ["1830, 745.75, 0x0000000000000004", "1515, 616.91, 0x0000000000000024", "1980, 620.53, 0x0000000000000000"]
    seen = power.samples("\n".join(lines) + "\n1845, 7")
    assert seen == [power.Sample(1830, 745.75, 4), power.Sample(1515, 616.91, 0x24), power.Sample(1980, 620.53, 0)]
    assert power.row("ours", seen) == "| ours | 1830 (1515 to 1980) | 621 (617 to 746) | power 66 %, heat 33 % |"
    assert power.row("fp16", seen[2:]).endswith("| nothing |")
    assert power.samples("") == []


def test_power_of_each_product(benchmark, capsys):
    """With an nvidia-smi that is made up, of what is multiplied."""
    power = importlib.import_module("power")
    shapes = []

    def watch(calls):
        shapes.append([tuple(call().shape) for call in calls])
        return [power.Sample(1000, 500.0, 0)]

    power.main(["--shape", "64x256", "--batches", "1", "3"], watch, "cpu")
    assert shapes == [[(1, 64)], [(1, 64)], [(3, 64)], [(3, 64)]]
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["| ours, batch 1", "| fp16, batch 1", "| ours, batch 3", "| fp16, batch 3"]


def test_tuning_imports_without_gemlite(benchmark):
    tune = importlib.import_module("tune_gemlite")
    assert tune._once(list) == [1.0, 1.0, 1.0]


def test_two_checkouts_in_turns(benchmark, capsys, tmp_path):
    """The other one's kernels run, not ours again: there a product of zeros is what is wrong."""
    beside = importlib.import_module("beside")
    turns = iter(range(1, 100))
    options = ["--shapes", "64x256", "--batches", "1", "3", "--shares", "0", "0.02"]
    beside.main([str(BENCHMARKS.parents[1]), *options], lambda calls: float(len([c() for c in calls]) * next(turns)), "cpu")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0] == "| 64 x 256 | 1 | 0 | 1.00 / 3.00 | 2.00 / 4.00 | 0.667 |"
    assert [row.split("|")[2:4] for row in rows] == [[" 1 ", " 0 "], [" 1 ", " 2 "], [" 3 ", " 0 "], [" 3 ", " 2 "]]
    shutil.copytree(BENCHMARKS.parents[1] / "kernels" / "spqr_kernels", tmp_path / "kernels" / "spqr_kernels")
    broken = tmp_path / "kernels" / "spqr_kernels" / "dispatch.py"
    broken.write_text(
        broken.read_text() + "\n\ndef linear(x, tensors, layout, bias):\n    return x @ torch.zeros(256, 64).half()\n"
    )
    with pytest.raises(SystemExit, match="before: 64 x 256, batch 1: error 1"):
        beside.main([str(tmp_path), *options], lambda calls: 1.0, "cpu")
    with pytest.raises(SystemExit, match="no kernels here"):
        beside.main([str(tmp_path / "kernels"), *options], lambda calls: 1.0, "cpu")

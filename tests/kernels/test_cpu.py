"""The CPU's kernels against the decoder written from the spec and float64 products, and what may go wrong around them."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spqr_format import SpqrError
from spqr_kernels import cpu, dequantize, linear, reference

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "spec"))
import reference_decoder  # noqa: E402  a script, not part of a package

BOUND = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-5}

KINDS = st.fixed_dictionaries(
    {
        "out_features": st.integers(1, 70),
        "in_features": st.integers(1, 600) | st.integers(2000, 2300) | st.integers(4090, 4400),
        "weight_bits": st.sampled_from([2, 3, 4]), "statistics": st.sampled_from(["bilevel", "direct"]),
        "group_size": st.sampled_from([16, 32, 48, 128, 2064, 4096]), "permuted": st.booleans(),
        "outliers": st.sampled_from([0.0, 0.02, 1.0]), "seed": st.integers(0, 2**32 - 1),
    }
)  # fmt: skip


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """Several threads even for a little work, and torch's number of them as it was."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "SERIAL", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stored(matrix):
    return {leaf: torch.from_numpy(tensor.copy()) for leaf, tensor in matrix.pack().items()}


def decoded(matrix):
    """W by the decoder that shares no code with the project."""
    unsigned = {4: np.uint32, 2: np.uint16, 1: np.uint8}
    raw = {f"m.{leaf}": tensor.view(unsigned[tensor.itemsize]) for leaf, tensor in matrix.pack().items()}
    return torch.from_numpy(reference_decoder.decode(raw, matrix.layout.as_dict(), "m"))


def relative_error(y, expected):
    assert torch.isfinite(y).all()
    return ((y.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", ["products", "decode"])
def test_the_kernels_compile(name):
    """Without this a kernel that does not compile would go unseen: the reference takes over."""
    assert cpu.kernel(name) is not None


@given(kind=KINDS, batch=st.integers(1, 7), threads=st.integers(1, 3), dtype=st.sampled_from(list(BOUND)), bias=st.booleans())
@settings(max_examples=200, deadline=None)
def test_linear_matches_float64(random_matrix, kind, batch, threads, dtype, bias):
    matrix = random_matrix(**kind)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(kind["seed"])
    x = torch.randn(batch, kind["in_features"], generator=generator).to(dtype)
    b = torch.randn(kind["out_features"], generator=generator) if bias else None
    y = linear(x, stored(matrix), matrix.layout, b)
    assert y.dtype == dtype
    w = decoded(matrix).double()
    # The parts that add up to y, as they are what rounding is relative to: a y of few numbers may be near 0.
    size = (x.double().abs() @ w.abs().T).norm() / max(1.0, kind["in_features"] ** 0.5)
    expected = x.double() @ w.T + (0 if b is None else b.double())
    denormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * y.numel() ** 0.5
    assert (y.double() - expected).norm() <= BOUND[dtype] * (expected.norm() + size) + denormal


@given(kind=KINDS, threads=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_dequantize_is_the_specs_decode_bit_for_bit(random_matrix, kind, threads):
    matrix = random_matrix(**kind)
    torch.set_num_threads(threads)
    expected = decoded(matrix)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w = dequantize(stored(matrix), matrix.layout, dtype)
        assert w.dtype == dtype
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize]
        assert torch.equal(w.view(bits), expected.to(dtype).view(bits))


@pytest.mark.parametrize("statistics", ["bilevel", "direct"])
def test_every_fp16_number_is_read_exactly(random_matrix, statistics):
    """Statistics and outliers of all finite magnitudes, denormals and negative zero among them."""
    finite = np.arange(0x10000, dtype=np.uint16)
    finite = finite[(finite & 0x7C00) != 0x7C00].view(np.float16)
    matrix = random_matrix(62, 1024, statistics=statistics, outliers=1.0)
    rng = np.random.default_rng(0)
    if statistics == "bilevel":
        matrix.tile_stats[...] = rng.permutation(finite)[: matrix.tile_stats.size].reshape(matrix.tile_stats.shape)
    else:
        matrix.group_scales[...] = rng.permutation(finite)[: matrix.group_scales.size].reshape(matrix.group_scales.shape)
    matrix.values[: finite.size] = finite
    expected = decoded(matrix)
    assert torch.equal(dequantize(stored(matrix), matrix.layout).view(torch.int32), expected.view(torch.int32))
    rounded = dequantize(stored(matrix), matrix.layout, torch.bfloat16)
    assert torch.equal(rounded.view(torch.int16), expected.bfloat16().view(torch.int16))
    x = torch.randn(2, 1024)
    assert relative_error(linear(x, stored(matrix), matrix.layout), x.double() @ expected.double().T) < 1e-5


def test_long_rows(random_matrix):
    """More than 65536 columns and outliers."""
    matrix = random_matrix(20, 70_000, outliers=0.06)
    assert matrix.layout.outliers > 65536
    expected = decoded(matrix)
    assert torch.equal(dequantize(stored(matrix), matrix.layout), expected)
    x = torch.randn(2, 70_000)
    assert relative_error(linear(x, stored(matrix), matrix.layout), x.double() @ expected.double().T) < 1e-5


@pytest.mark.parametrize("kind", [{}, {"group_size": 48, "permuted": True}], ids=["group-16", "group-48-permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_for_any_number_of_threads(random_matrix, monkeypatch, dtype, kind):
    matrix = random_matrix(200, 4200, **kind)
    tensors = stored(matrix)
    for batch in range(1, cpu.PRODUCT_BATCH + 1):
        x = torch.randn(batch, 4200).to(dtype)
        torch.set_num_threads(1)
        expected = linear(x, tensors, matrix.layout)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(linear(x, tensors, matrix.layout), expected) for _ in range(3))
        with monkeypatch.context() as without:  # as on a system without GNU OpenMP
            without.setattr(cpu, "_openmp", lambda: None)
            assert torch.equal(linear(x, tensors, matrix.layout), expected)


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)], ids=str)
def test_the_result_is_finite_where_the_exact_one_is(random_matrix, dtype, size, batch):
    matrix = random_matrix(64, 256)
    x = torch.randn(batch, 256).to(dtype)
    x[:, 3], x[:, 100] = size, -size
    expected = x.double() @ decoded(matrix).double().T
    y = linear(x, stored(matrix), matrix.layout)
    keep = expected.abs() < torch.finfo(dtype).max * 0.99
    if batch <= cpu.PRODUCT_BATCH:
        assert keep.any()
        assert relative_error(y[keep], expected[keep]) < BOUND[dtype]
    else:
        assert torch.isfinite(y[keep]).all()


def test_tiny_and_zero_activations(random_matrix):
    matrix = random_matrix(40, 64, outliers=0.1)
    w = decoded(matrix).double()
    for size in (0.0, 1e-44, 1e-38, 1e-30):
        x = torch.randn(2, 64) * size
        expected = x.double() @ w.T
        assert (linear(x, stored(matrix), matrix.layout).double() - expected).norm() <= 1e-5 * expected.norm() + 1e-43


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_activation_is_seen_in_the_result(random_matrix, value):
    matrix = random_matrix(40, 64)
    for batch in (1, 9):
        x = torch.randn(batch, 64)
        x[0, 5] = value
        y = linear(x, stored(matrix), matrix.layout)
        assert not torch.isfinite(y[0]).any()
        assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize(("leaf", "value"), [
    ("outlier_ptr", 30_000), ("outlier_ptr", 0), ("outlier_ptr", -1), ("perm", 300), ("perm", -1),
    ("outliers", 300 + 7 * 4096), ("outliers", 256 + 8 * 4096), ("outliers", 255), ("outliers", 4095), ("outliers", -1),
])  # fmt: skip
def test_an_index_out_of_range_is_refused(random_matrix, leaf, value):
    """Indices are checked at load; where one was missed, no memory outside is read or written."""
    matrix = random_matrix(40, 300, permuted=True, outliers=0.2)  # three tiles of three cells
    tensors = stored(matrix)
    tensors[leaf][-1 if leaf == "outliers" else 3] = value
    for batch in (1, cpu.PRODUCT_BATCH + 1):
        with pytest.raises(SpqrError, match="E509"):
            linear(torch.randn(batch, 300), tensors, matrix.layout)
    with pytest.raises(SpqrError, match="E509"):
        dequantize(tensors, matrix.layout)


def test_calls_from_several_threads_at_once(random_matrix):
    cases = []
    for seed, shape in enumerate([(200, 512), (33, 2100), (512, 48)]):
        matrix = random_matrix(*shape, seed=seed)
        x = torch.randn(1 + seed, shape[1])
        cases.append((x, stored(matrix), matrix.layout, linear(x, stored(matrix), matrix.layout)))
    started = threading.Barrier(6)

    def work(number):
        started.wait()
        for i in range(100):
            x, tensors, layout, expected = cases[(number + i) % 3]
            assert torch.equal(linear(x, tensors, layout), expected)
            if i % 10 == 0:
                assert torch.equal(dequantize(tensors, layout), reference.dequantize(tensors, layout))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_defaults_of_torch_do_not_matter(random_matrix):
    matrix = random_matrix(33, 48)
    tensors, x = stored(matrix), torch.randn(6, 48)
    expected = linear(x[:1], tensors, matrix.layout), linear(x, tensors, matrix.layout), dequantize(tensors, matrix.layout)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = linear(x[:1], tensors, matrix.layout), linear(x, tensors, matrix.layout), dequantize(tensors, matrix.layout)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


FORK = """
import os, sys, torch
sys.path.insert(0, "tests")
from conftest import make_matrix
from spqr_kernels import cpu, linear
cpu.SERIAL = 0
torch.set_num_threads(2)
matrix = make_matrix(64, 512)
tensors = {leaf: torch.from_numpy(t.copy()) for leaf, t in matrix.pack().items()}
x = torch.randn(1, 512)
y = linear(x, tensors, matrix.layout)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(linear(x, tensors, matrix.layout), y) for _ in range(3)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(linear(x, tensors, matrix.layout), y)
print("forked")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_a_forked_process_computes():
    """There torch's own threads are gone, and a call of OpenMP would wait for them for ever."""
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "forked", done.stderr[-2000:]


@pytest.fixture
def anew():
    """Kernels are looked for anew in the test, and again after it."""
    cpu._compiled.cache_clear()
    yield
    cpu._compiled.cache_clear()


def test_without_numba_the_reference_computes(random_matrix, monkeypatch, anew):
    monkeypatch.setitem(sys.modules, "numba", None)
    matrix = random_matrix(40, 64)
    x = torch.randn(1, 64)
    with pytest.warns(UserWarning, match="slow without numba"):
        y = linear(x, stored(matrix), matrix.layout)
    assert relative_error(y, x.double() @ decoded(matrix).double().T) < 1e-5
    with pytest.warns(UserWarning, match="slow without numba"):
        assert torch.equal(dequantize(stored(matrix), matrix.layout), decoded(matrix))
    for leaf in ("import spqr_kernels", "import spqr_kernels.cpu"):  # numba is imported when a kernel runs, not before
        program = f"import sys; {leaf}; print('numba' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


def test_compiles_where_nothing_can_be_written(random_matrix, monkeypatch, anew):
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    matrix = random_matrix(40, 64)
    assert torch.equal(dequantize(stored(matrix), matrix.layout), decoded(matrix))
    assert cpu.kernel("decode").owner.cache_hits == 0


def test_the_benchmark_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels" / "benchmarks"))
    sys.modules.pop("cpu", None)
    import cpu as benchmark

    monkeypatch.setattr(benchmark, "COLD_BYTES", 0)
    times = iter(range(1, 100))

    def timer(calls):
        for call in calls:
            call(0)
        return [float(next(times)) for _ in calls]

    rows = [benchmark.measure((64, 128), batch, share, timer) for batch in (1, 8) for share in (0.0, 0.01)]
    assert all(row["error"] < 4e-3 for row in rows)
    assert rows[0]["ratio"] == 2.0
    assert benchmark.table(rows).count("| 64 x 128 |") == 4
    assert len(benchmark.milliseconds([lambda i: None] * 2, 3)) == 2
    assert benchmark.machine()["threads"] >= 1
    for name in ("cpu", "random_weights"):
        sys.modules.pop(name, None)

"""The ops against the numpy decode and float64 products, on every device that this machine has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spqr_format import Layout, SpqrError, SpqrMatrix
from spqr_kernels import dequantize, dispatch, joined, linear, ops, reference
from spqr_kernels.checks import aligned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [
    (1, 1),
    (1, 16),
    (16, 1),
    (17, 33),
    (16, 64),
    (64, 688),
    (688, 256),
    (1376, 512),
    (512, 1376),
    (40, 130),
    (256, 2048),
    (33, 4400),
]
LARGE = [(4096, 4096), (11008, 4096), (4096, 11008)]
KINDS = [
    {"weight_bits": 3, "statistics": "bilevel"},
    {"weight_bits": 3, "statistics": "bilevel", "permuted": True},
    {"weight_bits": 2, "statistics": "bilevel", "group_size": 32, "outliers": 0.0},
    {"weight_bits": 3, "statistics": "bilevel", "outliers": 0.0},  # batch 33 then takes the decode kernel
    {"weight_bits": 2, "statistics": "bilevel", "outliers": 0.02},
    {"weight_bits": 4, "statistics": "bilevel"},
    {"weight_bits": 4, "statistics": "direct", "group_size": 128},
    {"weight_bits": 3, "statistics": "direct", "group_size": 64, "permuted": True},
    {"weight_bits": 3, "statistics": "bilevel", "group_size": 64},
]
# Relative norm against float64 of the stored weights. fp16: the bound of the project. bf16 outputs alone round by 1.7e-3.
BOUND = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}


def stored(matrix, device):
    return {leaf: torch.from_numpy(tensor.copy()).to(device) for leaf, tensor in matrix.pack().items()}


def relative_error(y, expected):
    assert torch.isfinite(y).all()
    return ((y.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_reference_decodes_as_numpy_does_bit_for_bit(random_matrix, shape, kind):
    matrix = random_matrix(*shape, **kind)
    decoded = reference.dequantize(stored(matrix, "cpu"), matrix.layout)
    np.testing.assert_array_equal(decoded.numpy(), matrix.dequantize())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("device", DEVICES)
def test_linear_matches_float64(random_matrix, device, shape, kind):
    if device == "cpu" and shape in LARGE:
        pytest.skip("minutes on a CPU; the same code as for the other shapes")
    matrix = random_matrix(*shape, **kind)
    tensors = stored(matrix, device)
    exact = torch.from_numpy(matrix.dequantize()).double()
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).half()
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32) if shape not in LARGE else (torch.float16, torch.bfloat16):
        for batch in (0, 1, 2, 7, 16, 33) if device == "cuda" else (0, 1, 7):
            x = torch.randn(batch, shape[1], generator=generator).to(dtype)
            y = linear(x.to(device), tensors, matrix.layout, bias.to(device, dtype))
            assert y.shape == (batch, shape[0])
            assert y.dtype == dtype
            if batch:
                expected = x.double() @ exact.T + bias.to(dtype).double()
                assert relative_error(y, expected) < BOUND[dtype], (dtype, batch)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("device", DEVICES)
def test_dequantize_matches_numpy(random_matrix, device, kind):
    for shape in ((1, 1), (17, 33), (688, 256), (40, 130)):
        matrix = random_matrix(*shape, **kind)
        expected = matrix.dequantize()
        exact = dequantize(stored(matrix, device), matrix.layout, torch.float32).cpu().numpy()
        if device == "cpu":
            np.testing.assert_array_equal(exact, expected)
        else:  # a GPU fuses multiply and add
            np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
        half = dequantize(stored(matrix, device), matrix.layout, torch.float16).cpu().numpy()
        np.testing.assert_allclose(half.astype(np.float32), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [KINDS[0], KINDS[1], KINDS[3], KINDS[6], KINDS[8]], ids=lambda k: "-".join(map(str, k.values()))
)
@pytest.mark.gpu
def test_every_batch_on_cuda(random_matrix, kind):
    """Each width of the batched kernel, with one and with several of it beside each other, and what comes after the last."""
    for columns in (2048 + 256, 4096):  # an odd and an even number of chunks
        matrix = random_matrix(200, columns, **kind)
        tensors = stored(matrix, "cuda")
        whole = joined.join(tensors, matrix.layout)  # of which products overlap
        exact = torch.from_numpy(matrix.dequantize()).double()
        for batch in (1, 2, 5, 8, 9, 16, 17, 40, 65, 300, 1300):
            for dtype in (torch.float16, torch.bfloat16)[: 2 if batch in (5, 9, 17, 300) else 1]:  # each is compiled anew
                x = torch.randn(batch, columns).to(dtype)
                y = linear(x.cuda(), tensors, matrix.layout)
                assert relative_error(y, x.double() @ exact.T) < BOUND[dtype], (dtype, batch)
                assert torch.equal(y, linear(x.cuda(), tensors, matrix.layout))
                x = x.cuda()
                for z in [torch.ops.spqr.linear(x, None, [whole], *ops.geometry(matrix.layout)) for _ in range(4)]:
                    assert torch.equal(z, y), (dtype, batch)


@pytest.mark.parametrize(
    "kind",
    [*(kind for kind in KINDS if "permuted" not in kind), {"weight_bits": 3, "permuted": True, "outliers": 0.0},
     {"weight_bits": 4, "group_size": 32}, {"weight_bits": 3, "outliers": 0.05},
     {"weight_bits": 3, "statistics": "direct", "group_size": 48},
     {"weight_bits": 2, "statistics": "direct", "group_size": 16}],
    ids=lambda k: "-".join(map(str, k.values())),
)  # fmt: skip
@pytest.mark.gpu
def test_small_batches_on_cuda(random_matrix, monkeypatch, kind):
    """Which kernel is theirs, and all of its kinds: rows and columns that fill no program and no block, several programs, x as
    it is and made anew, and products beside each other give the same bits."""
    from spqr_kernels import small

    taken = []
    kernel = small.linear
    monkeypatch.setattr(small, "linear", lambda x, *rest: taken.append(len(x)) or kernel(x, *rest))
    for rows, columns in ((40, 250), (200, 2048 + 256), (1000, 4096 - 11)):
        matrix = random_matrix(rows, columns, **kind)
        tensors = stored(matrix, "cuda")
        whole = joined.join(tensors, matrix.layout)
        exact = torch.from_numpy(matrix.dequantize()).double()
        bias = torch.randn(rows).bfloat16()
        half = [(batch, torch.float16) for batch in (*range(2, 10), 12, 15, 16, 17, 32)]
        for batch, dtype in [*half, *((batch, torch.bfloat16) for batch in (3, 8, 9, 16))]:
            x = torch.randn(batch, columns).to(dtype)
            added = bias if dtype == torch.bfloat16 else None  # each pair is compiled anew
            expected = x.double() @ exact.T + (0 if added is None else added.double())
            x, added = x.cuda(), None if added is None else added.cuda()
            taken.clear()
            y = linear(x, tensors, matrix.layout, added)
            assert taken == [batch]
            assert relative_error(y, expected) < BOUND[dtype], (rows, dtype, batch)
            for z in [torch.ops.spqr.linear(x, added, [whole], *ops.geometry(matrix.layout)) for _ in range(4)]:
                assert torch.equal(z, y), (rows, dtype, batch)


@pytest.mark.gpu
def test_an_infinite_activation_in_small_batches_on_cuda(random_matrix):
    """It reaches its own row of y alone, and there gives no NaN where its column has no outlier: neither beside one nor in the
    first column of a chunk."""
    matrix = random_matrix(64, 1024, outliers=0.05)
    tensors = stored(matrix, "cuda")
    weight = torch.from_numpy(matrix.dequantize()).double()
    plain = weight.abs() > 1e-3
    plain[np.repeat(np.arange(64), np.diff(matrix.crow_indices)), matrix.col_indices] = False
    for column in (0, 5, 256, 700):
        x = torch.randn(4, 1024).half()
        x[1, column], x[2, column] = float("inf"), -float("inf")
        y = linear(x.cuda(), tensors, matrix.layout).double().cpu()
        expected = x.double() @ weight.T
        assert relative_error(y[::3], expected[::3]) < 1e-3
        clear = plain[:, column]
        assert clear.sum() > 30
        assert torch.equal(y[1:3, clear], expected[1:3, clear])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[4], KINDS[6]], ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.gpu
def test_the_kernel_for_gpus_without_wgmma_on_cuda(random_matrix, kind):
    """On Hopper nothing dispatches to it, so it is called by its name."""
    from spqr_kernels import decode

    matrix = random_matrix(200, 2048 + 256, **kind)
    tensors = stored(matrix, "cuda")
    exact = torch.from_numpy(matrix.dequantize()).double()
    for batch, dtype in ((2, torch.float16), (9, torch.float16), (33, torch.float16), (9, torch.bfloat16)):
        x = torch.randn(batch, 2048 + 256).to(dtype)
        y = decode.linear(x.cuda(), tensors, matrix.layout, None)
        assert relative_error(y, x.double() @ exact.T) < BOUND[dtype], (dtype, batch)
        assert torch.equal(y, decode.linear(x.cuda(), tensors, matrix.layout, None))


WIDE = [
    {"weight_bits": 3, "group_size": 32},
    {"weight_bits": 2, "group_size": 64},
    {"weight_bits": 4, "group_size": 64, "outliers": 0.0},
]


@pytest.mark.parametrize("kind", WIDE, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("kernel", ["one-row", "small", "gemm", "decode", "unpack"])
@pytest.mark.gpu
def test_groups_of_several_blocks_on_cuda(random_matrix, kernel, kind):
    """Sets of statistics codes that cover several chunks: full ones alone, with one behind them that is not, or only that."""
    from spqr_kernels import decode

    for chunks in (1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 43):
        columns = 256 * chunks
        matrix = random_matrix(200, columns, **kind)
        tensors = stored(matrix, "cuda")
        exact = torch.from_numpy(matrix.dequantize())
        if kernel == "unpack":
            assert torch.equal(dequantize(tensors, matrix.layout, torch.float16).cpu(), exact.half()), chunks
        batches = {"one-row": (1,), "small": (2, 3, 8, 13, 32), "gemm": (33, 40, 300), "decode": (2, 33), "unpack": ()}
        for batch in batches[kernel]:
            x = torch.randn(batch, columns).half()
            product = decode.linear if kernel == "decode" else linear  # on Hopper nothing dispatches to it
            y = product(x.cuda(), tensors, matrix.layout, None)
            assert relative_error(y, x.double() @ exact.double().T) < 1e-3, (chunks, batch)


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.gpu
def test_every_width_of_batches_on_cuda(random_matrix, monkeypatch, width):
    """Whatever a plan would choose: whole pieces and shared ones, by many programs too, rows that are no multiple of 8, and
    more outliers in a cell than are copied."""
    from spqr_kernels import gemm, gemm_plan

    monkeypatch.setattr(gemm_plan, "CHOICES", {width: gemm_plan.CHOICES[width]})
    monkeypatch.setattr(gemm, "_launches", gemm._launches.__wrapped__)  # remembered ones are of another plan
    for (rows, columns), share in (((200, 256), 0.01), ((72, 4096), 0.0), ((72, 4096), 0.01), ((133, 2816), 0.06)):
        matrix = random_matrix(rows, columns, outliers=share)
        tensors = stored(matrix, "cuda")
        exact = torch.from_numpy(matrix.dequantize()).double()
        for batch, dtype in (
            (17, torch.float16),
            (width, torch.bfloat16),
            (width + 3, torch.float16),
            (2 * width, torch.float16),
        ):
            x = torch.randn(batch, columns).to(dtype)
            bias = torch.randn(rows).to(dtype)
            y = gemm.linear(x.cuda(), tensors, matrix.layout, bias.cuda())
            expected = x.double() @ exact.T + bias.double()
            assert relative_error(y, expected) < (1e-3 if dtype == torch.float16 else 5e-3), (rows, columns, share, batch)
            assert torch.equal(y, gemm.linear(x.cuda(), tensors, matrix.layout, bias.cuda()))


def test_which_matrices_the_tensor_core_kernels_take():
    def taken(columns, group_size, statistics="bilevel"):
        return dispatch.whole_chunks(Layout(64, columns, 3, group_size, statistics))

    assert all(taken(columns, group) for columns in (250, 256, 2816) for group in (16, 32, 64))
    assert not any(taken(2816, group) for group in (48, 128, 256))
    assert taken(2816, 48, "direct")
    assert not any(taken(240, group, kind) for group in (16, 32) for kind in ("bilevel", "direct"))


def test_which_kernel_a_batch_takes(random_matrix, monkeypatch):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import decode, gemm, matvec, small

    for module in (matvec, small, gemm, decode):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, "linear", lambda x, *rest, name=name: taken.append(name) or torch.zeros(len(x), 32))
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    batches = (1, 2, 32, 33, dispatch.GEMM_BATCH)
    for hopper, expected in (
        (True, ["matvec", "small", "small", "gemm", "gemm"]),
        (False, ["matvec", "decode", "decode", "decode"]),
    ):
        monkeypatch.setattr(dispatch, "has_wgmma", lambda device, hopper=hopper: hopper)
        taken: list[str] = []
        for permuted in (False, True):
            matrix = random_matrix(32, 256, permuted=permuted, outliers=0.0)
            for batch in batches:
                linear(torch.zeros(batch, 256).half(), stored(matrix, "cpu"), matrix.layout)
        assert taken == 2 * expected
        taken.clear()
        permuted_outliers = random_matrix(32, 256, permuted=True, outliers=0.1)
        linear(torch.zeros(2, 256).half(), stored(permuted_outliers, "cpu"), permuted_outliers.layout)
        assert taken == []


@pytest.mark.parametrize(("outliers", "most"), [(0, {4096: 32, 8192: 16}), (1, {6144: 32, 6656: 16})])
def test_up_to_how_many_rows_the_kernel_of_small_batches_is_faster(outliers, most):
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import small

    for rows, batch in most.items():
        whole, half = (Layout(out, 4096 + 4096 * (outliers == 0), outliers=outliers) for out in (rows, rows // 2))
        assert small.most_rows((whole,), torch.float16) == small.most_rows((half, half), torch.float16) == batch
        assert small.most_rows((whole,), torch.bfloat16) == 16
        few, more = (Layout(out, 4096, outliers=outliers) for out in (2048, 2064))
        assert [small.most_rows((each,), torch.bfloat16) for each in (few, more)] == [32, 16]


def test_which_matrices_are_large_for_small_batches():
    pytest.importorskip("triton", reason="no Triton")
    from spqr_kernels import small

    found = [small.is_large(width, 688 * 16, outliers) for width in (8, 16) for outliers in (False, True)]
    assert found == [False, False, False, True]  # 11008 x 4096
    assert all(small.is_large(width, 512 * 32, outliers) for width in (8, 16) for outliers in (False, True))


@pytest.mark.parametrize("device", DEVICES)
def test_crowded_outliers(random_matrix, device):
    """Cells with up to all of their 2048 weights, beside empty ones: more than kernels fetch at once."""
    matrix = random_matrix(100, 1024, outliers=0.001)
    dense = matrix.dequantize()
    columns = {0: range(128), 17: range(100, 140), 40: range(1024), 41: range(3, 1024, 2), 99: range(512, 640)}
    rows = [np.arange(1024)[list(columns.get(row, range(row % 3)))] for row in range(100)]
    rows[:16] = [np.arange(128)] * 16
    values = np.random.default_rng(3).uniform(-0.1, 0.1, sum(map(len, rows))).astype(np.float16)
    matrix = SpqrMatrix(
        matrix.layout.with_outliers(len(values)), matrix.codes, tile_stats=matrix.tile_stats, scale_codes=matrix.scale_codes,
        zero_codes=matrix.zero_codes, crow_indices=np.cumsum([0, *map(len, rows)]), col_indices=np.concatenate(rows),
        values=values,
    )  # fmt: skip
    assert np.abs(matrix.dequantize() - dense).max() > 0.05
    tensors = stored(matrix, device)
    assert torch.equal(dequantize(tensors, matrix.layout, torch.float16).cpu(), torch.from_numpy(matrix.dequantize()).half())
    exact = torch.from_numpy(matrix.dequantize()).double()
    for batch in (1, 3, 8, 12, 20, 40, 100) if device == "cuda" else (1, 3, 20):
        x = torch.randn(batch, 1024).half()
        assert relative_error(linear(x.to(device), tensors, matrix.layout), x.double() @ exact.T) < 1e-3, batch


@pytest.mark.parametrize("device", DEVICES)
def test_any_rank_and_stride(random_matrix, device):
    matrix = random_matrix(48, 64)
    tensors = stored(matrix, device)
    exact = torch.from_numpy(matrix.dequantize()).double()
    x = torch.randn(5, 2, 3, 128, device=device).half()[..., ::2]
    assert not x.is_contiguous()
    expected = x.double().cpu() @ exact.T
    for view, target in ((x, expected), (x[0, 0, 0], expected[0, 0, 0]), (x.transpose(0, 1), expected.transpose(0, 1))):
        y = linear(view, tensors, matrix.layout)
        assert y.shape == target.shape
        assert relative_error(y, target) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_large_activations_do_not_overflow(random_matrix, device):
    matrix = random_matrix(64, 256, outliers=0.01)
    exact = torch.from_numpy(matrix.dequantize()).double()
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e30)):
        for batch in (1, 3):
            x = torch.zeros(batch, 256, dtype=dtype)
            x[:, 3] = size
            x[:, 100] = -size
            # halved so that the result itself stays inside fp16
            expected = x.double() @ exact.T
            keep = expected.abs() < (6e4 if dtype == torch.float16 else float("inf"))
            y = linear(x.to(device), stored(matrix, device), matrix.layout).double().cpu()
            assert relative_error(y[keep], expected[keep]) < BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_for_bit(random_matrix, device):
    matrix = random_matrix(200, 1024, outliers=0.02)
    tensors = stored(matrix, device)
    for batch in (1, 5, 40):
        x = torch.randn(batch, 1024, device=device).half()
        first = linear(x, tensors, matrix.layout)
        assert all(torch.equal(first, linear(x, tensors, matrix.layout)) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_with_respect_to_x(random_matrix, device):
    matrix = random_matrix(33, 48)
    tensors = stored(matrix, device)
    exact = torch.from_numpy(matrix.dequantize())
    x = torch.randn(4, 48, device=device, requires_grad=True)
    bias = torch.randn(33, device=device, requires_grad=True)
    grad = torch.randn(4, 33)
    linear(x, tensors, matrix.layout, bias).backward(grad.to(device))
    torch.testing.assert_close(x.grad.cpu(), grad @ exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad.cpu(), grad.sum(0))


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_pass_torch_opcheck(random_matrix, device):
    matrix = random_matrix(17, 33)
    tensors = stored(matrix, device)
    bias = torch.randn(17, device=device, requires_grad=True)
    for stack in ([tensors[leaf] for leaf in matrix.layout.tensors()], [joined.join(tensors, matrix.layout)]):
        for x in (torch.randn(3, 33, device=device, requires_grad=True), torch.randn(2, 3, 33, device=device)):
            torch.library.opcheck(torch.ops.spqr.linear, (x, bias, stack, *ops.geometry(matrix.layout)))
        torch.library.opcheck(torch.ops.spqr.dequantize, (stack, *ops.geometry(matrix.layout), torch.float16))


@pytest.mark.parametrize("batch", [1, 5, 16, 20])
@pytest.mark.gpu
def test_products_run_in_a_cuda_graph(random_matrix, batch):
    matrix = random_matrix(256, 4096)  # of which several programs share the columns
    tensors = stored(matrix, "cuda")
    x = torch.randn(batch, 4096, device="cuda").half()
    expected = linear(x, tensors, matrix.layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, tensors, matrix.layout)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


BROKEN = {
    "missing": lambda t: t.pop("tile_stats"),
    "dtype": lambda t: t.update(weight=t["weight"].float()),
    "short": lambda t: t.update(weight=t["weight"][:-1]),
    "transposed": lambda t: t.update(stat_codes=t["stat_codes"].t().contiguous().t()),
    "pointers": lambda t: t.update(outlier_ptr=t["outlier_ptr"][:-1]),
    "outliers": lambda t: t.update(outliers=t["outliers"].long()),
    "extra": lambda t: t.update(group_zp=torch.zeros(1, dtype=torch.uint8)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tensor_that_does_not_fit_is_refused_before_launch(random_matrix, fault):
    matrix = random_matrix(40, 64)
    tensors = stored(matrix, "cpu")
    BROKEN[fault](tensors)
    with pytest.raises(SpqrError) as caught:
        linear(torch.randn(1, 64), tensors, matrix.layout)
    assert caught.value.code == "E509"


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("device", DEVICES)
def test_one_tensor_that_joins_all_gives_the_same_bits(random_matrix, device, kind):
    matrix = random_matrix(40, 512, **kind)
    tensors = stored(matrix, device)
    whole = joined.join(tensors, matrix.layout)
    parts = joined.split(whole, matrix.layout)
    ends = 0
    for leaf, part in parts.items():
        assert part.dtype == tensors[leaf].dtype
        assert torch.equal(part, tensors[leaf]), leaf
        begin = part.data_ptr() - whole.data_ptr()
        assert begin % 128 == 0
        assert begin >= ends
        ends = begin + part.nbytes
    assert list(parts) == list(matrix.layout.tensors())
    assert whole.nbytes - 128 < ends <= whole.nbytes
    for batch in (1, 5):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(batch, 512, device=device).to(dtype)
            y = torch.ops.spqr.linear(x, None, [whole], *ops.geometry(matrix.layout))
            assert torch.equal(y, linear(x, tensors, matrix.layout)), (batch, dtype)
    again = torch.ops.spqr.dequantize([whole], *ops.geometry(matrix.layout), torch.float32)
    assert torch.equal(again, dequantize(tensors, matrix.layout))


def test_a_joined_tensor_that_does_not_fit_is_refused_before_launch(random_matrix):
    matrix = random_matrix(40, 64)
    whole = joined.join(stored(matrix, "cpu"), matrix.layout)
    twice = whole.repeat(2)
    for wrong in (whole[:-1], whole.float(), whole.view(2, -1), twice[::2], twice[1 : len(whole) + 1]):
        with pytest.raises(SpqrError) as caught:
            torch.ops.spqr.linear(torch.randn(1, 64), None, [wrong], *ops.geometry(matrix.layout))
        assert caught.value.code == "E509"


def test_an_operand_that_does_not_fit_is_refused_before_launch(random_matrix):
    matrix = random_matrix(40, 64)
    tensors = stored(matrix, "cpu")
    for x in (torch.randn(1, 63), torch.randint(0, 2, (1, 64)), torch.tensor(1.0)):
        with pytest.raises(SpqrError) as caught:
            linear(x, tensors, matrix.layout)
        assert caught.value.code == "E509"
    with pytest.raises(SpqrError):
        linear(torch.randn(1, 64), tensors, matrix.layout, bias=torch.randn(39))


def test_a_view_that_kernels_cannot_read_is_copied():
    whole = torch.arange(64, dtype=torch.int16)
    assert aligned(whole) is whole
    view = whole[1:]
    copy = aligned(view)
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, view)
    for gaps in (whole[::2], whole[:1].expand(64)):
        assert aligned(gaps).is_contiguous()
        assert torch.equal(aligned(gaps), gaps)


@pytest.mark.gpu
def test_views_in_the_middle_of_memory_on_cuda(random_matrix):
    matrix = random_matrix(32, 512, outliers=0.02)
    tensors = stored(matrix, "cuda")
    for leaf in ("outlier_ptr", "outliers"):
        tensors[leaf] = torch.cat([tensors[leaf][:1], tensors[leaf]])[1:]
    exact = torch.from_numpy(matrix.dequantize()).double()
    for batch in (1, 3):
        x = torch.randn(batch * 512 + 1, device="cuda").half()[1:].view(batch, 512)
        assert relative_error(linear(x, tensors, matrix.layout), x.double().cpu() @ exact.T) < 1e-3

"""Eager products of one row past the dispatcher: the launch that the operator makes, and only where nothing watches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from spqr_format.layout import Layout
from spqr_kernels import dispatch, eager, joined, ops, overlap

pytest.importorskip("triton", reason="no Triton")
FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def launches(monkeypatch):
    """Of a GPU that is pretended: what is launched, and with which addresses."""
    from spqr_kernels.launch import Launch

    made = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *addresses: made.append((self, addresses)))
    for module in (dispatch, eager):
        monkeypatch.setattr(module, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(overlap, "options", lambda *_: overlap.NONE)
    dispatch.in_one_launch.cache_clear()
    yield made
    dispatch.in_one_launch.cache_clear()


def matrices(rows, bias, columns=512, **kind):
    """Joined tensors, layouts and biases; no content is looked at."""
    layouts = [Layout(out, columns, **kind) for out in rows]
    whole = [torch.zeros(joined.length(layout), dtype=torch.int32) for layout in layouts]
    return whole, layouts, [None if bias is None else torch.zeros(out, dtype=bias) for out in rows]


def by_operator(x, whole, layouts, biases):
    numbers = [number for layout in layouts for number in ops.geometry(layout)]
    if len(whole) == 1:
        return [torch.ops.spqr.linear_forward(x, biases[0], whole, *numbers)]
    return torch.ops.spqr.linears(x, [bias for bias in biases if bias is not None], whole, numbers)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("bias", [None, FP16, BF16])
@pytest.mark.parametrize("rows", [(48,), (48, 17), (32, 16, 80)])
@pytest.mark.parametrize("kind", [{}, {"outliers": 9, "weight_bits": 4}, {"statistics": "direct", "group_size": 64}])
def test_the_same_launch_with_the_same_addresses(launches, rows, bias, dtype, kind):
    found = matrices(rows, bias, **kind)
    way = eager.OneRow(*found)
    for shape in ((1, 512), (512,), (1, 1, 512)):
        x = torch.zeros(shape, dtype=dtype)
        launches.clear()
        expected, results = by_operator(x, *found), way(x)
        assert [(y.shape, y.dtype) for y in results] == [(y.shape, y.dtype) for y in expected]
        (launch, theirs), (own_launch, ours) = launches
        assert own_launch is launch
        # Where y is, or stands in for a bias that is not there, it is each one's own.
        own = {y.data_ptr(): target.data_ptr() for y, target in zip(results, expected, strict=True)}
        assert tuple(own.get(address, address) for address in ours) == theirs


def refused(way, x):
    """Whether nothing is done for x."""
    return way(x) is None


def test_other_rows_are_left_to_the_operator(launches):
    way = eager.OneRow(*matrices((48,), None))
    x = torch.zeros(1, 512, dtype=FP16)
    assert way(x) is not None
    buffer = torch.zeros(2, 1032, dtype=FP16)
    for other in (
        x.float(), x.double(), x[:, :511], torch.zeros(2, 512, dtype=FP16), torch.zeros(0, 512, dtype=FP16),
        x.view(512, 1), x.view(2, 256), buffer[:1, :1024:2], buffer[0, 1:513], x.to("meta"), torch.nn.Parameter(x),
    ):  # fmt: skip
        assert refused(way, other), other.shape


@pytest.mark.parametrize("kind", [{"columns": 510}, {"columns": 240}, {"permuted": True}, {"group_size": 48}], ids=str)
def test_other_matrices_are_left_to_the_operator(launches, kind):
    columns = kind.get("columns", 512)
    way = eager.OneRow(*matrices((48,), None, **kind))
    assert refused(way, torch.zeros(1, columns, dtype=FP16))


def test_other_biases_are_left_to_the_operator(launches):
    x = torch.zeros(1, 512, dtype=FP16)
    whole, layouts, biases = matrices((48, 32), FP16)
    assert refused(eager.OneRow(whole, layouts, [biases[0], None]), x)
    assert refused(eager.OneRow(whole, layouts, [None, biases[1]]), x)
    assert refused(eager.OneRow(whole, layouts, [biases[0], biases[1].bfloat16()]), x)
    assert refused(eager.OneRow(whole, layouts, [biases[0], torch.zeros(40, dtype=FP16)[1:33]]), x)
    assert refused(eager.OneRow(whole, [layouts[0], Layout(32, 512, weight_bits=4)], [None, None]), x)


def test_a_bias_that_has_changed_in_its_place_is_seen(launches):
    x = torch.zeros(1, 512, dtype=FP16)
    for change in (lambda bias: bias.clone(), lambda bias: bias.view(BF16)):
        whole, layouts, biases = matrices((48, 32), FP16)
        parameters = [torch.nn.Parameter(bias, requires_grad=False) for bias in biases]
        way = eager.OneRow(whole, layouts, parameters)
        assert way(x) is not None
        parameters[1].data = change(biases[1])
        assert refused(way, x)
    assert way.is_of(whole, parameters)
    assert not way.is_of(whole, biases)
    assert not way.is_of(copy.deepcopy(whole), parameters)


def test_whatever_watches_finds_the_operator(launches):
    way = eager.OneRow(*matrices((48,), None))
    x = torch.zeros(1, 512, dtype=FP16)
    seen = []

    def call(x):
        seen.append(way(x))
        return x

    with FlopCounterMode(display=False):
        call(x)
    torch.vmap(call)(torch.zeros(3, 512, dtype=FP16))
    torch.func.jvp(call, (x,), (x,))
    make_fx(call)(x)
    torch.jit.trace(call, x, check_trace=False)
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, x))
    assert len(seen) >= 6
    assert all(found is None for found in seen)
    assert not launches
    assert way(x) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_the_same_numbers_on_cuda(random_matrix, dtype):
    """As the operator, bit for bit, and within a CUDA graph."""
    found = [random_matrix(rows, 512, outliers=0.01, seed=rows) for rows in (48, 40, 600)]
    layouts = [matrix.layout for matrix in found]
    whole = [
        joined.join({leaf: torch.from_numpy(part.copy()) for leaf, part in matrix.pack().items()}, matrix.layout).cuda()
        for matrix in found
    ]
    x = torch.randn(1, 1, 512, dtype=dtype, device="cuda")
    for bias in (None, torch.half):
        biases = [None if bias is None else torch.randn(layout.out_features, dtype=bias, device="cuda") for layout in layouts]
        for some in (slice(0, 1), slice(1, 3), slice(0, 3)):
            given = whole[some], layouts[some], biases[some]
            way = eager.OneRow(*given)
            expected = by_operator(x, *given)
            assert all(map(torch.equal, way(x), expected))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = way(x)
            for y in results:
                y.zero_()
            graph.replay()
            assert all(map(torch.equal, results, expected))

"""Eager calls of layers that share an input: the first computes for all, and never is a stale result given out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from spqr_kernels.joined import length
from spqr_loaders import siblings
from spqr_loaders.linear import SpqrLinear
from spqr_loaders.siblings import share


class Attention(nn.Module):
    """Projections of two inputs, as in self-attention where both are one tensor."""

    def __init__(self, random_matrix, bias):
        super().__init__()
        for index, (name, rows) in enumerate((("q_proj", 48), ("k_proj", 32), ("v_proj", 32))):
            matrix = random_matrix(rows, 256, seed=index)
            self.add_module(name, SpqrLinear.from_matrix(matrix, torch.full((rows,), 0.5) if bias else None))
        for layer in self.children():
            layer.join()

    def forward(self, x, other):
        return self.q_proj(x), self.k_proj(other), self.v_proj(other)


@pytest.fixture(params=[False, True], ids=["", "bias"])
def model(random_matrix, request):
    return Attention(random_matrix, request.param)


def count(calls):
    """Calls of the operators while `calls` runs, and what it returns."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        result = calls()
    return {e.key.removeprefix("spqr::"): e.count for e in profile.key_averages() if e.key.startswith("spqr::")}, result


@pytest.mark.parametrize("rows", [1, 5])
def test_one_call_computes_all(model, rows):
    x = torch.randn(1, rows, 256)
    single, expected = count(lambda: model(x, x))
    share(model)
    together, results = count(lambda: model(x, x))
    assert single == {"linear_forward": 3}
    assert together == {"linears": 1}
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert model.q_proj.siblings.results is None, "nothing stays alive behind the last one"


def test_layers_of_another_kind_are_not_among_them(model, random_matrix):
    model.q_proj = SpqrLinear.from_matrix(random_matrix(48, 256, weight_bits=4), model.q_proj.bias)
    model.q_proj.join()
    share(model)
    assert model.q_proj.siblings is None
    assert model.k_proj.siblings.layers == (model.k_proj, model.v_proj)
    x = torch.randn(1, 256)
    together, results = count(lambda: model(x, x))
    assert together == {"linears": 1, "linear_forward": 1}
    with torch.no_grad():
        expected = [layer.dequantize()(x) for layer in model.children()]
    for y, target in zip(results, expected, strict=True):
        torch.testing.assert_close(y, target, rtol=1e-4, atol=1e-4)


def test_no_rows_very_many_and_gradients_are_left_alone(model):
    share(model)
    for number in (0, 2000):  # where one launch is no faster, and the results would be large
        rows = torch.randn(number, 256)
        assert count(lambda rows=rows: model(rows, rows))[0] == {"linear_forward": 3}
    x = torch.randn(1, 256, requires_grad=True)
    sum(y.sum() for y in model(x, x)).backward()
    expected = sum(layer.dequantize().weight.sum(0) for layer in model.children())
    torch.testing.assert_close(x.grad, expected[None], rtol=1e-4, atol=1e-4)


def test_an_input_that_changed_meanwhile_is_computed_anew(model):
    share(model)
    x = torch.randn(1, 256)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        assert torch.equal(model.k_proj(x), model.k_proj(x.clone()))
        first = model.q_proj(x)
        expected = first.clone()
        first.mul_(2)
        assert torch.equal(model.q_proj(x), expected), "a result is given out once"
        with torch.inference_mode():
            inference = torch.randn(1, 256)
            model.q_proj(inference)
            inference.mul_(2)
            assert torch.equal(model.k_proj(inference), model.k_proj(inference.clone()))


def test_cross_attention_computes_for_itself_from_the_second_time_on(model):
    x, other = torch.randn(2, 1, 256)
    with torch.no_grad():
        expected = model(x, other)
    share(model)
    for calls in ({"linears": 1, "linear_forward": 2}, {"linear_forward": 3}, {"linear_forward": 3}):
        counted, results = count(lambda: model(x, other))
        assert counted == calls
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_layer_that_was_replaced_or_moved_is_not_computed_by_others(model, random_matrix):
    share(model)
    x = torch.randn(1, 256)
    new = random_matrix(32, 256, seed=9)
    model.k_proj = SpqrLinear.from_matrix(new, model.k_proj.bias)
    with torch.no_grad():
        _, k, _ = model(x, x)
        assert torch.equal(k, model.k_proj(x.clone()))
        model.v_proj.weight = nn.Parameter(model.v_proj.weight.clone(), requires_grad=False)
        counted, _ = count(lambda: model(x, x))
    assert "linears" not in counted


def test_a_result_without_gradient_is_not_given_where_one_is_asked_for(model):
    share(model)
    x = torch.randn(1, 256, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    model.k_proj(x).sum().backward()
    torch.testing.assert_close(x.grad, model.k_proj.dequantize().weight.sum(0)[None], rtol=1e-4, atol=1e-4)


def test_results_of_before_a_layer_changed_are_let_go(model):
    share(model)
    x = torch.randn(1, 256)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.k_proj.state_dict().items()}
    with torch.no_grad():
        model.q_proj(x)
        model.k_proj.load_state_dict(state)
        assert (model.k_proj(x) == 0).all()
    model.k_proj.siblings.in_vain = False
    with torch.no_grad():
        model.q_proj(x)
        model.k_proj.bias = nn.Parameter(torch.full((32,), 7.0), requires_grad=False)
        assert (model.k_proj(x) == 7).all()


def test_results_stay_on_their_stream(model, monkeypatch):
    share(model)
    current = 1
    monkeypatch.setattr(siblings, "_stream", lambda x: current)
    x = torch.randn(1, 256)
    with torch.no_grad():
        model.q_proj(x)
        current = 2
        assert count(lambda: model.k_proj(x))[0] == {"linear_forward": 1}
        current = 1
        assert count(lambda: model.k_proj(x))[0] == {}


def test_layers_on_several_devices_compute_for_themselves(model):
    x = torch.randn(1, 256)
    k = model.k_proj
    model.k_proj = SpqrLinear(k.layout, bias=k.bias is not None, device="meta")
    model.k_proj.lie_in(torch.empty(length(k.layout), dtype=torch.int32, device="meta"))
    assert model.k_proj.is_joined()
    share(model)
    with torch.no_grad():
        counted, y = count(lambda: model.q_proj(x))
        assert counted == {"linear_forward": 1}
        torch.testing.assert_close(y, model.q_proj.dequantize()(x), rtol=1e-4, atol=1e-4)


def test_copies_are_siblings_among_themselves(model):
    share(model)
    x = torch.randn(1, 256)
    with torch.no_grad():
        model.q_proj(x)  # leaves results behind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q_proj.siblings.layers == (other.q_proj, other.k_proj, other.v_proj)
        assert other.q_proj.siblings.results is None
        counted, results = count(lambda other=other: other(x, x))
        assert counted == {"linears": 1}
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(results, model(x.clone(), x.clone()), strict=True))

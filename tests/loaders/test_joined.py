"""The stored tensors of a layer lie in one: what that saves, and that no forward ever computes with what is no longer there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spqr_format.layout import Layout
from spqr_loaders import SpqrFormatConfig, SpqrLinear
from spqr_loaders.siblings import share

from .conftest import IDS, How, Quantized, layers, rtn

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tiny: Quantized) -> Any:
    """Joined, as loading does where a layer is on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    for layer in layers(model).values():
        assert layer.joined is None, "it may be mapped from the file"
        layer.join()
    return model


def layer_of(seed: int, how: How = How(share=0.02)) -> SpqrLinear:  # noqa: B008, frozen
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    layer = SpqrLinear.from_matrix(rtn(weight, how))
    layer.join()
    return layer


def expected(layer: SpqrLinear, x: Tensor = X) -> Tensor:
    """By the single tensors, which joining leaves as they are."""
    return x @ layer.dequantize().weight.T


def assert_close(y: Tensor, target: Tensor) -> None:
    torch.testing.assert_close(y, target, rtol=1e-4, atol=1e-4)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def assert_in_one(layer: SpqrLinear) -> None:
    """Parameters and the joined tensor have one storage, and it has room for nothing else."""
    assert layer.is_joined()
    assert layer.joined is not None
    tensors = layer.tensors().values()
    assert {t.untyped_storage().data_ptr() for t in tensors} == {layer.joined.untyped_storage().data_ptr()}
    assert all(t.data_ptr() % 16 == 0 for t in tensors)
    assert layer.joined.untyped_storage().nbytes() < sum(t.nbytes for t in tensors) + 128 * len(tensors)


def inputs_of_graphs(model: nn.Module) -> list[int]:
    """How many inputs each graph has that torch.compile makes of a forward, all but the ids at addresses that stay."""
    counts = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        moving = [e for e in examples if not getattr(e, "_dynamo_static_input_type", None)]
        assert len(moving) == 1, "CUDA graphs would copy it at every replay"
        counts.append(len(examples))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(IDS, use_cache=False)
    return counts


def test_a_compiled_model_has_as_many_inputs_as_the_dense_one(tiny, model):
    dense = AutoModelForCausalLM.from_pretrained(tiny.folder, quantization_config=SpqrFormatConfig(dequantize=True))
    for either in (model, dense):
        either.model.layers = either.model.layers[:2]
    assert inputs_of_graphs(model) == inputs_of_graphs(dense)


def test_a_joined_model_holds_nothing_twice(model):
    for layer in layers(model).values():
        assert_in_one(layer)
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(layer.leaves)
    tensors = [*model.parameters(), *model.buffers()]
    stored = sum(t.nbytes for t in {id(t): t for t in tensors}.values())
    assert storage_bytes(tensors) < stored + 128 * sum(len(layer.leaves) for layer in layers(model).values())


@pytest.mark.parametrize("how", [How(), How(4, 32, "direct"), How(2, share=0.1), How(3, permuted=True)], ids=str)
def test_every_kind_of_layer_can_be_joined(how):
    layer = layer_of(3, how)
    assert_in_one(layer)
    assert_close(layer(X), expected(layer))


def moved(layer: SpqrLinear) -> None:
    layer._apply(lambda t: t.clone())  # what `.to` another device does


def cast(layer: SpqrLinear) -> None:
    layer.half()


def loaded(layer: SpqrLinear) -> None:
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()})


def assigned(layer: SpqrLinear) -> None:
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=True)


def shared(layer: SpqrLinear) -> None:
    layer.share_memory()


@pytest.mark.parametrize("change", [moved, cast, loaded, assigned, shared], ids=lambda function: function.__name__)
def test_a_changed_layer_is_joined_and_holds_nothing_twice(change):
    layer = layer_of(0)
    target, parameters = layer(X), dict(layer.named_parameters())
    change(layer)
    assert_in_one(layer)
    assert torch.equal(layer(X), target)
    if change is not assigned:
        assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())
    assert layer.weight.is_shared() == (change is shared)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_joined(again):
    layer = layer_of(0)
    names, target = [name for name, _ in layer.named_parameters()], layer(X)
    with torch.no_grad():
        layer(X[:1])
    other = again(layer)
    assert_in_one(other)
    assert_in_one(layer)
    assert layer._one_row is not None
    assert other._one_row is None, "it is of the other's tensors"
    assert [name for name, _ in other.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(other(X), target)
    if again is not copy.copy:
        other.weight.zero_()
        assert torch.equal(layer(X), target)
        assert_close(other(X), expected(other))


def test_a_pickle_holds_every_tensor_once():
    layer = layer_of(0)
    assert len(pickle.dumps(layer)) < sum(t.nbytes for t in layer.tensors().values()) + 8192


def by_setattr(layer: SpqrLinear, leaf: str, tensor: Tensor) -> None:
    setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))


def by_dictionary(layer: SpqrLinear, leaf: str, tensor: Tensor) -> None:
    layer._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def by_data(layer: SpqrLinear, leaf: str, tensor: Tensor) -> None:
    getattr(layer, leaf).data = tensor


def in_place(layer: SpqrLinear, leaf: str, tensor: Tensor) -> None:
    getattr(layer, leaf).copy_(tensor)


WAYS = [by_setattr, by_dictionary, by_data, in_place]


@pytest.mark.parametrize("leaf", ["weight", "stat_codes", "tile_stats"])
@pytest.mark.parametrize("way", WAYS, ids=lambda function: function.__name__)
def test_a_replaced_tensor_is_computed_with(way, leaf):
    layer, other = layer_of(0), layer_of(1)
    before = layer(X)
    way(layer, leaf, getattr(other, leaf).detach().clone())
    target = expected(layer)
    assert not torch.allclose(before, target, atol=1e-2)
    assert_close(copy.deepcopy(layer)(X), target)
    assert_close(layer(X), target)
    if way is not in_place:
        assert layer.joined is None, "the old tensor would stay in memory"
    layer.join()
    assert_in_one(layer)
    assert_close(layer(X), target)


def replaced(layer: SpqrLinear) -> None:
    by_dictionary(layer, "weight", layer.weight.detach().clone())
    layer(X)


def offloaded(layer: SpqrLinear) -> None:
    cpu_offload(nn.Sequential(layer), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "siblings"])
@pytest.mark.parametrize("change", [moved, replaced, offloaded], ids=lambda function: function.__name__)
def test_nothing_of_before_stays_in_memory(change, alone):
    """Whatever held it for the eager calls with one row."""
    parent = nn.Module()
    parent.q_proj, parent.k_proj = layer_of(0), layer_of(1)
    if not alone:
        share(parent)
    with torch.no_grad():
        parent.q_proj(X[:1]), parent.k_proj(X[:1])
    before = weakref.ref(parent.q_proj.joined)
    assert (parent.q_proj._one_row is not None) == alone
    change(parent.q_proj)
    gc.collect()
    assert before() is None
    del parent


@pytest.mark.parametrize("way", [by_setattr, in_place], ids=lambda function: function.__name__)
def test_a_tensor_replaced_after_compiling_is_computed_with(way):
    torch._dynamo.reset()
    layer, other = layer_of(0), layer_of(1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    before = compiled(X)
    assert_close(before, expected(layer))
    way(layer, "weight", other.weight.detach().clone())
    assert not torch.allclose(before, expected(layer), atol=1e-2)
    assert_close(compiled(X), expected(layer))


@pytest.mark.parametrize("assign", [False, True])
def test_another_state_loaded_into_a_compiled_model(assign):
    torch._dynamo.reset()
    layer, other = layer_of(0), layer_of(1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(X)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_close(compiled(X), expected(other))
    assert_in_one(layer)
    assert_in_one(other)
    layer.weight.zero_()
    assert_close(other(X), expected(layer_of(1)))  # whose tensors are its own


def test_functional_call():
    layer, other = layer_of(0), layer_of(1)
    assert_close(torch.func.functional_call(layer, dict(other.named_parameters()), X), expected(other))
    assert_close(layer(X), expected(layer_of(0)))


@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_layers_compute_with_what_their_hooks_bring(compiled):
    torch._dynamo.reset()
    layer, other = layer_of(0), layer_of(1)
    model = nn.Sequential(layer)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    before = run(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)
    assert layer.weight.is_meta
    assert layer.joined is None, "offloading would free nothing"
    assert torch.equal(run(X), before)
    state["0.weight"].copy_(other.weight)
    target = run(X)
    assert not torch.allclose(target, before, atol=1e-2)
    remove_hook_from_submodules(model)
    assert_close(target, expected(layer))
    assert torch.equal(run(X), target)
    layer.join()
    assert_in_one(layer)
    assert torch.equal(run(X), target)


def test_half_moved_layers_are_taken_apart():
    layer = layer_of(0)
    layer.tile_stats = nn.Parameter(layer.tile_stats.to("meta"), requires_grad=False)
    layer.join()
    assert layer.joined is None


def test_a_layer_without_memory_is_not_joined():
    layer = SpqrLinear(Layout(48, 64), device="meta")
    layer.join()
    assert layer.joined is None
    assert layer(X.to("meta")).shape == (3, 48)
    layer.to_empty(device="cpu")
    assert layer.joined is None
    layer.join()
    assert_in_one(layer)


def test_an_exported_program_holds_every_tensor_once():
    layer = layer_of(0)
    program = torch.export.export(layer, (X,))
    assert set(program.state_dict) == {name for name, _ in layer.named_parameters()}
    assert not program.constants
    assert_close(program.module()(X), expected(layer))


def test_what_is_saved_is_no_copy(model):
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    for name, layer in layers(model).items():
        for leaf, parameter in layer.tensors().items():
            saved = state[f"{name}.{leaf}"]
            assert saved.data_ptr() == parameter.data_ptr()
            assert saved.untyped_storage().nbytes() == saved.nbytes, "transformers clones what shares its storage"

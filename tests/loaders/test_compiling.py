"""What `generate` compiles a model with."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig

from spqr_loaders.compiling import compile_config, compile_config_within_a_graph


@pytest.fixture
def compiled_with(monkeypatch):
    """Collects what torch.compile is given, on a GPU of this capability."""
    given = []

    def collect(call, **options):
        given.append(options)
        return call

    def on(capability):
        monkeypatch.setattr(torch, "compile", collect)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return given

    return on


def test_a_step_is_compiled_to_kernels_that_begin_early(tiny, compiled_with):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    for its in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        given = compiled_with((9, 0))
        its.get_compiled_call(None)
        options = given.pop()["options"]
        assert options == {"triton.cudagraphs": True, "triton.enable_pdl": True}
    assert not given


def test_what_the_caller_says_is_taken(tiny, compiled_with):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    given = compiled_with((9, 0))
    model.get_compiled_call(CompileConfig(mode="default"))
    assert given.pop()["mode"] == "default"


def test_older_gpus_and_dense_models_are_as_transformers_has_them(tiny, compiled_with):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    given = compiled_with((8, 0))
    model.get_compiled_call(None)
    assert given.pop() == CompileConfig().to_dict()
    compiled_with((9, 0))
    dense = AutoModelForCausalLM.from_config(model.config)
    dense.get_compiled_call(None)
    assert given.pop() == CompileConfig().to_dict()


def test_what_is_recorded_by_its_caller_is_no_graph_of_its_own(tiny, compiled_with):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    for capability, expected in (((9, 0), {"triton.enable_pdl": True}), ((8, 0), {})):
        given = compiled_with(capability)
        model.__dict__.pop("_compiled_call", None)
        model.get_compiled_call(compile_config_within_a_graph())
        its = given.pop()
        assert its["mode"] is None
        assert its["options"] == expected


def test_inductor_knows_the_options(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with torch._inductor.config.patch(compile_config().options):
        assert torch._inductor.config.triton.enable_pdl

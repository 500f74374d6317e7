"""`generate` with a step recorded as a CUDA graph: the tokens of transformers' own loop. On a CPU it runs unrecorded."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    EosTokenCriteria,
    GenerationMixin,
    MistralConfig,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from spqr_loaders import RecordingError, decoding, graph_decoding

from .conftest import IDS, TINY

STATIC: dict[str, Any] = {"cache_implementation": "static", "custom_generate": graph_decoding, "disable_compile": True}
PADDED = torch.tensor([[0, 0, 0, 5, 6, 7, 8], IDS[0].tolist()])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def forbid_theirs(monkeypatch):
    """transformers' loop must not run in the place of ours."""

    @functools.wraps(GenerationMixin._sample)  # whose signature `generate` looks at
    def fail(*_, **__):
        raise AssertionError("transformers' loop ran")

    monkeypatch.setattr(GenerationMixin, "_sample", fail)


class Collected(BaseStreamer):
    def __init__(self):
        self.put_tensors, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.put_tensors.append(value)

    def end(self):
        self.ended = True


def both(model, ids, monkeypatch, seed=0, **kwargs):
    """What transformers' loop makes, and ours."""
    torch.manual_seed(seed)
    theirs = model.generate(ids, **kwargs)
    with monkeypatch.context() as patch:
        forbid_theirs(patch)
        torch.manual_seed(seed)
        return theirs, model.generate(ids, **kwargs, **STATIC)


@pytest.mark.parametrize("most", [1, 2, 3, 40])
@pytest.mark.parametrize("ids", [IDS, IDS[:, :1], IDS.repeat(3, 1)], ids=["one", "one token", "batch"])
def test_the_same_tokens(model, monkeypatch, ids, most):
    theirs, ours = both(model, ids, monkeypatch, max_new_tokens=most, do_sample=False)
    assert torch.equal(theirs, ours)


def test_the_same_samples(model, monkeypatch):
    how = {"do_sample": True, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "max_new_tokens": 30}
    theirs, ours = both(model, IDS.repeat(2, 1), monkeypatch, **how)
    assert torch.equal(theirs, ours)
    assert not torch.equal(ours[0], ours[1])


def test_padded_prompts_do_not_see_their_padding(model, monkeypatch):
    theirs, ours = both(model, PADDED, monkeypatch, attention_mask=MASK, max_new_tokens=30, do_sample=False)
    assert torch.equal(theirs, ours)
    alone = model.generate(PADDED[:1, 3:], max_new_tokens=30, do_sample=False, **STATIC)
    assert torch.equal(ours[0, 3:], alone[0])


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen3", {}), ("mistral", {"sliding_window": None}), ("phi3", {}), ("gpt_neox", {}), ("opt", {"ffn_dim": 64}),
        ("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {"num_experts": 4, **MOE}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_other_families(monkeypatch, family, more):
    """Positions from the mask or from the cache, learnt or rotary, experts: all of it stays where a recorded step reads it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2000}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1999}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **ends, **more)).eval()
    theirs, ours = both(model, PADDED, monkeypatch, attention_mask=MASK, max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs, ours)


def end_at(model, position: int) -> int:
    """The token that greedy decoding of IDS chooses at this position, for the first time."""
    row = model.generate(IDS, max_new_tokens=position + 1, do_sample=False)[0, IDS.shape[1] :].tolist()
    assert row[position] not in row[:position]
    return row[position]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_end_ends(model, monkeypatch, position):
    end = end_at(model, position)
    theirs, ours = both(model, IDS, monkeypatch, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=3)
    assert ours.shape[1] == IDS.shape[1] + position + 1
    assert torch.equal(theirs, ours)


def test_a_sequence_that_has_ended_is_padded(model, monkeypatch):
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end_at(model, 2), "pad_token_id": 3}
    theirs, ours = both(model, PADDED, monkeypatch, attention_mask=MASK, **how)
    assert (ours[1, IDS.shape[1] + 3 :] == 3).all()
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("position", [None, 0, 2])
def test_a_given_cache_holds_what_transformers_leaves_in_it(model, position):
    """Also where the end was seen a token too late; and it can be gone on with."""
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    if position is not None:
        how |= {"eos_token_id": end_at(model, position), "pad_token_id": 3}
    ended = []
    for custom in ({}, {"custom_generate": graph_decoding}):
        cache = StaticCache(model.config, max_cache_len=64)
        ids = model.generate(IDS, past_key_values=cache, **how, **custom)
        length = int(cache.get_seq_length())
        assert length == ids.shape[1] - 1
        more = torch.cat([ids, IDS], 1)
        ended.append((ids, model.generate(more, past_key_values=cache, **how, **custom)))
    for theirs, ours in zip(*ended, strict=True):
        assert torch.equal(theirs, ours)


def streamed(streamer):
    return STATIC | {"streamer": streamer, "custom_generate": functools.partial(graph_decoding, streamer=streamer)}


def test_tokens_are_streamed_once_each_and_in_order(model, monkeypatch):
    forbid_theirs(monkeypatch)
    streamer = Collected()
    ids = model.generate(IDS, max_new_tokens=9, do_sample=False, **streamed(streamer))
    prompt, *each = streamer.put_tensors
    assert torch.equal(prompt, IDS)
    assert torch.equal(torch.cat(each), ids[0, IDS.shape[1] :])
    assert streamer.ended


def test_what_comes_behind_the_end_is_not_streamed(model, monkeypatch):
    streamer = Collected()
    end = end_at(model, 2)
    forbid_theirs(monkeypatch)
    model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=3, **streamed(streamer))
    assert len(streamer.put_tensors) == 1 + 3
    assert int(streamer.put_tensors[-1]) == end


def test_other_criteria_end_too(model, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = tokenizer.decode(model.generate(IDS, max_new_tokens=20, do_sample=False)[0, IDS.shape[1] :])
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, text[10:13])])
    how = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": stop}
    theirs, ours = both(model, IDS, monkeypatch, **how)
    assert torch.equal(theirs, ours)
    assert ours.shape[1] < IDS.shape[1] + 20


def test_what_cannot_be_recorded_is_transformers_and_says_why(model, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("spqr_loaders.decoding.logger.warning_once", said.append)
    ours = {"custom_generate": graph_decoding, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, **ours), expected)
    assert "a DynamicCache, not static" in said.pop()
    result = model.generate(IDS, return_dict_in_generate=True, output_logits=True, cache_implementation="static", **ours)
    assert torch.equal(result.sequences, expected)
    assert len(result.logits) == 4
    assert "return_dict_in_generate" in said.pop()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 2000}
    config = MistralConfig(num_hidden_layers=1, sliding_window=4, **small)
    with_window = AutoModelForCausalLM.from_config(config).eval()
    windowed = with_window.generate(IDS, cache_implementation="static", **ours)
    assert "StaticSlidingWindowLayer" in said.pop()
    assert torch.equal(windowed, with_window.generate(IDS, max_new_tokens=4, do_sample=False))
    compile_config = CompileConfig(mode="default")  # which transformers' loop uses on GPUs alone
    assert torch.equal(model.generate(IDS, cache_implementation="static", compile_config=compile_config, **ours), expected)
    assert "compile_config" in said.pop()
    embeds = model.get_input_embeddings()(IDS)
    made = model.generate(inputs_embeds=embeds, cache_implementation="static", **ours)
    assert torch.equal(made, expected[:, IDS.shape[1] :])
    assert "inputs_embeds" in said.pop()
    assert not said


def test_an_end_without_a_token_to_pad_with_is_an_error(model):
    """Else what has ended would go on beside what has not."""
    other = copy.deepcopy(model)
    other.generation_config.eos_token_id = other.generation_config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id is not given"):
        other.generate(IDS, max_new_tokens=3, stopping_criteria=StoppingCriteriaList([EosTokenCriteria(5)]), **STATIC)


def test_beams_are_refused(model):
    with pytest.raises(ValueError, match="num_beams is 2"):
        model.generate(IDS, num_beams=2, max_new_tokens=3, **STATIC)


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_recorded_steps_give_the_same_tokens(tiny, compiles, dtype, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(0), replay(graph))[1])
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=dtype, device_map="cuda")
    ids, mask = PADDED.cuda(), MASK.cuda()
    for kwargs in ({"inputs": IDS.cuda()}, {"inputs": ids, "attention_mask": mask}):
        how = {"max_new_tokens": 24, "do_sample": False} | kwargs
        theirs = model.generate(**how)
        replays.clear()
        made = [model.generate(**how, **STATIC | {"disable_compile": not compiles}) for _ in range(3)]
        assert len(replays) == 3 * 22  # the prompt gives the first token, and a step that is not recorded the second
        assert all(torch.equal(made[0], other) for other in made)
        # Half precision may tie: the first tokens must agree.
        same = ids.shape[1] + (24 if dtype == torch.float32 else 4)
        assert torch.equal(theirs[:, :same], made[0][:, :same])


@pytest.mark.gpu
def test_a_model_that_is_not_on_the_current_device(tiny):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = []
    for device in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, device_map={"": device})
        made.append(model.generate(IDS.to(device), max_new_tokens=12, do_sample=False, **STATIC).cpu())
    assert torch.cuda.current_device() == 0
    assert torch.equal(*made)


@pytest.mark.gpu
def test_a_recorded_graph_does_not_outlive_its_weights(tiny):
    """Other weights in the same model, between two generations."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, device_map="cuda")
    how = {"max_new_tokens": 12, "do_sample": False}
    model.generate(IDS.cuda(), **how, **STATIC)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(-layer.mlp.down_proj.weight)
    assert torch.equal(model.generate(IDS.cuda(), **how), model.generate(IDS.cuda(), **how, **STATIC))


@pytest.mark.gpu
def test_recorded_samples_and_ends(model):
    on_gpu = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, device_map="cuda")
    how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": end_at(model, 2), "pad_token_id": 3}
    assert on_gpu.generate(IDS.cuda(), **how, **STATIC).shape[1] == IDS.shape[1] + 3
    how = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 30}
    made = []
    for custom in ({"cache_implementation": "static", "disable_compile": True}, STATIC):
        torch.manual_seed(0)
        made.append(on_gpu.generate(IDS.cuda(), **how, **custom))
    assert torch.equal(*made)


def test_a_step_that_cannot_be_recorded(monkeypatch):
    """torch's error is told as the cause, of what was tried and what else there is to do."""
    step = object.__new__(decoding._Step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    step._run = waits
    with pytest.raises(RecordingError, match="without custom_generate=graph_decoding") as raised:
        step._record()
    assert "stream is capturing" in str(raised.value.__cause__)

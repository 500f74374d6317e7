"""transformers' `generate` with a step that is recorded once as a CUDA graph, so that the GPU does not wait for the host.

    model.generate(**inputs, cache_implementation="static", custom_generate=graph_decoding)

transformers' own loop prepares every token's inputs anew, has torch look whether its compiled code and graph still fit, and
waits for the GPU to see whether the end is reached: 1 to 3 ms a token, in which the GPU of a small model waits. Here all
that a step reads stays where it is, the host replays the graph, and looks for the end one token later.

transformers hands no streamer to a `custom_generate`, so it is bound as well:

    model.generate(..., streamer=streamer, custom_generate=functools.partial(graph_decoding, streamer=streamer))

It works for every model, dense ones too, and gives the same tokens. The graph is recorded by each `generate` anew (some twenty
milliseconds), so that nothing can be replayed that has changed since. A step is compiled as `generate` does for a static
cache, in some half a minute the first time; `disable_compile=True` records it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .compiling import compile_config_within_a_graph

logger = logging.get_logger(__name__)


class RecordingError(RuntimeError):
    """The GPU cannot record as a CUDA graph what a model does in a step: it waits for the host, say, or copies from it."""


CARRIED = {"attention_mask", "position_ids", "past_key_values"}  # tensors of a step that this loop knows how to carry on


def graph_decoding(
    model: Any,  # a PreTrainedModel that generates: transformers' types do not say what is called here
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """What `model.generate(custom_generate=graph_decoding)` calls, greedy or sampling.

    input_ids: int64 (batch, prompt). Returns int64 (batch, prompt + generated). Where a step cannot be recorded (a cache that
    is not static or has layers with a window, several devices, more than token ids asked for) transformers' own loop runs, with
    a warning that says why. Raises ValueError for beam search, which is another algorithm, and where sequences may end and no
    token is known to pad them with; RecordingError where the GPU cannot record what the model does in a step.
    """
    if generation_config.num_beams > 1:
        raise ValueError(f"graph_decoding is greedy or samples: num_beams is {generation_config.num_beams}")
    if obstacle := _obstacle(model, generation_config, model_kwargs, synced_gpus):
        logger.warning_once(f"graph_decoding: {obstacle}: each step by transformers' own loop")
        kwargs = {"synced_gpus": synced_gpus, "streamer": streamer, **model_kwargs}
        return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
    tokens = _Tokens(input_ids, logits_processor, stopping_criteria, generation_config)
    before: _Look | None = None
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs  # of a long prompt they are large
    with torch.cuda.device_of(input_ids), model._optimize_model_for_decode():
        step = _Step(model, input_ids, generation_config, model_kwargs)
        while True:
            look = tokens.append(logits)
            # Only now, with the next token under way, is it seen whether the one before was the last.
            if before is not None and before.ends(streamer):
                tokens.length -= 1
                step.take_back()
                break
            if tokens.is_full:
                look.ends(streamer)
                break
            before = look
            logits = step(tokens.last)
    if streamer is not None:
        streamer.end()
    return tokens.ids[:, : tokens.length].contiguous()


def _obstacle(model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any], synced_gpus: bool) -> str | None:
    """Why a step cannot be recorded; None where it can."""
    cache = model_kwargs.get("past_key_values")
    devices = set(getattr(model, "hf_device_map", {}).values())
    carried = sorted(key for key, value in model_kwargs.items() if key not in CARRIED and isinstance(value, torch.Tensor))
    if type(cache) is not StaticCache:
        return f"the cache is {'none' if cache is None else f'a {type(cache).__name__}'}, not static"
    if layer := next((layer for layer in cache.layers if type(layer) is not StaticLayer), None):
        return f"the cache has a {type(layer).__name__}"
    if getattr(cache, "offloading", False) or len(devices) > 1:
        return f"the model or its cache is on several devices ({', '.join(map(str, devices)) or 'offloaded cache'})"
    if synced_gpus:
        return "GPUs wait for each other"
    if generation_config.return_dict_in_generate:
        return "more than token ids is asked for (return_dict_in_generate)"
    if generation_config.compile_config is not None:
        return "it compiles in its own way, and compile_config says another"
    return f"the model is given {', '.join(carried)}" if carried else None


class _Tokens:
    """Prompt and generated tokens, and how the next is chosen.

    ids: int64 (batch, max_length); unfinished: int64 (batch,), 0 once a sequence has ended.
    """

    def __init__(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        batch, self.length = input_ids.shape
        self.ids: Any = input_ids.new_empty(batch, stopping_criteria.max_length)
        self.ids[:, : self.length] = input_ids
        self._process, self._criteria = logits_processor, stopping_criteria
        self._samples = generation_config.do_sample
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = generation_config._pad_token_tensor
        if ends and pad is None:  # `generate` takes the end's where it knows that
            raise ValueError("sequences may end, and pad_token_id is not given")
        self._pad = pad.to(input_ids.device) if ends and pad is not None else None
        self._unfinished = input_ids.new_ones(batch)
        on_gpu = input_ids.is_cuda
        self._looks = [_Look(torch.empty(batch + 1, dtype=torch.int64, pin_memory=on_gpu)) for _ in range(2)]

    @property
    def is_full(self) -> bool:
        return self.length == self.ids.shape[1]

    @property
    def last(self) -> torch.Tensor:
        """int64 (batch, 1)"""
        return self.ids[:, self.length - 1 : self.length]

    def append(self, logits: torch.Tensor) -> _Look:
        """Chooses the next token of each sequence, as transformers' `_sample` does. logits: float32 (batch, vocabulary)."""
        scores = self._process(self.ids[:, : self.length], logits)
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if self._samples else scores.argmax(-1)
        if self._pad is not None:
            chosen = chosen * self._unfinished + self._pad * (1 - self._unfinished)
        self.ids[:, self.length] = chosen
        self.length += 1
        self._unfinished = self._unfinished & ~self._criteria(self.ids[:, : self.length], None)
        look = self._looks[self.length % 2]  # the one before has not been looked at yet
        look.begin(chosen, self._unfinished)
        return look


class _Look:
    """What the host sees of a token, once it is there. there: int64 (batch + 1,) on the host, tokens and how many go on."""

    def __init__(self, there: torch.Tensor) -> None:
        self._there = there
        self._event = torch.cuda.Event() if there.is_pinned() else None

    def begin(self, chosen: torch.Tensor, unfinished: torch.Tensor) -> None:
        self._there.copy_(torch.cat([chosen, unfinished.sum(0, keepdim=True)]), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def ends(self, streamer: BaseStreamer | None) -> bool:
        """Waits for the token and streams it. Whether it was the last of all sequences."""
        if self._event is not None:
            self._event.synchronize()
        if streamer is not None:
            streamer.put(self._there[:-1].clone())
        return int(self._there[-1]) == 0


class _Step:
    """The forward pass of one token a sequence: run once, recorded the second time, and replayed from then on."""

    def __init__(self, model: Any, input_ids: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        compiles = input_ids.is_cuda and not generation_config.disable_compile
        self._forward = model.get_compiled_call(compile_config_within_a_graph()) if compiles else model.__call__
        self._cache = model_kwargs["past_key_values"]
        self._token = input_ids.new_empty(input_ids.shape[0], 1)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None  # of the graph
        self._has_run = False
        mask = model_kwargs.pop("attention_mask", None)
        inputs = model.prepare_inputs_for_generation(self._token, next_sequence_length=1, **model_kwargs)
        self._position = inputs.get("position_ids")
        # The model makes its own mask of the positions in the cache. Where the prompt is padded, it needs to know where: a mask
        # as long as the cache, so that it does not grow.
        inputs["attention_mask"] = None
        if mask is not None and not mask.all():
            rest = self._cache.get_max_length() - mask.shape[1]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], rest)], 1)
        self._inputs = inputs | {"input_ids": self._token}

    def __call__(self, token: torch.Tensor) -> Any:
        """token: int64 (batch, 1). Returns float32 (batch, vocabulary), overwritten by the next call."""
        self._token.copy_(token)
        if not self._has_run or not token.is_cuda:  # compiles, and what else happens the first time
            self._has_run = True
            return self._run()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return self._logits

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._run()
        except RuntimeError as error:
            advice = "generate it without custom_generate=graph_decoding"
            raise RecordingError(f"a step of this model cannot be recorded as a CUDA graph: {advice} ({error})") from error
        return graph

    def _run(self) -> Any:
        logits = self._forward(**self._inputs, return_dict=True).logits[:, -1].float()
        if self._position is not None:
            self._position.add_(1)
        return logits

    def take_back(self) -> None:
        """Forgets the last token: it has run before it was seen that the one before was the end."""
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(1)

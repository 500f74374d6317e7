"""Running a decoder one block at a time, with only that block's weights in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from spqr_format.errors import SpqrError

from .activations import Activations, Room
from .blocks import Plan, linears
from .experts import stacks
from .sources import Source


class _StopForward(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    pass


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a parameter or buffer by its dotted name; None puts it back on the meta device."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if tensor is None:
        assert old is not None
        tensor = torch.empty_like(old, device="meta")
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def load(module: nn.Module, prefix: str, plan: Plan, source: Source, device: torch.device) -> None:
    """Fill a module (named `prefix` in the model) from the source, as float32 on `device`; its other buffers move there
    too. E501 when a parameter is missing in the source, E504 when it is a stack of experts that cannot be put together."""
    tied: dict[int, torch.Tensor] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        tensor = _parameter(f"{prefix}.{name}" if prefix else name, parameter, plan, source)
        if id(parameter) not in tied:
            tied[id(parameter)] = tensor.to(device).float()  # in this order: a GPU widens faster than the host
        set_tensor(module, name, tied[id(parameter)])
    for name, buffer in list(module.named_buffers()):
        full = f"{prefix}.{name}" if prefix else name
        if full in plan.parameters:
            set_tensor(module, name, source.load(plan.parameters[full]).to(device=device, dtype=buffer.dtype))
        else:
            set_tensor(module, name, buffer.to(device))


def unload(module: nn.Module) -> None:
    """Drop a module's parameters."""
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        set_tensor(module, name, None)


def _parameter(name: str, parameter: nn.Parameter, plan: Plan, source: Source) -> torch.Tensor:
    if name in plan.parameters:
        tensor = source.load(plan.parameters[name])
        if tensor.shape != parameter.shape:
            raise SpqrError("E501", name, f"shape {tuple(tensor.shape)}, the model has {tuple(parameter.shape)}")
        return tensor
    if name in plan.experts:
        stack = torch.stack([torch.cat([source.load(tensor) for tensor in row]) for row in plan.experts[name]])
        if stack.shape == parameter.shape:
            return stack
    if parameter.dim() == 3:
        raise SpqrError("E504", name, "these experts are not supported by the calibrated path; quantise without data")
    raise SpqrError("E501", str(source.folder), f"tensor {name} is missing")


@contextlib.contextmanager
def loaded_outside(model: Any, plan: Plan, source: Source, device: torch.device, outputs: bool = False) -> Iterator[None]:
    """Holds the parameters of all that is no decoder block in memory, with `outputs` the output embedding too (E501 where
    the source has none, not even a tied one)."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    skip = {id(m) for m in plan.blocks.modules()}
    if head is not None and not outputs:
        skip |= {id(m) for m in head.modules()}
    if inputs is not None:
        skip -= {id(m) for m in inputs.modules()}
    outside = [(name, m) for name, m in model.named_modules() if id(m) not in skip]
    for name, module in outside:
        _load_own(module, name, plan, source, device)
    if outputs and head is not None and head.weight.is_meta:
        if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            raise SpqrError("E501", str(source.folder), "the output embedding is missing")
        head.weight = inputs.weight
    try:
        yield
    finally:
        for _, module in outside:
            for name in list(module._parameters):
                if module._parameters[name] is not None:
                    set_tensor(module, name, None)


class Stream:
    """The hidden states of all calibration windows on their way through the blocks.

    hidden: one float32 tensor [batch, length, width] for each of `batches` (int64 [batch, length]), in `room`;
    calls[shape][i] = (args, kwargs) of block i for a batch of that shape.
    """

    def __init__(self, model: Any, plan: Plan, source: Source, batches: Sequence[torch.Tensor], room: Room) -> None:
        self.device = room.device
        self.hidden = Activations(room)
        self.calls: dict[tuple[int, ...], list[tuple[tuple, dict]]] = {}
        with loaded_outside(model, plan, source, self.device):
            self._record(model, plan, batches)

    def _record(self, model: Any, plan: Plan, batches: Sequence[torch.Tensor]) -> None:
        try:
            for i, block in enumerate(plan.blocks):
                block.forward = self._recorder(i, i + 1 == len(plan.blocks))
            for ids in batches:
                try:
                    with torch.no_grad():
                        model(input_ids=ids.to(self.device), use_cache=False)
                except _StopForward:
                    pass
        finally:
            for block in plan.blocks:
                # Not set back but deleted: a bound method on its own instance is a cycle, and a copy of the block
                # would live until the garbage collector comes by.
                del block.forward

    def _recorder(self, index: int, last: bool) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                hidden, rest = kwargs.pop("hidden_states"), ()
            if index == 0:
                self.hidden.append(hidden)
            calls = self.calls.setdefault(tuple(hidden.shape), [])
            if len(calls) == index:
                calls.append((rest, kwargs))
            if last:
                raise _StopForward
            return hidden

        return forward

    def fork(self) -> Stream:
        """A second stream over the same calls, with its own hidden states."""
        other = object.__new__(Stream)
        other.device, other.calls, other.hidden = self.device, self.calls, Activations(self.hidden.room, self.hidden)
        return other

    def run(self, block: nn.Module, index: int, number: int) -> torch.Tensor:
        """Block `index` on batch `number`: its output hidden states."""
        hidden = self.hidden[number]
        args, kwargs = self.calls[tuple(hidden.shape)][index]
        with torch.no_grad():
            out = block(hidden, *args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by the block's outputs."""
        for number in range(len(self.hidden)):
            self.hidden[number] = self.run(block, index, number)

    def sets(self, block: nn.Module, index: int) -> tuple[list[list[str]], bool]:
        """The linear layers in order of execution, those with the same input together, and the stacks of experts, each by
        itself; and whether each ran once."""
        order: list[list[str]] = []
        inputs: list[torch.Tensor] = []
        seen: list[str] = []
        experts = dict(stacks(block, ""))

        def hook(name: str) -> Callable:
            def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _first(args, kwargs)
                seen.append(name)
                if seen.count(name) > 1:
                    return
                if inputs and inputs[-1] is x and name not in experts and order[-1][0] not in experts:
                    order[-1].append(name)
                    return
                inputs.append(x)
                order.append([name])

            return note

        watched = [*linears(block), *experts.items()]
        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in watched]
        try:
            self.run(block, index, 0)
        finally:
            for handle in handles:
                handle.remove()
        return order, len(seen) == len(set(seen))

    def inputs(self, block: nn.Module, index: int, name: str, once: bool) -> Generator[list[torch.Tensor], None, None]:
        """For each batch the inputs of one linear layer; the pass ends there when every layer runs once."""
        for caught in self.arguments(block, index, name, once):
            yield [_first(*call) for call in caught]

    def arguments(self, block: nn.Module, index: int, name: str, once: bool) -> Generator[list[tuple[tuple, dict]], None, None]:
        """For each batch the (args, kwargs) of the calls of one module inside, otherwise as `inputs`."""
        caught: list[tuple[tuple, dict]] = []

        def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append((args, kwargs))
            if once:
                raise _StopForward

        handle = block.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for number in range(len(self.hidden)):
                caught.clear()
                with contextlib.suppress(_StopForward):
                    self.run(block, index, number)
                yield list(caught)
        finally:
            handle.remove()


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _load_own(module: nn.Module, prefix: str, plan: Plan, source: Source, device: torch.device) -> None:
    """Load the parameters and buffers that a module holds itself; ones missing in the source are left on meta (a tied
    or unused weight) and fail where they are used."""
    for leaf, parameter in list(module._parameters.items()):
        full = f"{prefix}.{leaf}" if prefix else leaf
        if parameter is not None and full in plan.parameters:
            set_tensor(module, leaf, source.load(plan.parameters[full]).to(device).float())
    for leaf, buffer in list(module._buffers.items()):
        if buffer is not None:
            full = f"{prefix}.{leaf}" if prefix else leaf
            value = source.load(plan.parameters[full]).to(buffer.dtype) if full in plan.parameters else buffer
            set_tensor(module, leaf, value.to(device))

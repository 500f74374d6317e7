"""How much memory a conversion takes, from shapes alone, and where its activations go under a limit.

Every constant here counts bytes: of float32 and float64 copies that the named step holds at its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import ceil_div

from . import sensitivity
from .activations import Room
from .blocks import Plan, linears
from .calibration import SHARDS, Calibration
from .memory import available, resident
from .options import SolverOptions
from .parallel import beside_gpu
from .sources import Source

_LIBRARIES = 450 << 20  # Python, torch and transformers with a model on the meta device, as seen
_SPARE = 128 << 20  # what the C heap and torch's allocators hold beyond what is asked of them: up to 100 MB were seen
_SEARCHED = 1 << 25  # floats that one search of statistics holds at most (statistics.py)
_STACKED_ROWS = 1 << 16  # of groups without feedback (datafree.py)
_WIDEST_GROUP = 64  # that a budget chooses (presets.py)
_DATA_FREE = 24  # a weight: target, decoded, gains, codes and copies of them
_CARRIED = 8  # a weight: codes, words, dequantized, and copies


@dataclass(frozen=True)
class Need:
    """Bytes that a stage holds at its peak: in RAM, on a GPU (0 where the CPU computes), and the activations, which may lie
    anywhere."""

    host: int
    device: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Placed:
    """A stage under its limits: bytes in all in RAM and on the GPU, and how many bytes of activations lie where."""

    host: int
    device: int
    on_device: int
    in_ram: int
    on_disk: int


@dataclass(frozen=True)
class MemoryPlan:
    """What is predicted, in bytes. stages: name -> where it all lies; workers: modules at a time that fit."""

    stages: dict[str, Placed]
    workers: int

    @property
    def host(self) -> int:
        """The peak in RAM."""
        return max(stage.host for stage in self.stages.values())

    @property
    def device(self) -> int:
        """The peak on the GPU; 0 where the CPU computes."""
        return max(stage.device for stage in self.stages.values())

    @property
    def scratch(self) -> int:
        """Activations on disk."""
        return max(stage.on_disk for stage in self.stages.values())

    def room(self, stage: str, device: torch.device, folder: Path | None) -> Room:
        """For the activations of a stage; its file would be in `folder`."""
        placed = self.stages[stage]
        return Room(device, placed.on_device, placed.in_ram, folder)

    def as_dict(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "peak_memory": self.host, "device_memory": self.device, "scratch_file": self.scratch, "workers": self.workers,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What of the calibration text is run: tokens in all (of this process), tokens in a window, windows in a batch."""

    tokens: int
    length: int
    batch: int

    @classmethod
    def of(cls, calibration: Calibration, context: int | None) -> Text:
        """What a calibration takes of its text, for a model of this context."""
        length = calibration.window_length(context)
        windows = max(1, calibration.tokens // length)
        return cls(windows * length, length, min(calibration.batch, ceil_div(windows, SHARDS)))  # no batch spans two shards


class Footprint:
    """What the stages of a conversion hold: text None without calibration, `budget` where bits are planned."""

    def __init__(
        self, model: Any, todo: Plan, source: Source, options: SolverOptions, text: Text | None, device: torch.device,
        *, budget: bool = False, lossless: bool = False,
    ) -> None:  # fmt: skip
        self.text, self.budget, self.lossless = text, budget, lossless
        self.on_gpu = device.type != "cpu" and not lossless
        self.bilevel = budget or options.statistics == "bilevel"
        self.group_size = _WIDEST_GROUP if budget else options.group_size
        self.streams = 2 if options.drift > 0 else 1
        # Bytes as stored: of the largest tensor that stays dense, of the largest matrix.
        sizes = {tensor: entry.end - entry.begin for tensor, entry in source.entries.items()}
        self.dense_read = max((sizes[tensor] for tensor in todo.dense), default=0)
        self.matrix_read = max((sizes[tensor] for tensor in todo.matrices), default=0)
        self.matrix = max((source.entries[tensor].numel for tensor in todo.matrices), default=0)
        # Parameters: of the largest block, of its largest one, of a block's linear layers and of its stacks of experts.
        self.block = max(sum(p.numel() for p in block.parameters()) for block in todo.blocks)
        self.parameter = max((p.numel() for p in todo.blocks.parameters()), default=0)
        self.layers = [(layer.out_features, layer.in_features) for _, layer in linears(todo.blocks[0])]
        self.linear = max(sum(layer.weight.numel() for _, layer in linears(block)) for block in todo.blocks)
        self.stacks = max(sum(p.numel() for p in block.parameters() if p.dim() == 3) for block in todo.blocks)
        self.widest = max(columns for _, columns in self.layers)
        config = model.config.get_text_config()
        self.hidden = getattr(config, "hidden_size", self.widest)
        self.vocabulary = getattr(config, "vocab_size", 0)
        inside = {id(p) for p in todo.blocks.parameters()}
        self.outside = sum(p.numel() for p in model.parameters() if id(p) not in inside)
        self.heads = getattr(config, "num_attention_heads", 1)
        # Whether attention holds its scores: torch has no fused kernel for float32 on a GPU where heads share keys.
        shared_keys = getattr(config, "num_key_value_heads", self.heads) != self.heads
        self.scores = getattr(config, "_attn_implementation", None) == "eager" or (self.on_gpu and shared_keys)
        self.count, self.matrices = len(todo.blocks), len(todo.matrices)

    def needs(self) -> dict[str, Need]:
        """By stage, all but "matrices"."""
        found = {"copying": Need(2 * self.dense_read)}
        if self.text is not None:
            found["blocks"] = self._blocks(self.text)
            if self.budget:
                found["measuring"] = self._measuring(self.text)
        return found

    def each_matrix(self) -> Need:
        """Of one worker that quantizes a matrix without calibration, or carries one over."""
        if self.lossless:
            return Need(2 * self.matrix_read + _CARRIED * self.matrix)
        return self._split(self._data_free(), 2 * self.matrix_read + 2 * self.matrix)

    def _data_free(self) -> int:
        return _DATA_FREE * self.matrix + self._search(_STACKED_ROWS, False)

    def _search(self, rows: int, feeds_back: bool) -> int:
        """The trial of all statistics of a group, for so many rows (statistics.py): 64 pairs of codes for as many rows as one
        search takes, or 16 scales; 8 numbers of each, and with feedback the error of each column."""
        pairs = 64 if self.bilevel else 16
        if self.bilevel:
            rows = min(rows, _SEARCHED // (pairs * self.group_size))
        return 4 * pairs * rows * (8 + (self.group_size if feeds_back else 0))

    def _split(self, work: int, on_host: int, activations: int = 0) -> Need:
        """work: what lies where the computing is done; on_host: what is in RAM in any case."""
        return Need(on_host, work, activations) if self.on_gpu else Need(work + on_host, 0, activations)

    def _hidden_states(self, tokens: int) -> int:
        return 4 * tokens * self.hidden

    def _forward(self, tokens: int, length: int) -> int:
        """One batch on its way through a block."""
        scores = 3 * 4 * tokens * length * self.heads if self.scores else tokens * length
        return 4 * tokens * (4 * self.hidden + 3 * self.widest) + scores

    def _blocks(self, text: Text) -> Need:
        squares = 4 * self.widest**2
        # Partial sums of the tree, each with the drift's where there is a reference.
        sums = SHARDS.bit_length() * self.streams * squares
        batch = text.batch * text.length
        inputs = (1 + self.streams) * 4 * batch * self.widest
        solve = max(self._solve(rows, columns) for rows, columns in self.layers)
        step = max(self._forward(batch, text.length) + inputs + sums, solve, self._data_free() if self.stacks else 0)
        block = 4 * (self.block + (self.linear if self.streams == 2 else 0))
        solved = 2 * self.linear  # codes, and a matrix being packed
        loading = 2 * max(self.matrix_read, 2 * self.parameter if self.stacks else 0)
        routed = self.streams * self._hidden_states(text.tokens) if self.stacks else 0  # what the experts of a block are given
        work = max(block + step + routed, 4 * self.outside)  # what stands before the blocks is run first, and alone
        on_host = max(solved + loading, self.dense_read)
        return self._split(work, on_host, self.streams * self._hidden_states(text.tokens))

    def _solve(self, rows: int, columns: int) -> int:
        """A Hessian's factor, and with it one matrix (hessian.py, calibrated.py)."""
        squares, weights = columns**2, rows * columns
        return max(56 * squares, 48 * squares + 24 * weights, 24 * squares + 44 * weights + self._search(rows, True))

    def _measuring(self, text: Text) -> Need:
        windows = max(1, sensitivity.TOKENS // text.length)
        tokens = min(windows * text.length, text.tokens)
        hessians = sum(4 * columns**2 for _, columns in self.layers) + 48 * self.widest**2
        backward = 3 * self._forward(text.length, text.length)
        block = 4 * (self.block + self.linear + self.stacks)  # and the importances of its matrices
        head = 4 * self.outside + 17 * text.length * self.vocabulary  # logits, their softmax and gradients
        rounding = 4 * (self.linear + self.stacks) + 16 * self.matrix
        work = max(block + hessians + backward, head, rounding)
        on_host = 2 * max(self.matrix_read, self.dense_read)
        return self._split(work, on_host, (self.count + 1) * self._hidden_states(tokens))


_WHAT = {
    "copying": "copying a tensor that stays dense",
    "blocks": "quantizing a block",
    "measuring": "measuring a block for the budget",
    "matrices": "quantizing a matrix",
}


def plan_memory(
    footprint: Footprint, workers: int, limits: Mapping[str, int] | None, device: torch.device, sharing: int = 1
) -> MemoryPlan:
    """Places activations: on the device while they fit, then in RAM, then on disk.

    limits: bytes by kind of memory, "cpu" and "cuda"; what is not named may take all that is free now. workers: modules at a
    time where no calibration makes one depend on another; fewer are planned where so many do not fit. E505 where a named
    limit cannot be met even so; without one the prediction may be above what is there. sharing: processes that take RAM of
    this machine alike; limits are for each of them.
    """
    given = dict(limits or {})
    kinds = {"cpu", device.type}
    for kind, limit in given.items():
        if kind not in kinds:
            raise SpqrError("E505", "max_memory", f"{kind}: this conversion takes memory of {' and '.join(sorted(kinds))}")
        if limit < 1:
            raise SpqrError("E505", "max_memory", f"{kind}: {limit}, expected at least 1 byte")
    base = max(resident(), _LIBRARIES) + _SPARE
    host = given.get("cpu", resident() + available(torch.device("cpu")) // sharing)
    on_gpu = device.type != "cpu"
    gpu = given.get(device.type, available(device)) if on_gpu else 0
    needs = footprint.needs()
    if footprint.text is None:
        each = footprint.each_matrix()
        workers = min(beside_gpu(workers) if footprint.on_gpu else workers, max(1, footprint.matrices))
        workers = max(1, min(workers, (host - base) // max(each.host, 1)))
        needs["matrices"] = Need(workers * each.host, each.device)
        if footprint.budget:
            needs["measuring"] = needs["matrices"]  # rounds some rows of the same matrices, as many at a time
    stages = {}
    for name, need in needs.items():
        free_device, free_host = max(0, gpu - need.device), max(0, host - base - need.host)
        on_device = min(need.activations, free_device)
        in_ram = min(need.activations - on_device, free_host)
        placed = Placed(
            base + need.host + in_ram, need.device + on_device, on_device, in_ram, need.activations - on_device - in_ram
        )
        for kind, taken in (("cpu", placed.host), (device.type, placed.device)):
            if taken > given.get(kind, taken):
                what = f"{kind}: {given[kind]:,} bytes, and {_WHAT[name]} takes {taken:,} at least"
                raise SpqrError("E505", "max_memory", what)
        stages[name] = placed
    return MemoryPlan(stages, workers)

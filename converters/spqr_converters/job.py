"""A conversion from end to end: one block at a time from the source's shards to the destination's."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout, TensorSpec
from spqr_format.matrix import PackedMatrix, SpqrMatrix
from spqr_format.writer import TORCH_DTYPES, CheckpointWriter, Packed, require_empty

from . import calibrated, datafree
from .activations import Room
from .blocks import Plan, build, linears, plan
from .budget import plan_bits
from .calibration import Calibration, shards
from .card import model_card
from .coverage import check_coverage, keep_dense
from .experts import FUSED, stacks, unstack
from .follower import Follower
from .footprint import Footprint, MemoryPlan, Text, plan_memory
from .forward import Stream, load, unload
from .hessian import Accumulator
from .lossless import carry_over, lossless_plan, most_common
from .memory import release
from .options import SolverOptions
from .parallel import beside_gpu, in_order, one_thread_each, worker_count
from .ranks import Ranks
from .report import STARVED, ModuleReport, Report
from .routing import ExpertInputs, Routed, is_starved, runs_one_by_one, solve_experts
from .sources import Source, open_source
from .sources.base import file_sha256
from .sources.packed import OPTION_FILES

Progress = Callable[[str, int, int], None]
Solved = tuple[Packed, ModuleReport]
Make = Callable[[str], Solved]
Summed = tuple[list[int], Accumulator | None]  # which rank quantizes each matrix, and the sums over their inputs
UNIFORM = ("weight_bits", "group_size", "statistics", "outlier_share", "outlier_threshold")  # what a budget decides instead
REPORT = "spqr_report.json"
_SHOWN = 4  # experts in a note
_NOT_COPIED = {"config.json", REPORT, *OPTION_FILES}  # what would tell a loader of another format
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm"}


def convert(
    source: str | Path | Source,
    destination: str | Path,
    *,
    lossless: bool = False,
    weight_bits: int = 3,
    group_size: int = 16,
    statistics: str = "bilevel",
    outlier_share: float | None = None,
    outlier_threshold: float | None = None,
    bits_per_weight: float | None = None,
    calibration: Calibration | None = None,
    keep: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    workers: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    announce: Callable[[MemoryPlan], None] | None = None,
    solver: SolverOptions | None = None,
    process_group: Any = None,
) -> Report:
    """Convert a checkpoint folder into a new SpQR folder; returns what was done.

    A dense or already quantized source is quantised (anew), from its dequantized weights. With `lossless`, the codes of a
    quantized source are carried over bit for bit instead, in its own bits and groups (the options of the quantizer do not
    count), what it stores dense stays dense, and every module is compared with the source's own dequantized weights.
    Without `calibration` the weights alone are used. With it an expert sees the tokens that the router sends to it; where
    they are too few it is quantized without data (`Report.starved`). keep: patterns of module names that stay dense.
    `solver` carries further options; its format fields (weight_bits, group_size, statistics, outliers) are replaced by the
    arguments here.
    bits_per_weight: a budget of stored bits a weight instead of them, for which every module gets its own (see budget.py;
    presets.PRESETS has some with names); the plan stands in the report's provenance.
    progress(module, done, total) is called after every matrix with parameters done and in all. workers: modules at a time,
    where no calibration makes one depend on another; by default one for each core. A GPU solves one after the other, and
    others are read and packed meanwhile (3 at most). Their number does not change a byte of the output.
    max_memory: bytes that may be taken, {"cpu": RAM, "cuda": of the GPU}; by default what is free. What does not fit of the
    hidden states between blocks lies in RAM, then in a file without a name in the destination, and fewer workers are begun;
    neither changes a byte. announce(plan) is called with the predicted memory before any work is done (see footprint.py).

    process_group: processes of torch.distributed that make this same call together; by default the default group where it
    is initialized (which this function never does), else this process alone. Each runs some of the calibration and solves
    some of the modules; rank 0 writes. Ranks on one kind of machine give the bytes of one process. Limits and workers are
    those of each rank. An error on one ends all of them, with the code of the first. E505 where they differ in anything
    that the bytes depend on.

    The same arguments on the same machine give the same bytes. Until the very end the destination has no index, so a
    killed run leaves nothing that loads; the same call goes on where it was, and gives the bytes of an unbroken run. With
    a source, options or versions that changed meanwhile it is refused (E511), unless `restart` gives up what was done.
    Errors: E501 .. E507, E510 .. E513 (see spqr_format.errors).
    """
    started = time.monotonic()
    ranks = Ranks(process_group)
    with ranks.together():
        options = replace(
            solver or SolverOptions(), weight_bits=weight_bits, group_size=group_size, statistics=statistics,
            outlier_share=outlier_share, outlier_threshold=outlier_threshold,
        )  # fmt: skip
        if max_shard_bytes < 1:
            raise SpqrError("E505", "max_shard_bytes", f"{max_shard_bytes}: expected at least 1")
        refuse_with_lossless(lossless, calibration, outlier_share, outlier_threshold, bits_per_weight)
        refuse_with_budget(bits_per_weight, options)
        target = Path(destination)
        if ranks.writes:
            require_empty(target, resumable=True)
        workers = worker_count(workers)
        where = resolve_device(device)
        origin = source if isinstance(source, Source) else open_source(source)
        model = build(origin.config, str(origin.folder), len(origin.entries))
        unstack(model, origin)
        todo = keep_dense(plan(model, origin), origin, keep)
        base = {"weight_bits": weight_bits, "group_size": group_size, "statistics": statistics}
        if lossless:
            todo, layouts = lossless_plan(todo, origin)
            usual = most_common(layouts)
            base = {"weight_bits": usual.weight_bits, "group_size": usual.group_size, "statistics": usual.statistics}
        check_coverage(todo, origin)
        job = _Job(origin, model, todo, options, where, ranks, progress)
        windows, data, text = None, None, None
        if calibration is not None:
            context = context_length(origin.config)
            windows, data = calibration.windows(load_tokenizer(origin.companions()), context, seed)
            job.parts = [
                part if ranks.of_shard(number) == ranks.rank else ()
                for number, part in enumerate(shards(windows, calibration.batch))
            ]
            own = sum(batch.numel() for part in job.parts for batch in part)
            text = replace(Text.of(calibration, context), tokens=own)
        footprint = Footprint(model, todo, origin, options, text, where, budget=bits_per_weight is not None, lossless=lossless)
    sharing = ranks.on_this_host()
    with ranks.together():
        memory = plan_memory(footprint, workers, max_memory, where, sharing)
    workers = min(ranks.gather(memory.workers))  # all take the same turns
    if announce is not None:
        announce(memory)
    if bits_per_weight is not None:
        with current(where), memory.room("measuring", where, target) as room:
            spread = plan_bits(
                model, todo, origin, options, bits_per_weight, windows=windows, room=room, ranks=ranks, workers=workers,
                seed=seed, progress=progress,
            )  # fmt: skip
        job.chosen = spread.options
        base |= spread.usual(todo, origin)
    with ranks.together():
        job.report.source = origin.name
        job.report.mode = "lossless" if lossless else "requantized" if origin.quantized else "quantized"
        job.report.provenance = provenance(origin, None if lossless else options, data, seed, job.report.mode)
        if bits_per_weight is not None:
            job.report.provenance["budget"] = spread.as_dict()
            for name in UNIFORM:  # they stand in the plan, module by module
                del job.report.provenance["solver"][name]
        if keep:
            job.report.provenance["keep_dense"] = list(keep)
        extra: dict[str, Any] = companions(origin.companions())
        whole = identity(origin, job.report.provenance, extra, max_shard_bytes, where)
    ranks.agree(whole, "identity")
    section = {**base, "provenance": job.report.provenance}
    with ExitStack() as stack:
        stack.enter_context(current(where))
        writer: Any = None
        with ranks.together():
            if ranks.writes:
                writer = CheckpointWriter(
                    target, max_shard_bytes=max_shard_bytes, config=origin.config, quantization_config=section, resume=whole,
                    restart=restart,
                )  # fmt: skip
                stack.enter_context(writer)
        notes = ranks.share(0, lambda: (writer.notes, {}))[0]
        if lossless and writer is not None:
            writer.expect(job.expected(layouts))
        job.writer = writer or Follower(notes)
        if lossless or windows is None:
            job.run_each(job.carry_over if lossless else job.solve_data_free, workers)
        else:
            job.run_calibrated(stack.enter_context(memory.room("blocks", where, target)))
        with ranks.together():
            job.finish_notes()
            job.report.seconds = time.monotonic() - started
            if ranks.writes:
                extra |= {REPORT: job.report.as_json(), "README.md": model_card(job.report)}
                writer.finish(extra_files=extra)
    return job.report


def refuse_with_lossless(
    lossless: bool, calibration: Calibration | None, outlier_share: float | None, outlier_threshold: float | None,
    bits_per_weight: float | None,
) -> None:  # fmt: skip
    """E505 for options that a lossless conversion would have to ignore."""
    options = {"calibration": calibration, "outlier_share": outlier_share, "outlier_threshold": outlier_threshold,
               "bits_per_weight": bits_per_weight}  # fmt: skip
    for name, value in options.items():
        if lossless and value is not None:
            raise SpqrError("E505", name, "a lossless conversion carries the source's codes over and takes no such option")


def refuse_with_budget(bits_per_weight: float | None, options: SolverOptions) -> None:
    """E505 for options that a budget would have to ignore, and for a budget that is no number of bits."""
    if bits_per_weight is None:
        return
    if not bits_per_weight > 0:
        raise SpqrError("E505", "bits_per_weight", f"{bits_per_weight!r}: expected above 0")
    usual = SolverOptions()
    for name in UNIFORM:
        if getattr(options, name) != getattr(usual, name):
            raise SpqrError("E505", name, "with bits_per_weight the budget decides it for every module")


def resolve_device(device: str) -> torch.device:
    """ "auto" is the current GPU, else the CPU; "cuda" is the current one too, with its number. E505 for a device that is not
    there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.empty(1, device=torch.device(device)).device
    except (RuntimeError, AssertionError) as error:
        raise SpqrError("E505", "device", f"{device!r}: {str(error).splitlines()[0]}") from None
    return resolved


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Around work on a GPU: Triton's kernels run on the current one of their thread, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens that the model was made for, or None when config.json does not say."""
    for holder in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"):
            if isinstance(holder.get(key), int):
                return holder[key]
    return None


def provenance(
    origin: Source, options: SolverOptions | None, calibration: dict[str, Any] | None, seed: int, mode: str
) -> dict[str, Any]:
    """Where the numbers come from: names, hashes, options (None where codes are carried over), versions; no absolute path
    and no date."""
    versions = {}
    for package in ("spqr-format", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "source": origin.folder.resolve().name,
        "source_kind": origin.name,
        "source_sha256": origin.fingerprint(),
        "mode": mode,
        "method": "lossless" if options is None else "data-free" if calibration is None else "calibrated",
        "calibration": calibration,
        "seed": seed,
        "solver": None if options is None else options.as_dict(),
        "versions": versions,
    }


def identity(
    origin: Source, made: dict[str, Any], beside: dict[str, Path], max_shard_bytes: int, device: torch.device
) -> dict[str, Any]:
    """Everything that the bytes of the output depend on: a run may only be taken up by one of the same identity."""
    return {
        "provenance": made,
        "source_choices": origin.choices(),
        "source_config_sha256": hashlib.sha256(json.dumps(origin.config, sort_keys=True).encode()).hexdigest(),
        "files_beside_sha256": {name: file_sha256(path) for name, path in beside.items()},
        "max_shard_bytes": max_shard_bytes,
        "device": device.type,
    }


def companions(source: Path) -> dict[str, Path]:
    """Tokenizer, generation config, chat template and licence: small text files that are neither weights nor code."""
    found = {}
    for path in sorted(source.iterdir()):
        text = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and text and path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            found[path.name] = path
    return found


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; none of its code is run. E501 where transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise SpqrError("E501", str(folder), f"its tokenizer cannot be loaded: {error}") from None


class _Job:
    def __init__(
        self, source: Source, model: nn.Module, todo: Plan, options: SolverOptions, device: torch.device, ranks: Ranks,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.source, self.model, self.plan, self.options = source, model, todo, options
        self.device, self.ranks, self.progress = device, ranks, progress
        self.parts: list[tuple[torch.Tensor, ...]] = []  # the calibration's batches by shard; () for other ranks' shards
        self.chosen: dict[str, SolverOptions] = {}  # what a budget decided for single tensors
        self.report = Report()
        self.writer: Any = None
        # A GPU is filled by one matrix; a second one would only take memory.
        self.turn: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else threading.Lock()
        self.done = self.no_place = 0
        self.total = sum(source.entries[tensor].numel for tensor in todo.matrices)

    # What all ways share

    def _options(self, tensor: str) -> SolverOptions:
        return self.chosen.get(tensor, self.options)

    def _finished(self, tensor: str) -> bool:
        """True for what the writer has, from this run or from the one that it takes up."""
        return self.plan.matrices.get(tensor, tensor) in self.writer.notes

    def _packed(self, tensor: str, matrix: SpqrMatrix | PackedMatrix, method: str, figures: dict[str, float]) -> Solved:
        name = self.plan.matrices[tensor]
        return self.writer.pack(name, matrix), ModuleReport.of(name, matrix, method, figures)

    def _put(self, tensor: str, packed: Packed, row: ModuleReport) -> None:
        with self.ranks.together():
            self.writer.add(packed, asdict(row))
        if row.method != "lossless":  # whose arrays are of few sizes and fill the holes of those before
            release()
        self._count(tensor)

    def _count(self, tensor: str) -> None:
        """A matrix that the writer has, in the report and in the progress."""
        name = self.plan.matrices[tensor]
        self.report.modules.append(ModuleReport.from_dict(self.writer.notes[name]))
        self.done += self.source.entries[tensor].numel
        if self.progress is not None:
            self.progress(name, self.done, self.total)

    def _add_dense(self, tensor: str) -> None:
        entry = self.source.entries[tensor]
        if not self._finished(tensor):
            absent = self._has_no_place(tensor)
            with self.ranks.together():
                if not self.ranks.writes:
                    if not absent:
                        self.writer.add_dense(tensor)
                elif not absent:
                    self.writer.add_dense(tensor, self.source.load(tensor))
                elif torch.count_nonzero(self.source.load(tensor)):
                    raise SpqrError("E501", tensor, f"a bias that is not 0, and {type(self.model).__name__} has none there")
            if absent:
                self.no_place += 1
                return
        self.report.dense[tensor] = {
            "parameters": entry.numel, "bytes": entry.numel * entry.dtype.itemsize, "reason": self.plan.dense[tensor],
        }  # fmt: skip

    def _has_no_place(self, tensor: str) -> bool:
        """A bias of a quantised layer that the model does not have: some GPTQ writers store zeros for all layers."""
        weight = tensor.removesuffix(".bias") + ".weight"
        return weight in self.plan.matrices and self.plan.dense[tensor] == "not a parameter of the model"

    def finish_notes(self) -> None:
        """What the report says of the source, complete once all of it was read."""
        notes = self.source.notes()
        if self.no_place:
            notes.append(f"{self.no_place} biases that are all 0, and that the model does not have, were left out")
        if self.report.mode == "requantized":
            notes.append("the source was quantized before; the errors here are against its weights, its own error is unknown")
        rounded, different = (sum(getattr(m, key) or 0 for m in self.report.modules) for key in ("rounded", "different"))
        weights = sum(m.compared or m.shape[0] * m.shape[1] for m in self.report.modules)
        worst = max((m.rounding_error or 0.0 for m in self.report.modules), default=0.0)
        if rounded:
            notes.append(
                f"the source's own tool rounds {rounded:,.0f} of {weights:,} weights to its dtype after multiplying; the "
                f"carried codes give them unrounded, at most {worst:.2g} off (relative norm of a "
                "module), and the same after that rounding"
            )
        if different:
            notes.append(f"{different:,.0f} of {weights:,} weights differ from the source's tool in the last place")
        if starved := self.report.starved:
            fewest = sorted(starved.items(), key=lambda row: (row[1], row[0]))[:_SHOWN]
            notes.append(
                f"{len(starved)} of {len(self.plan.fused)} matrices of experts had fewer calibration tokens than columns "
                f"and were quantized without data, first {', '.join(f'{name} ({tokens})' for name, tokens in fewest)}"
            )
        self.report.notes = notes
        self.report.provenance["notes"] = notes

    # Module by module

    def expected(self, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, Layout | TensorSpec]]:
        """What `run_each` gives the writer where the layouts of all matrices are known, by tensor."""
        for tensor, entry in self.source.entries.items():
            if tensor in self.plan.matrices:
                yield self.plan.matrices[tensor], layouts[tensor]
            elif not self._has_no_place(tensor):
                dtype = TORCH_DTYPES.get(str(entry.dtype).removeprefix("torch."))
                if dtype is not None:  # else the writer will refuse it
                    yield tensor, TensorSpec(dtype, entry.shape)

    def run_each(self, make: Make, workers: int) -> None:
        """Every tensor of the source in its order; `make` is called for the matrices, by several threads at once."""
        on_host = self.device.type == "cpu" or make == self.carry_over
        with one_thread_each() if on_host else nullcontext():
            self._add_all(self.source.entries, make, workers if on_host else beside_gpu(workers))

    def _add_all(
        self, tensors: Iterable[str], make: Make, workers: int = 1, solved: Mapping[str, Solved] | None = None
    ) -> None:
        """Some tensors, in their order: matrices as they were `solved`, or as `make` makes them, the others as they are."""
        solved = solved or {}
        wanted = [tensor for tensor in tensors if tensor in self.plan.matrices and tensor not in solved]
        made = self._made([tensor for tensor in wanted if not self._finished(tensor)], make, workers)
        try:
            for tensor in tensors:
                if tensor not in self.plan.matrices:
                    self._add_dense(tensor)
                elif self._finished(tensor):
                    self._count(tensor)
                else:
                    self._put(tensor, *(solved[tensor] if tensor in solved else next(made)))
        finally:
            made.close()

    def _made(self, tensors: list[str], make: Make, workers: int) -> Generator[Solved, None, None]:
        """What `make` gives for each tensor, in their order. Several ranks take turns: each makes some, then all hear of
        them."""
        if self.ranks.size == 1:
            yield from in_order((partial(make, tensor) for tensor in tensors), workers)
            return
        at_once = self.ranks.size * workers
        for first in range(0, len(tensors), at_once):
            part = tensors[first : first + at_once]
            owners = self.ranks.owners([self.source.entries[tensor].numel for tensor in part])
            with self.ranks.together():
                own = [tensor for tensor, owner in zip(part, owners, strict=True) if owner == self.ranks.rank]
                mine = deque(in_order((partial(make, tensor) for tensor in own), workers))
            for owner in owners:
                yield self._shared(owner, mine)

    def _shared(self, owner: int, mine: deque[Solved]) -> Solved:
        """The next of the owner's modules, on every rank."""
        if self.ranks.size == 1:
            return mine.popleft()

        def told() -> tuple[dict[str, Any], dict[str, Any]]:
            packed, row = mine.popleft()
            assert packed.layout is not None
            about = {"key": packed.key, "layout": packed.layout.as_dict(), "digests": packed.digests, "row": asdict(row)}
            about["dtypes"] = {name: dtype for name, (dtype, _) in packed.tensors.items()}
            return about, {name: array for name, (_, array) in packed.tensors.items()}

        about, arrays = self.ranks.share(owner, told)
        tensors = {name: (dtype, arrays[name]) for name, dtype in about["dtypes"].items()}
        return Packed(about["key"], Layout(**about["layout"]), tensors, about["digests"]), ModuleReport.from_dict(about["row"])

    def carry_over(self, tensor: str) -> Solved:
        """The source's codes as they are, compared with what the source's own tool makes of them."""
        matrix, figures = carry_over(self.source, tensor)
        return self._packed(tensor, matrix, "lossless", figures)

    def solve_data_free(self, tensor: str, why: str = "") -> Solved:
        """From the weights alone."""
        weight = self.source.load(tensor)
        with self.turn, current(self.device):
            matrix, figures = datafree.solve(weight.to(self.device), self._options(tensor), tensor)
        del weight
        return self._packed(tensor, matrix, "data-free" + why, figures)

    # With data

    def run_calibrated(self, room: Room) -> None:
        """Block after block; the hidden states of this rank's shards lie in `room`."""
        of_block = self._tensors_by_block()
        self._add_all(of_block[None], partial(self.solve_data_free, why=": outside the decoder blocks"))
        unfinished = [i for i, tensors in of_block.items() if i is not None and not all(map(self._done_with, tensors))]
        if not unfinished:
            for index in range(len(self.plan.blocks)):
                self._count_block(of_block[index])
            return
        with self.ranks.together():
            stream = Stream(self.model, self.plan, self.source, [batch for part in self.parts for batch in part], room)
            reference = stream.fork() if self.options.drift > 0 else None
        for index, block in enumerate(self.plan.blocks):
            prefix = f"{self.plan.prefix}.{index}"
            with self.ranks.together():
                load(block, prefix, self.plan, self.source, self.device)
            if index in unfinished:
                self._solve_block(block, prefix, index, stream, reference, of_block[index])
            else:
                self._pass_block(block, prefix, index, stream, reference, of_block[index])
            unload(block)

    def _done_with(self, tensor: str) -> bool:
        return self._finished(tensor) or (tensor not in self.plan.matrices and self._has_no_place(tensor))

    def _count_block(self, tensors: list[str]) -> None:
        for tensor in tensors:
            if tensor in self.plan.matrices:
                self._count(tensor)
            else:
                self._add_dense(tensor)

    def _pass_block(
        self, block: nn.Module, prefix: str, index: int, stream: Stream, reference: Stream | None, tensors: list[str]
    ) -> None:
        """A block that an earlier run finished: what follows sees the outputs of its quantized weights, as it did then."""
        with self.ranks.together():
            if reference is not None:
                reference.advance(block, index)
        for name, layer in linears(block):
            module = self.plan.matrices.get(self.plan.parameters[f"{prefix}.{name}.weight"])
            if module is not None and self.writer.notes[module]["method"] == "calibrated":
                self._replace(layer, *self.ranks.share(0, partial(self._stored, module)))
        for name, stack in stacks(block, prefix):
            for leaf in FUSED if runs_one_by_one(stack) else ():
                for expert, own in zip(stack.get_parameter(leaf), self.plan.experts[f"{name}.{leaf}"], strict=True):
                    for weight, tensor in zip(expert.chunk(len(own)), own, strict=True):
                        if tensor in self.plan.matrices:
                            stored = self.ranks.share(0, partial(self._stored, self.plan.matrices[tensor]))
                            weight.copy_(self._decoded(*stored))
        with self.ranks.together():
            stream.advance(block, index)
        self._count_block(tensors)

    def _stored(self, module: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The layout and the stored tensors of a module that is written."""
        packed = self.writer.read_packed(module)
        return packed.layout.as_dict(), packed.tensors

    def _decoded(self, layout: dict[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        """float32 [out, in], on the device: what a file would hold."""
        return torch.from_numpy(SpqrMatrix.unpack(Layout(**layout), tensors).dequantize()).to(self.device)

    def _replace(self, layer: nn.Linear, layout: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        """A layer's weight by what a file would hold."""
        layer.weight = nn.Parameter(self._decoded(layout, tensors), requires_grad=False)

    def _tensors_by_block(self) -> dict[int | None, list[str]]:
        names = {tensor: parameter for parameter, tensor in self.plan.parameters.items()}
        table: dict[int | None, list[str]] = {None: []} | {i: [] for i in range(len(self.plan.blocks))}
        for tensor in self.source.entries:
            rest = names.get(tensor, tensor).removeprefix(self.plan.prefix + ".")
            number = rest.split(".", 1)[0]
            inside = rest != names.get(tensor, tensor) and number.isdigit() and int(number) < len(self.plan.blocks)
            table[int(number) if inside else None].append(tensor)
        return table

    def _solve_block(
        self, block: nn.Module, prefix: str, index: int, stream: Stream, reference: Stream | None, tensors: list[str]
    ) -> None:
        order, once = self.ranks.share(0, lambda: (stream.sets(block, index), {}))[0]
        original = _copy(block) if reference is not None else None
        solved: dict[str, Solved] = {}
        for names in order:
            if f"{prefix}.{names[0]}.{FUSED[0]}" in self.plan.experts:
                self._solve_stack(block, original, f"{prefix}.{names[0]}", index, stream, reference, once, solved)
                continue
            names = [name for name in names if self.plan.parameters.get(f"{prefix}.{name}.weight") in self.plan.matrices]
            if not names:
                continue
            layers: list[Any] = [block.get_submodule(name) for name in names]
            own = [self.plan.parameters[f"{prefix}.{name}.weight"] for name in names]
            new = partial(Accumulator, layers[0].in_features, f"{prefix}.{names[0]}", self.device, reference is not None)
            streams = ((stream, block), (reference, original))
            summed = partial(self._sum_inputs, own, new, streams, index, names[0], once)
            weights = {tensor: layer.weight for tensor, layer in zip(own, layers, strict=True)}
            for layer, weight in zip(layers, self._solve_alike(weights, summed, solved), strict=True):
                layer.weight = nn.Parameter(weight, requires_grad=False)
        if index + 1 < len(self.plan.blocks):
            with self.ranks.together():
                stream.advance(block, index)
                if reference is not None and original is not None:
                    reference.advance(original, index)
        progress, self.progress = self.progress, None
        self._add_all(tensors, self._not_run, solved=solved)
        self.progress = progress
        if progress is not None and tensors:
            progress(prefix, self.done, self.total)

    def _tell(self, tensor: str, solved: list[str]) -> None:
        """Progress within a block."""
        if self.progress is not None:
            done = self.done + sum(self.source.entries[t].numel for t in solved)
            self.progress(self.plan.matrices[tensor], done, self.total)

    def _not_run(self, tensor: str) -> Solved:
        """A matrix of a block for which there is no Hessian."""
        fused = tensor in self.plan.fused
        why = "experts that cannot be run one by one" if fused else "not run by the calibration text"
        return self.solve_data_free(tensor, f": {why}")

    def _sums(
        self, new: Callable[[], Accumulator], seen: Iterator[list[torch.Tensor]], meant: Iterator[list[torch.Tensor]] | None,
        shard: int,
    ) -> Accumulator | None:  # fmt: skip
        """The sums over a layer's inputs in a shard, batch by batch; `meant` are those of the reference. None where the layer
        was not run."""
        if not self.parts[shard]:
            return None
        sums = new()
        for _ in self.parts[shard]:
            inputs = next(seen)
            wanted: Sequence[Any] = [None] * len(inputs) if meant is None else next(meant)
            for x, x_reference in zip(inputs, wanted, strict=True):
                sums.add(x, x_reference)
        return sums if sums.tokens else None

    def _sum_inputs(
        self, own: list[str], new: Callable[[], Accumulator], streams: tuple[Any, Any], index: int, name: str, once: bool
    ) -> Summed:
        """`_summed` over the inputs of a linear layer. streams: of the quantized model and of the original (or None), each with
        its block."""
        with ExitStack() as hooks:
            seen, meant = (
                stream and hooks.enter_context(closing(stream.inputs(block, index, name, once))) for stream, block in streams
            )
            return self._summed(own, new, partial(self._sums, new, seen, meant))

    def _summed(self, own: list[str], new: Callable[[], Accumulator], part: Callable[[int], Accumulator | None]) -> Summed:
        """Which rank quantizes which of the matrices that share their inputs, and on these ranks the sums over the inputs, of
        no tokens where there were none."""
        owners = self.ranks.owners([self.source.entries[tensor].numel for tensor in own])
        sums = self.ranks.sum_shards(part, new, owners[0])
        if len(set(owners)) > 1:
            sums = self.ranks.spread(sums, new, owners[0])
        return owners, sums

    def _solve_alike(
        self, weights: dict[str, torch.Tensor], summed: Callable[[], Summed], solved: dict[str, Solved]
    ) -> list[torch.Tensor]:
        """Matrices that share their inputs, by tensor name of the source, into `solved`; their decoded weights, float32
        [out, in], on every rank. The sums are made here, so that nobody holds them while the matrices are solved."""
        owners, sums = summed()
        tokens = self.ranks.share(owners[0], partial(_tokens, sums))[0]
        tensors = list(weights)
        fused = tensors[0] in self.plan.fused
        starved = fused and is_starved(tokens, weights[tensors[0]].shape[1])
        if not tokens and not fused:
            return list(weights.values())  # not run: each is quantized without data at the block's end
        found: dict[str, torch.Tensor] = {}
        mine: deque[Solved] = deque()
        with self.ranks.together():
            if self.ranks.rank in owners and not starved:
                assert sums is not None
                same = calibrated.SharedInput(sums, fused)
            sums = None
            for tensor, owner in zip(tensors, owners, strict=True):
                if owner != self.ranks.rank:
                    continue
                if starved:
                    method = STARVED
                    matrix, figures = datafree.solve(weights[tensor], self._options(tensor), tensor)
                    found[tensor] = torch.from_numpy(matrix.dequantize()).to(self.device)
                else:
                    method = "calibrated"
                    matrix, figures, found[tensor] = same.solve(weights[tensor], self._options(tensor), tensor)
                mine.append(self._packed(tensor, matrix, method, {**figures, "tokens": tokens}))
                release()
                self._tell(tensor, [*solved, *tensors[: tensors.index(tensor) + 1]])
        for tensor, owner in zip(tensors, owners, strict=True):
            packed, _ = solved[tensor] = self._shared(owner, mine)
            if owner != self.ranks.rank:
                assert packed.layout is not None
                stored = {name.rpartition(".")[2]: array for name, (_, array) in packed.tensors.items()}
                found[tensor] = self._decoded(packed.layout.as_dict(), stored)
        return [found[tensor] for tensor in tensors]

    def _solve_stack(
        self, block: nn.Module, original: nn.Module | None, name: str, index: int, stream: Stream, reference: Stream | None,
        once: bool, solved: dict[str, Solved],
    ) -> None:  # fmt: skip
        """The experts of one stack (`name` in the model), each with its own tokens."""
        inside = name.removeprefix(f"{self.plan.prefix}.{index}.")
        stack = block.get_submodule(inside)
        if not runs_one_by_one(stack):
            return
        meant, same = None, None
        with self.ranks.together(), ExitStack() as hooks:
            seen = hooks.enter_context(closing(stream.arguments(block, index, inside, once)))
            if reference is not None and original is not None:
                same = original.get_submodule(inside)
                meant = hooks.enter_context(closing(reference.arguments(original, index, inside, once)))
            shards = []
            for part in self.parts:
                own = _routed(seen, len(part))
                shards.append(ExpertInputs(own, None if meant is None else _routed(meant, len(part))))

        def solve(weights: dict[str, torch.Tensor], new: Callable[[], Accumulator], part: Any) -> list[torch.Tensor]:
            own = {tensor: weight for tensor, weight in weights.items() if tensor in self.plan.matrices}
            found = dict(weights)
            if own:  # what is kept dense is its own decoded weight
                found |= zip(own, self._solve_alike(own, partial(self._summed, list(own), new, part), solved), strict=True)
            return list(found.values())

        names = zip(*(self.plan.experts[f"{name}.{leaf}"] for leaf in FUSED), strict=True)
        solve_experts(stack, same, shards, names, solve, name)


def _tokens(sums: Accumulator | None) -> tuple[int, dict[str, Any]]:
    return (sums.tokens if sums else 0), {}


def _routed(batches: Iterator[list[tuple[tuple, dict]]], count: int) -> list[Routed]:
    """The calls of so many batches."""
    return [Routed.of(*call) for _ in range(count) for call in next(batches)]


def _copy(block: nn.Module) -> nn.Module:
    """A second block with the same tensors; replacing a parameter of one leaves the other alone."""
    memo = {id(t): t for t in [*block.parameters(), *block.buffers()]}
    return copy.deepcopy(block, memo)

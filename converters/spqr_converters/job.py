"""A conversion from end to end: one block at a time from the source's shards to the destination's."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spqr_format.errors import SpqrError
from spqr_format.matrix import PackedMatrix, SpqrMatrix
from spqr_format.writer import CheckpointWriter, Packed, require_empty

from . import calibrated, datafree
from .blocks import Plan, build, linears, plan
from .budget import plan_bits
from .calibration import Calibration
from .card import model_card
from .coverage import check_coverage, keep_dense
from .experts import FUSED, stacks, unstack
from .forward import Stream, load, unload
from .hessian import Accumulator, Factor
from .lossless import carry_over, lossless_plan, most_common
from .memory import release
from .options import SolverOptions
from .parallel import beside_gpu, in_order, one_thread_each, worker_count
from .report import STARVED, ModuleReport, Report
from .routing import ExpertInputs, Routed, is_starved, runs_one_by_one, solve_experts
from .sources import Source, open_source
from .sources.base import file_sha256
from .sources.packed import OPTION_FILES

Progress = Callable[[str, int, int], None]
_Solved = tuple[SpqrMatrix, str, dict[str, float]]  # with its method and its figures
_DRIFT_PRIOR = 8  # tokens for each input column that count for no drift
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
    restart: bool = False,
    progress: Progress | None = None,
    solver: SolverOptions | None = None,
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

    The same arguments on the same machine give the same bytes. Until the very end the destination has no index, so a
    killed run leaves nothing that loads; the same call goes on where it was, and gives the bytes of an unbroken run. With
    a source, options or versions that changed meanwhile it is refused (E511), unless `restart` gives up what was done.
    Errors: E501 .. E507, E510 .. E513 (see spqr_format.errors).
    """
    started = time.monotonic()
    options = replace(
        solver or SolverOptions(), weight_bits=weight_bits, group_size=group_size, statistics=statistics,
        outlier_share=outlier_share, outlier_threshold=outlier_threshold,
    )  # fmt: skip
    if max_shard_bytes < 1:
        raise SpqrError("E505", "max_shard_bytes", f"{max_shard_bytes}: expected at least 1")
    refuse_with_lossless(lossless, calibration, outlier_share, outlier_threshold, bits_per_weight)
    refuse_with_budget(bits_per_weight, options)
    target = Path(destination)
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
    job = _Job(origin, model, todo, options, where, progress)
    windows, data = None, None
    if calibration is not None:
        windows, data = calibration.windows(load_tokenizer(origin.companions()), context_length(origin.config), seed)
    if bits_per_weight is not None:
        spread = plan_bits(
            model, todo, origin, options, bits_per_weight, windows=windows, device=where, workers=workers, seed=seed,
            progress=progress,
        )  # fmt: skip
        job.chosen = spread.options
        base |= spread.usual(todo, origin)
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
    writer = CheckpointWriter(
        target, max_shard_bytes=max_shard_bytes, config=origin.config,
        quantization_config={**base, "provenance": job.report.provenance},
        resume=identity(origin, job.report.provenance, extra, max_shard_bytes, where), restart=restart,
    )  # fmt: skip
    with writer:
        job.writer = writer
        if lossless or windows is None or calibration is None:
            job.run_each(job.carry_over if lossless else job.solve_data_free, workers)
        else:
            job.run_calibrated(windows, calibration.batch)
        job.finish_notes()
        job.report.seconds = time.monotonic() - started
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
    """ "auto" is the first GPU, else the CPU. E505 for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise SpqrError("E505", "device", f"{device!r}: {str(error).splitlines()[0]}") from None
    return resolved


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
        self, source: Source, model: nn.Module, todo: Plan, options: SolverOptions, device: torch.device,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.source, self.model, self.plan, self.options = source, model, todo, options
        self.device, self.progress = device, progress
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

    def _packed(
        self, tensor: str, matrix: SpqrMatrix | PackedMatrix, method: str, figures: dict[str, float]
    ) -> tuple[Packed, ModuleReport]:
        name = self.plan.matrices[tensor]
        return self.writer.pack(name, matrix), ModuleReport.of(name, matrix, method, figures)

    def _put(self, tensor: str, packed: Packed, row: ModuleReport) -> None:
        self.writer.add(packed, asdict(row))
        release()
        self._count(tensor)

    def _count(self, tensor: str) -> None:
        """A matrix that the writer has, in the report and in the progress."""
        name = self.plan.matrices[tensor]
        self.report.modules.append(ModuleReport.from_dict(self.writer.notes[name]))
        self.done += self.source.entries[tensor].numel
        if self.progress is not None:
            self.progress(name, self.done, self.total)

    def _add(self, tensor: str, matrix: SpqrMatrix, method: str, figures: dict[str, float]) -> None:
        if self._finished(tensor):
            self._count(tensor)
        else:
            self._put(tensor, *self._packed(tensor, matrix, method, figures))

    def _add_dense(self, tensor: str) -> None:
        entry = self.source.entries[tensor]
        if not self._finished(tensor):
            value = self.source.load(tensor)
            if self._has_no_place(tensor):
                if torch.count_nonzero(value):
                    raise SpqrError("E501", tensor, f"a bias that is not 0, and {type(self.model).__name__} has none there")
                self.no_place += 1
                return
            self.writer.add_dense(tensor, value)
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

    def _add_data_free(self, tensor: str, method: str) -> None:
        if self._finished(tensor):
            self._count(tensor)
            return
        matrix, figures = datafree.solve(self.source.load(tensor).to(self.device), self._options(tensor), tensor)
        self._add(tensor, matrix, method, figures)

    # Module by module

    def run_each(self, make: Callable[[str], tuple[Packed, ModuleReport]], workers: int) -> None:
        """Every tensor of the source in its order; `make` is called for the matrices, by several threads at once."""
        on_host = self.device.type == "cpu" or make == self.carry_over
        todo = [tensor for tensor in self.source.entries if tensor in self.plan.matrices and not self._finished(tensor)]
        with one_thread_each() if on_host else nullcontext():
            made = in_order((partial(make, tensor) for tensor in todo), workers if on_host else beside_gpu(workers))
            try:
                self._take(made)
            finally:
                made.close()

    def _take(self, made: Iterator[tuple[Packed, ModuleReport]]) -> None:
        for tensor in self.source.entries:
            if tensor not in self.plan.matrices:
                self._add_dense(tensor)
            elif self._finished(tensor):
                self._count(tensor)
            else:
                self._put(tensor, *next(made))

    def carry_over(self, tensor: str) -> tuple[Packed, ModuleReport]:
        """The source's codes as they are, compared with what the source's own tool makes of them."""
        matrix, figures = carry_over(self.source, tensor)
        return self._packed(tensor, matrix, "lossless", figures)

    def solve_data_free(self, tensor: str) -> tuple[Packed, ModuleReport]:
        """From the weights alone."""
        weight = self.source.load(tensor)
        with self.turn:
            matrix, figures = datafree.solve(weight.to(self.device), self._options(tensor), tensor)
        del weight
        return self._packed(tensor, matrix, "data-free", figures)

    # With data

    def run_calibrated(self, windows: torch.Tensor, batch: int) -> None:
        of_block = self._tensors_by_block()
        for tensor in of_block[None]:
            if tensor in self.plan.matrices:
                self._add_data_free(tensor, "data-free: outside the decoder blocks")
            else:
                self._add_dense(tensor)
        unfinished = [i for i, tensors in of_block.items() if i is not None and not all(map(self._done_with, tensors))]
        if not unfinished:
            for index in range(len(self.plan.blocks)):
                self._count_block(of_block[index])
            return
        stream = Stream(self.model, self.plan, self.source, windows, batch, self.device)
        reference = stream.fork() if self.options.drift > 0 else None
        for index, block in enumerate(self.plan.blocks):
            prefix = f"{self.plan.prefix}.{index}"
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
        if reference is not None:
            reference.advance(block, index)
        for name, layer in linears(block):
            module = self.plan.matrices.get(self.plan.parameters[f"{prefix}.{name}.weight"])
            if module is not None and self.writer.notes[module]["method"] == "calibrated":
                layer.weight = nn.Parameter(self._decoded(module), requires_grad=False)
        for name, stack in stacks(block, prefix):
            for leaf in FUSED if runs_one_by_one(stack) else ():
                for expert, parts in zip(stack.get_parameter(leaf), self.plan.experts[f"{name}.{leaf}"], strict=True):
                    for weight, tensor in zip(expert.chunk(len(parts)), parts, strict=True):
                        if tensor in self.plan.matrices:
                            weight.copy_(self._decoded(self.plan.matrices[tensor]))
        stream.advance(block, index)
        self._count_block(tensors)

    def _decoded(self, module: str) -> torch.Tensor:
        return torch.from_numpy(self.writer.read_matrix(module).dequantize()).to(self.device)

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
        order, once = stream.sets(block, index)
        original = _copy(block) if reference is not None else None
        solved: dict[str, _Solved] = {}
        for names in order:
            if f"{prefix}.{names[0]}.{FUSED[0]}" in self.plan.experts:
                self._solve_stack(block, original, f"{prefix}.{names[0]}", index, stream, reference, once, solved)
                continue
            names = [name for name in names if self.plan.parameters.get(f"{prefix}.{name}.weight") in self.plan.matrices]
            if not names:
                continue
            layers: list[Any] = [block.get_submodule(name) for name in names]
            accumulator = Accumulator(layers[0].in_features, f"{prefix}.{names[0]}", self.device, reference is not None)
            seen = stream.inputs(block, index, names[0], once)
            if reference is not None and original is not None:
                meant: Iterable[list[Any]] = reference.inputs(original, index, names[0], once)
            else:
                meant = [[]] * len(stream.hidden)
            for inputs, wanted in zip(seen, meant, strict=True):
                for x, x_reference in zip(inputs, wanted or [None] * len(inputs), strict=True):
                    accumulator.add(x, x_reference)
            if accumulator.tokens == 0:
                continue
            weights = {
                self.plan.parameters[f"{prefix}.{name}.weight"]: layer.weight for name, layer in zip(names, layers, strict=True)
            }
            for layer, decoded in zip(layers, self._solve_alike(weights, accumulator, solved), strict=True):
                layer.weight = nn.Parameter(decoded, requires_grad=False)
        last = index + 1 == len(self.plan.blocks)
        if not last:
            stream.advance(block, index)
            if reference is not None and original is not None:
                reference.advance(original, index)
        progress, self.progress = self.progress, None
        for tensor in tensors:
            if tensor in solved:
                self._add(tensor, *solved[tensor])
            elif tensor in self.plan.matrices:
                why = (
                    "experts that cannot be run one by one" if tensor in self.plan.fused else "not run by the calibration text"
                )
                self._add_data_free(tensor, f"data-free: {why}")
            else:
                self._add_dense(tensor)
        self.progress = progress
        if progress is not None and tensors:
            progress(prefix, self.done, self.total)

    def _solve_alike(
        self, weights: dict[str, torch.Tensor], inputs: Accumulator, solved: dict[str, _Solved]
    ) -> list[torch.Tensor]:
        """Matrices that share their inputs, by tensor name of the source, into `solved`; their decoded weights, float32
        [out, in]. What is kept dense is its own decoded weight."""
        H, drift = inputs.take()
        if drift is not None:
            # With few tokens for each input column the correction is mostly noise.
            drift *= inputs.tokens / (inputs.tokens + _DRIFT_PRIOR * len(H))
        factors: dict[int, Factor] = {}
        found = []
        for tensor, weight in weights.items():
            if tensor not in self.plan.matrices:
                found.append(weight)
                continue
            options, method = self._options(tensor), "calibrated"
            if tensor in self.plan.fused and is_starved(inputs.tokens, len(H)):
                method = STARVED
                matrix, figures = datafree.solve(weight, options, tensor)
                decoded = torch.from_numpy(matrix.dequantize()).to(self.device)
            else:
                if options.group_size not in factors:  # on which the order of the columns depends
                    few = inputs.tokens if tensor in self.plan.fused else None
                    factors[options.group_size] = calibrated.prepare(H, options, inputs.name, few)
                factor = factors[options.group_size]
                matrix, figures, decoded = calibrated.solve_and_decode(weight, H, options, tensor, drift, factor)
            found.append(decoded)
            solved[tensor] = (matrix, method, {**figures, "tokens": inputs.tokens})
            release()
            if self.progress is not None:
                done = self.done + sum(self.source.entries[t].numel for t in solved)
                self.progress(self.plan.matrices[tensor], done, self.total)
        return found

    def _solve_stack(
        self, block: nn.Module, original: nn.Module | None, name: str, index: int, stream: Stream, reference: Stream | None,
        once: bool, solved: dict[str, _Solved],
    ) -> None:  # fmt: skip
        """The experts of one stack (`name` in the model), each with its own tokens."""
        inside = name.removeprefix(f"{self.plan.prefix}.{index}.")
        stack = block.get_submodule(inside)
        if not runs_one_by_one(stack):
            return
        seen = [Routed.of(*call) for calls in stream.arguments(block, index, inside, once) for call in calls]
        meant, same = None, None
        if reference is not None and original is not None:
            same = original.get_submodule(inside)
            meant = [Routed.of(*call) for calls in reference.arguments(original, index, inside, once) for call in calls]
        names = zip(*(self.plan.experts[f"{name}.{leaf}"] for leaf in FUSED), strict=True)
        solve = partial(self._solve_alike, solved=solved)
        solve_experts(stack, same, ExpertInputs(seen, meant), names, solve, name)


def _copy(block: nn.Module) -> nn.Module:
    """A second block with the same tensors; replacing a parameter of one leaves the other alone."""
    memo = {id(t): t for t in [*block.parameters(), *block.buffers()]}
    return copy.deepcopy(block, memo)

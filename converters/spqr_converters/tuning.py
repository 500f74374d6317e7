"""Tuning a finished SpQR checkpoint end to end: its continuous numbers (statistics, outliers, norms) are learnt so that its
predictions come nearer to the original model's. Codes stay, and so do bits and layout.

The loss is KL(original || quantized) a token, over windows of a calibration text; Adam with a rate that rises over the first
tenth of the steps and falls as a cosine. Some windows are held out: what is written is the state with the least loss on
them, and that is the checkpoint as it was where nothing helped.
[EfficientQAT, Chen et al. 2024, section 3.3: end-to-end training of quantization parameters]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spqr_format.errors import SpqrError
from spqr_format.journal import JOURNAL, PARTIAL
from spqr_format.lock import FolderLock
from spqr_format.reader import Checkpoint
from spqr_format.writer import CheckpointWriter, require_empty

from .blocks import Plan, plan
from .calibration import Calibration
from .card import model_card
from .dense import dense_tensor
from .experts import unstack
from .job import REPORT, companions, context_length, load_tokenizer, resolve_device
from .report import ModuleReport, Report
from .sources import Source, open_source
from .sources.base import file_sha256
from .student import LEARN, Student
from .tuning_state import TuningState

STATE = "tuning" + PARTIAL
_BETAS = (0.9, 0.95)  # few steps, so a shorter memory of squared gradients than Adam's own 0.999
_WARM_UP = 0.1  # share of the steps

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TuningOptions:
    """epochs: passes over the windows. learning_rate: in the units of `TunableMatrix`. batch: windows in a step. held_out:
    share of the windows that are only measured. learn: "matrices" (their statistics and outliers), "vectors" (norms and
    biases), or "all". E505 where one is out of range."""

    epochs: int = 1  # more passes over the usual 131072 tokens fit those alone
    learning_rate: float = 1e-3
    batch: int = 2
    held_out: float = 0.125
    learn: str = "all"

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate <= 1, "above 0, at most 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("held_out", 0 < self.held_out <= 0.5, "above 0, at most 0.5"),
            ("learn", self.learn in LEARN, " or ".join(LEARN)),
        ):
            if not fine:
                raise SpqrError("E505", name, f"{getattr(self, name)!r}: expected {expected}")


@dataclass
class TuningReport:
    """before, after: mean KL on the held-out windows, nats a token. epochs: train and held-out KL of each pass (train while
    the numbers still moved). best: the pass that was kept, 0 for none. seconds: wall time."""

    before: float = math.nan
    after: float = math.nan
    best: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    conversion: Report = field(default_factory=Report)

    def figures(self) -> dict[str, Any]:
        """For the provenance: no time in it."""
        return {"kl_before": self.before, "kl_after": self.after, "best_epoch": self.best, "epochs": self.epochs}

    def as_dict(self) -> dict[str, Any]:
        return {**self.conversion.totals(), **self.figures(), "seconds": round(self.seconds, 1)}


def tune(
    checkpoint: str | Path,
    original: str | Path,
    destination: str | Path,
    calibration: Calibration,
    options: TuningOptions = TuningOptions(),
    *,
    device: str = "auto",
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    restart: bool = False,
    progress: Progress | None = None,
) -> TuningReport:
    """Tune the SpQR folder `checkpoint` towards the dense model folder `original`, into the new folder `destination`.

    Both models are held in memory whole, in float32. progress(what, step, steps) is called after every step. A killed run
    goes on from the last finished epoch; the same arguments on the same machine give the same bytes either way.
    Errors: E501 the original or its tokenizer cannot be loaded; E503 the loss is not finite; E505, E506, E507, E511 (another
    tuning, or a conversion, was begun in `destination`; `restart` throws it away), E512; E508 the checkpoint is of another
    model.
    """
    started = time.monotonic()
    where = resolve_device(device)
    source, target = open_source(original), Path(destination)
    require_empty(target)
    if (target / JOURNAL).exists() and not restart:
        raise SpqrError("E511", str(target), "a conversion was begun here; --restart throws it away")
    with Checkpoint.open(checkpoint) as quantized:
        if quantized.config is None:
            raise SpqrError("E505", str(checkpoint), "a single file has no config.json: tune the folder")
        train, held_out, data = calibration.split(
            load_tokenizer(source.companions()), context_length(source.config), seed, options.held_out
        )
        model = _original(source, where)
        unstack(model, source)
        todo = plan(model, source)
        student = Student(quantized, model, todo, options.learn, where)
        made = {
            "calibration": data, "seed": seed, "options": asdict(options),
            "checkpoint": Path(checkpoint).resolve().name, "original_sha256": source.fingerprint(),
        }  # fmt: skip
        identity = {**made, "checkpoint_tensors": _digests(quantized), "device": where.type, "torch": torch.__version__}
        target.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(target)
        try:
            state = TuningState(target / STATE, identity, restart)
            report = _Loop(student, options, train, held_out, seed, where, state, progress).run()
        finally:
            lock.release()
        report.conversion = _write(
            quantized, Path(checkpoint), student, source, todo, target, {**made, **report.figures()}, max_shard_bytes
        )
    report.seconds = time.monotonic() - started
    return report


def _original(source: Source, device: torch.device) -> nn.Module:
    """The dense model in float32, whose own parameters learn nothing. No code from the folder is ever run."""
    from transformers import AutoModelForCausalLM

    # The fast kinds of attention sum gradients in no fixed order on a GPU.
    attention = "sdpa" if device.type == "cpu" else "eager"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SpqrError("E501", str(source.folder), f"transformers cannot load it: {error}") from None
    model.to(device).eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """What identifies the checkpoint's content: the recorded hashes of its tensors, or those of its files."""
    return checkpoint.sha256 or {path.name: file_sha256(path) for path in checkpoint.headers}


class _Loop:
    """The epochs, from wherever `state` stands."""

    def __init__(
        self, student: Student, options: TuningOptions, train: Tensor, held_out: Tensor, seed: int, device: torch.device,
        state: TuningState, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.student, self.options, self.seed, self.device = student, options, seed, device
        self.train, self.held_out = train.to(device), held_out.to(device)
        self.state, self.progress = state, progress
        self.parameters = list(student.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=options.learning_rate, betas=_BETAS)
        self.steps = -(-len(train) // options.batch)  # in an epoch
        self.report = TuningReport()

    def run(self) -> TuningReport:
        """All epochs; leaves the best numbers in the student."""
        report = self.report
        report.before = report.after = self._measure()
        best = [p.detach().clone() for p in self.parameters]
        report.epochs = self.state.load(self.parameters, best, self.optimizer)
        for epoch in range(len(report.epochs), self.options.epochs):
            train = self._epoch(epoch)
            held_out = self._measure()
            if held_out < min([report.before, *(row["held_out"] for row in report.epochs)]):
                best = [p.detach().clone() for p in self.parameters]
            report.epochs.append({"train": train, "held_out": held_out})
            self.state.save(self.parameters, best, self.optimizer, report.epochs)
        losses = [report.before, *(row["held_out"] for row in report.epochs)]
        report.after = min(losses)
        report.best = losses.index(report.after)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best, strict=True):
                parameter.copy_(value)
        return report

    def _epoch(self, epoch: int) -> float:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed + epoch)).to(self.device)
        total = 0.0
        for step in range(self.steps):
            ids = self.train[order[step * self.options.batch : (step + 1) * self.options.batch]]
            self.optimizer.param_groups[0]["lr"] = self._rate(epoch * self.steps + step)
            loss = self._loss(ids, self.student.weights())
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += self._finite(loss) * len(ids)
            if self.progress is not None:
                self.progress(f"epoch {epoch + 1}", epoch * self.steps + step + 1, self.options.epochs * self.steps)
        return total / len(self.train)

    def _rate(self, step: int) -> float:
        steps = self.options.epochs * self.steps
        warm = min(1.0, (step + 1) / (_WARM_UP * steps + 1))
        return self.options.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _loss(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Mean KL(original || quantized), nats a token."""
        wanted = self.student.target(ids).log_softmax(-1)
        found = self.student.logits(ids, weights).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / ids.numel()

    @torch.no_grad()
    def _measure(self) -> float:
        weights, total = self.student.weights(), 0.0
        for ids in self.held_out.split(self.options.batch):
            total += self._finite(self._loss(ids, weights)) * len(ids)
        return total / len(self.held_out)

    @staticmethod
    def _finite(loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise SpqrError("E503", "tuning", f"the loss is {value}: a smaller learning rate may help")
        return value


def _write(
    quantized: Checkpoint,
    folder: Path,
    student: Student,
    source: Source,
    todo: Plan,
    target: Path,
    made: dict[str, Any],
    max_shard_bytes: int,
) -> Report:
    """The tuned checkpoint, with a report and a model card of its own; returns the report."""
    assert quantized.config is not None
    section = dict(quantized.config["quantization_config"])
    earlier = section.get("provenance") or {}
    provenance = {
        **earlier,
        "source": earlier.get("source", source.folder.resolve().name),
        "tuning": [*earlier.get("tuning", []), made],
    }
    report = Report(
        provenance=provenance, source=earlier.get("source_kind", source.name), mode=earlier.get("mode", "quantized"),
        notes=list(earlier.get("notes", [])),
    )  # fmt: skip
    writer = CheckpointWriter(
        target, max_shard_bytes=max_shard_bytes, config=quantized.config,
        quantization_config={**section, "provenance": provenance},
    )  # fmt: skip
    with writer:
        for module in quantized.modules:
            matrix = student.matrix(module)
            weight = source.load(f"{module}.weight").float()
            error = torch.from_numpy(matrix.dequantize()) - weight
            figures = {"weight_error": float(error.norm() / weight.norm().clamp_min(1e-30))}
            writer.add_matrix(module, matrix)
            report.modules.append(ModuleReport.of(module, matrix, "tuned", figures))
        for name in quantized.dense:
            vector = student.vectors.get(name)
            tensor = dense_tensor(quantized, name) if vector is None else vector.tensor()
            writer.add_dense(name, tensor)
            reason = todo.dense.get(name, "not a parameter of the model")
            size = tensor.numel() * tensor.element_size()
            report.dense[name] = {"parameters": tensor.numel(), "bytes": size, "reason": reason}
        extra: dict[str, Any] = companions(folder)
        writer.finish(extra_files=extra | {REPORT: report.as_json(), "README.md": model_card(report)})
    return report

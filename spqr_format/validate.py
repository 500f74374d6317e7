"""The validator: structure from headers alone, then every payload rule, then (deep) the recorded hashes (spec 12)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .errors import SpqrError
from .payload import broken_rules, not_finite_dense
from .reader import Checkpoint

MAX_FINDINGS = 100
HASH_BLOCK = 2**22

Progress = Callable[[int, int], None]  # bytes of tensors done, bytes of tensors in all


@dataclass(frozen=True)
class Finding:
    """One broken rule: its code, where, and what was found there."""

    code: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"SPQR-{self.code} {self.where}: {self.what}"


@dataclass
class Report:
    """What `validate` found. ok: no rule is broken. hashes: "checked" if every tensor has a digest and was compared."""

    ok: bool = True
    findings: list[Finding] = field(default_factory=list)
    modules: int = 0
    tensors: int = 0
    bytes: int = 0
    hashes: Literal["checked", "not covered", "not asked"] = "not asked"
    truncated: bool = False  # more than MAX_FINDINGS rules are broken

    def as_dict(self) -> dict[str, Any]:
        """For `spqr validate --json`."""
        return asdict(self)

    def _add(self, errors: Iterable[SpqrError]) -> None:
        for error in errors:
            self.ok = False
            if len(self.findings) == MAX_FINDINGS:
                self.truncated = True
                return
            self.findings.append(Finding(error.code, error.where, error.what))


def validate(path: str | os.PathLike[str], *, deep: bool = False, progress: Progress | None = None) -> Report:
    """Checks a checkpoint folder or one .safetensors file against every rule of the spec.

    A broken structure ends the check, for then nothing says what the bytes mean; broken payloads are collected. Memory
    does not grow with the size of the tensors. Raises OSError where a file cannot be read.
    """
    report = Report()
    try:
        checkpoint = Checkpoint.open(path)
    except SpqrError as error:
        report._add([error])
        return report
    with checkpoint:
        report.modules, report.tensors = len(checkpoint.modules), len(checkpoint.place)
        report.bytes = sum(checkpoint.info(name).nbytes for name in checkpoint.place)
        try:
            _payload(checkpoint, report, deep, progress)
        except SpqrError as error:  # E001: a file was cut while it was read
            report._add([error])
    return report


def _payload(checkpoint: Checkpoint, report: Report, deep: bool, progress: Progress | None) -> None:
    done, total = 0, report.bytes * (2 if deep else 1)

    def step(names: Iterable[str]) -> None:
        nonlocal done
        done += sum(checkpoint.info(name).nbytes for name in names)
        if progress is not None:
            progress(done, total)

    for module, layout in checkpoint.modules.items():
        windows = {leaf: checkpoint.window(f"{module}.{leaf}") for leaf in layout.tensors()}
        report._add(broken_rules(layout, windows, module))
        step(f"{module}.{leaf}" for leaf in windows)
    for name in checkpoint.dense:
        report._add(not_finite_dense(checkpoint.window(name), checkpoint.dtype_of(name), name))
        step([name])
    if deep:
        report.hashes = "checked" if checkpoint.place.keys() <= checkpoint.sha256.keys() else "not covered"
        for name in checkpoint.place:
            report._add(_hash(checkpoint, name))
            step([name])


def _hash(checkpoint: Checkpoint, name: str) -> Iterable[SpqrError]:
    recorded = checkpoint.sha256.get(name)
    if recorded is None:
        return
    window = checkpoint.window(name)
    digest = hashlib.sha256()
    count = checkpoint.info(name).nbytes // window.dtype.itemsize
    for begin in range(0, count, HASH_BLOCK):
        digest.update(window.flat(begin, min(begin + HASH_BLOCK, count)).data)
    if digest.hexdigest() != recorded:
        what = f"the bytes have sha256 {digest.hexdigest()[:16]}..., recorded is {recorded[:16]}..."
        yield SpqrError("E205", f"{checkpoint.place[name].name} {name}", what)

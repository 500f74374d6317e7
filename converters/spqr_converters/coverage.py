"""How much of a model is quantized: what the user wants dense, and a bound on what else stays so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from spqr_format.errors import SpqrError

from .blocks import Plan
from .sources import Source

ASKED = "asked for"
STORED = "stored dense by the source"
_MOST = 0.05  # of the linear parameters
_NOT_LINEAR = ("embedding", "lm_head", "bias", "vector")  # reasons that are no surprise to anyone
_SHOWN = 4


def keep_dense(todo: Plan, source: Source, patterns: Sequence[str]) -> Plan:
    """The plan in which modules whose name matches a pattern (* and ? stand for any signs) stay dense. E505 where a
    pattern matches nothing."""
    matrices, dense = dict(todo.matrices), dict(todo.dense)
    for pattern in patterns:
        matched = [tensor for tensor in source.entries if fnmatchcase(tensor.removesuffix(".weight"), pattern)]
        if not matched:
            raise SpqrError("E505", "keep_dense", f"{pattern!r} matches no module of {source.folder}")
        for tensor in matched:
            if matrices.pop(tensor, None) is not None or _linear(tensor, dense[tensor], source):
                dense[tensor] = ASKED
    if not matrices:
        raise SpqrError("E504", str(source.folder), f"nothing is left to quantize with {', '.join(patterns)} kept dense")
    return replace(todo, matrices=matrices, dense=dense, fused=todo.fused & matrices.keys())


def check_coverage(todo: Plan, source: Source) -> None:
    """E513 where more than 5 % of the parameters of linear layers would stay dense and nobody asked for it: neither
    `keep_dense`, nor a lossless conversion of a source that stores them dense. Embeddings and the output head count as
    neither."""
    left = {
        tensor: source.entries[tensor].numel
        for tensor, reason in todo.dense.items()
        if reason not in (ASKED, STORED) and _linear(tensor, reason, source)
    }
    asked = [tensor for tensor, reason in todo.dense.items() if reason in (ASKED, STORED)]
    quantised = sum(source.entries[tensor].numel for tensor in todo.matrices)
    total = quantised + sum(left.values()) + sum(source.entries[tensor].numel for tensor in asked)
    if sum(left.values()) <= _MOST * total:
        return
    largest = sorted(left, key=lambda tensor: (-left[tensor], tensor))
    names = [f"{tensor.removesuffix('.weight')} ({todo.dense[tensor]})" for tensor in largest[:_SHOWN]]
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    what = (
        f"{sum(left.values()):,} of {total:,} parameters of linear layers ({100 * sum(left.values()) / total:.1f} %) would "
        f"stay dense: {', '.join(names)}{more}; if that is meant, name them with --keep-dense, such as "
        f"--keep-dense '{_pattern(largest)}'"
    )
    raise SpqrError("E513", str(source.folder), what)


def _linear(tensor: str, reason: str, source: Source) -> bool:
    return len(source.entries[tensor].shape) >= 2 and not reason.startswith(_NOT_LINEAR)


def _pattern(tensors: Sequence[str]) -> str:
    """What the names begin with, as a pattern."""
    first = tensors[0].split(".")
    common = 0
    while common < len(first) - 1 and all(tensor.split(".")[: common + 1] == first[: common + 1] for tensor in tensors):
        common += 1
    return ".".join([*first[:common], "*"])

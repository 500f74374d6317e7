"""Perplexity of a model on a text, and how far it is from another: KL divergence and top-1 agreement.

Protocol: the text is tokenised whole, without special tokens; windows of `context` tokens follow each other without overlap
(stride = context), an incomplete last window is dropped; each window predicts its tokens 2..context. Standard errors take
the window, not the token, as the unit, for tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spqr_format.errors import SpqrError

DEFAULT_CONTEXT = 2048
_POSITIONS = 256  # of which float32 log-probabilities are held at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error over windows (nan for a single window)."""

    mean: float
    error: float


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood, its error by the delta method. kl: KL(reference || model), nats
    per token. top1: share of positions with the same argmax. The last three only with a reference."""

    tokens: int
    context: int
    windows: int
    perplexity: Estimate
    reference_perplexity: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `spqr eval --json`."""
        return asdict(self)


def windows_of(text: str, tokenizer: Any, context: int, tokens: int | None = None) -> Tensor:
    """The text's windows int64 [windows, context], of its first `tokens` tokens if given. E507 when there is none."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    if tokens is not None:
        ids = ids[:tokens]
    count = ids.numel() // context
    if count == 0:
        raise SpqrError("E507", "text", f"{ids.numel()} tokens, less than one window of {context}")
    return ids[: count * context].view(count, context)


def context_of(config: Any, wanted: int | None = None) -> int:
    """The window: what is asked for, or the model's context up to 2048 tokens. E505 where the model's is exceeded."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    if wanted is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 2 <= wanted <= longest:
        raise SpqrError("E505", "context", f"{wanted}, expected 2 to {longest}")
    return wanted


def evaluate(
    model: Any, windows: Tensor, *, reference: Any | None = None, batch: int = 1, progress: Progress | None = None
) -> Evaluation:
    """Run the windows int64 [windows, context] through the model, and through the reference if given.

    Raises SpqrError E503 where a model's logits are not finite.
    """
    return evaluate_all([model], windows, reference=reference, batch=batch, progress=progress)[0]


@torch.no_grad()
def evaluate_all(
    models: Sequence[Any], windows: Tensor, *, reference: Any | None = None, batch: int = 1, progress: Progress | None = None
) -> list[Evaluation]:
    """`evaluate` for several models of one vocabulary. The reference runs once over each window, for all of them."""
    sums: list[list[Tensor]] = [[] for _ in models]  # per window: nll, reference nll, kl, agreements
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        other = None if reference is None else _logits(reference, part, "the reference")
        for own, model in zip(sums, models, strict=True):
            logits = _logits(model, part, "the model")
            if other is not None and other.shape != logits.shape:
                what = f"{logits.shape[-1]} tokens in its vocabulary, the reference has {other.shape[-1]}"
                raise SpqrError("E508", "the model", what)
            aligned = None if other is None else other.to(logits.device)
            own.append(_compare(logits, aligned, part[:, 1:].to(logits.device)).cpu())
        if progress:
            progress(min(first + batch, len(windows)), len(windows))
    return [_evaluation(torch.cat(own), windows, reference is not None) for own in sums]


def _evaluation(sums: Tensor, windows: Tensor, compared: bool) -> Evaluation:
    table = sums / (windows.shape[1] - 1)
    nll, reference_nll, kl, top1 = (_estimate(column) for column in table.unbind(1))
    evaluation = {
        "tokens": len(windows) * (windows.shape[1] - 1), "context": windows.shape[1], "windows": len(windows),
        "perplexity": _perplexity(nll),
    }  # fmt: skip
    if compared:
        evaluation |= {"reference_perplexity": _perplexity(reference_nll), "kl": kl, "top1": top1}
    return Evaluation(**evaluation)  # type: ignore[arg-type]


def _logits(model: Any, windows: Tensor, who: str) -> Tensor:
    logits = model(input_ids=windows.to(model.device), use_cache=False).logits[:, :-1]
    if not torch.isfinite(logits).all():
        raise SpqrError("E503", who, "its logits are not finite")
    return logits


def _compare(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    """Sums over the positions of each window, float64 [windows, 4]."""
    sums = torch.zeros(len(logits), 4, dtype=torch.float64, device=logits.device)
    for first in range(0, logits.shape[1], _POSITIONS):
        at = slice(first, first + _POSITIONS)
        log_q = logits[:, at].float().log_softmax(-1)
        gold = targets[:, at, None]
        sums[:, 0] -= log_q.gather(-1, gold).double().sum((1, 2))
        if reference is not None:
            log_p = reference[:, at].float().log_softmax(-1)
            sums[:, 1] -= log_p.gather(-1, gold).double().sum((1, 2))
            sums[:, 2] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum(1)
            sums[:, 3] += (log_p.argmax(-1) == log_q.argmax(-1)).double().sum(1)
    return sums


def _estimate(values: Tensor) -> Estimate:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def _perplexity(nll: Estimate) -> Estimate:
    perplexity = math.exp(nll.mean)
    return Estimate(perplexity, perplexity * nll.error)


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. Raises OSError where it cannot be read and E507 where it is no UTF-8 text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpqrError("E507", str(path), f"not UTF-8 text: {error}") from error

"""Calibration data: a text, its tokens, and random windows of them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError

LONGEST = 2048
SHARDS = 8  # parts of the windows; their Hessians are summed apart, then in pairs


@dataclass(frozen=True)
class Calibration:
    """text: a UTF-8 file. tokens: how many to use, rounded down to whole windows. seqlen: tokens in a window; by default
    the model's context, at most 2048. batch: windows in one forward pass."""

    text: str | Path
    tokens: int = 131072
    seqlen: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch < 1 or (self.seqlen is not None and self.seqlen < 1):
            raise SpqrError("E505", "calibration", "tokens, seqlen and batch are at least 1")

    def window_length(self, context: int | None) -> int:
        """Tokens in a window for a model of this context. E505 when more than the context is asked for."""
        if self.seqlen is not None:
            if context is not None and self.seqlen > context:
                raise SpqrError("E505", "calibration.seqlen", f"{self.seqlen}, but the model's context is {context}")
            return min(self.seqlen, self.tokens)
        return min(context or LONGEST, LONGEST, self.tokens)

    def windows(self, tokenizer: Any, context: int | None, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Random windows int64 [n, length] of the text, the same for a seed, and their provenance.

        Errors: E501 the text cannot be read; E507 it has fewer tokens than one window.
        """
        ids, starts, provenance = self._draw(tokenizer, context, seed)
        # The bytes depend on both: products of other shapes, and sums in another order, are rounded otherwise.
        return _cut(ids, starts, provenance["seqlen"]), provenance | {"batch": self.batch, "shards": SHARDS}

    def split(
        self, tokenizer: Any, context: int | None, seed: int, share: float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The same windows in two parts, the second with `share` of them (at least one), and their provenance. Windows of
        the first that have tokens in common with one of the second are left out. E507 where none is left."""
        ids, starts, provenance = self._draw(tokenizer, context, seed)
        length, count = provenance["seqlen"], max(1, round(share * len(starts)))
        first, second = starts[:-count], starts[-count:]
        apart = ((first[:, None] - second).abs() >= length).all(1)
        if not bool(apart.any()):
            raise SpqrError("E507", str(self.text), f"{len(starts)} windows of {length} tokens leave none that is held out")
        train = _cut(ids, first[apart], length)
        provenance |= {"train_tokens": train.numel(), "held_out_tokens": count * length}
        return train, _cut(ids, second, length), provenance

    def _draw(self, tokenizer: Any, context: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The text's tokens int64 [n], where the random windows start in them, and the provenance."""
        try:
            data = Path(self.text).read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpqrError("E501", str(self.text), f"not readable as UTF-8 text: {error}") from None
        length = self.window_length(context)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) < length:
            raise SpqrError("E507", str(self.text), f"{len(ids)} tokens, and one window takes {length}")
        count = max(1, self.tokens // length)
        if len(ids) < count * length:
            warnings.warn(
                f"the calibration text has {len(ids)} tokens and {count * length} are asked for: windows overlap",
                stacklevel=2,
            )
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
        provenance = {
            "text": Path(self.text).name,
            "text_sha256": hashlib.sha256(data).hexdigest(),
            "tokens": count * length,
            "seqlen": length,
            "text_tokens": len(ids),
        }
        return ids, starts, provenance


def shards(windows: torch.Tensor, batch: int) -> list[tuple[torch.Tensor, ...]]:
    """Windows int64 [n, length] in `SHARDS` parts, each in batches: the same parts for any number of processes, so that the
    sums over a part are the same too. With few windows the last parts are empty."""
    return [part.split(batch) if len(part) else () for part in windows.tensor_split(SHARDS)]


def _cut(ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    return torch.stack([ids[s : s + length] for s in starts.tolist()])

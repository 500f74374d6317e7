"""What every kind of source offers: dense tensors under the names that the model gives them, whatever lies in the files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import Layout
from spqr_format.matrix import PackedMatrix, SpqrMatrix


@dataclass(frozen=True)
class Entry:
    """One dense tensor of a source: dtype and shape as `load` returns it, and its bytes [begin, end) in a file.

    For a tensor that the source makes from several stored ones, file is "" and end - begin the bytes of all of them.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Carried:
    """A matrix in stored form, and weights(begin, end): rows of the weight as the source's own tool gives them, from the
    source's bytes."""

    matrix: PackedMatrix
    weights: Callable[[int, int], torch.Tensor]


class Source(ABC):
    """A checkpoint to convert. A new kind is one class in a file of its own and one line in `KINDS` of sources/__init__.

    folder: where it lies. config: a dense model's config.json (no quantization_config). files: names of the weight files.
    entries: tensor name as in a dense Hugging Face checkpoint -> Entry. Everything is read on demand, one module at a time.
    """

    name: ClassVar[str]  # of the kind, as reports show it
    quantized: ClassVar[bool] = True  # False where the weights are those of a model that was never quantized
    folder: Path
    config: dict[str, Any]
    files: list[str]
    entries: dict[str, Entry]

    @abstractmethod
    def __init__(self, folder: str | Path) -> None: ...

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        """True when the folder's contents (never its name) are of this kind. Reads headers at most."""

    @abstractmethod
    def load(self, name: str) -> torch.Tensor:
        """The dense tensor, on the CPU: stored as it is, or dequantized as the source's own tool does it. E501."""

    def matrix(self, name: str) -> SpqrMatrix | None:
        """The codes of weight `name` carried over bit for bit, or None where the source stores it dense.

        Raises SpqrError E510 where the format cannot hold what the source stores; the message says what can be done.
        """
        return None

    def layout(self, name: str) -> Layout | None:
        """Geometry of `matrix(name)`, or None where the source stores it dense; cheaper where a source can. E510."""
        matrix = self.matrix(name)
        return None if matrix is None else matrix.layout

    def carried(self, name: str) -> Carried | None:
        """The same as `matrix`, in stored form, where a source can make it without looking at single codes: every code was
        compared with the source's as bits. None where it cannot, or stores the weight dense."""
        return None

    def notes(self) -> list[str]:
        """What a user must know: rules that decided an ambiguity, rounding that the source's own tool does."""
        return []

    def choices(self) -> dict[str, Any]:
        """What the caller decided about reading this source, as JSON."""
        return {}

    def companions(self) -> Path:
        """The folder with the tokenizer and the other files that come along."""
        return self.folder

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every weight file, read in small pieces; a few files at once."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return dict(zip(self.files, pool.map(file_sha256, [self.folder / file for file in self.files]), strict=True))


def file_sha256(path: Path) -> str:
    """Hex digest of a file. E501 where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise SpqrError("E501", str(path), f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. E501 where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise SpqrError("E501", str(folder), "no config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SpqrError("E501", str(path), f"not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SpqrError("E501", str(path), "not a JSON object")
    return config

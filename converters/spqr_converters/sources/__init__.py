"""Kinds of checkpoints that can be converted. `open_source` finds the kind from what lies in the folder."""

from __future__ import annotations

from pathlib import Path

from spqr_format.errors import SpqrError

from .awq import AwqSource
from .base import Entry, Source, read_config
from .bitsandbytes import BitsAndBytesSource
from .compressed_tensors import CompressedTensorsSource
from .dense import DenseSource
from .fp8 import Fp8Source
from .gguf import GgufSource
from .gptq import GptqSource
from .hqq import HqqSource
from .spqr_hf import SpqrHfSource
from .spqr_legacy import SpqrLegacySource
from .squeezellm import SqueezeLlmSource
from .torch_bin import TorchBinSource

KINDS: tuple[type[Source], ...] = (
    GptqSource,
    AwqSource,
    SpqrHfSource,
    SpqrLegacySource,
    SqueezeLlmSource,
    CompressedTensorsSource,
    Fp8Source,
    BitsAndBytesSource,
    HqqSource,
    DenseSource,
    TorchBinSource,
    GgufSource,
)

__all__ = ["KINDS", "DenseSource", "Entry", "GptqSource", "Source", "open_source"]


def open_source(path: str | Path) -> Source:
    """The source at a path: a folder, or a .gguf file. Raises SpqrError E501 where no kind recognises it."""
    folder = Path(path)
    if folder.is_file() or (GgufSource.recognises(folder, {}) and not (folder / "config.json").exists()):
        return GgufSource(folder)  # has no config.json of its own
    if not folder.is_dir():
        raise SpqrError("E501", str(path), "no such folder")
    config = read_config(folder)
    for kind in KINDS:
        if kind.recognises(folder, config):
            return kind(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    found = f"quantized by {method!r}, which is not read" if method else "no weights of a kind that is read"
    raise SpqrError("E501", str(folder), found)

"""Loading with every structural rule checked first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from spqr_format.metadata import QUANT_METHOD
from spqr_format.reader import Checkpoint


def from_pretrained(path: str | os.PathLike[str], *args: Any, auto_class: Any = None, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained`, after a check of the whole folder: config.json, the index and all headers.

    Plain `from_pretrained` runs the same checks on the shards that transformers finds, but transformers reads
    config.json and the index itself, and reports what it finds wrong there in its own exceptions and words. Here these
    are SpqrErrors with codes. A `path` that is no folder is a repository's name and goes to transformers as it is, and so
    does the folder of a dense model or of one that another method has quantized.
    auto_class: AutoModelForCausalLM if None.
    """
    if os.path.isdir(path) and not {"subfolder", "variant"} & kwargs.keys() and not _is_other(path):
        Checkpoint.open(path).close()
    return (auto_class or AutoModelForCausalLM).from_pretrained(path, *args, **kwargs)


def _is_other(path: str | os.PathLike[str]) -> bool:
    """True for a folder whose config.json can be read and does not say that it is in this format."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
        section = config.get("quantization_config") or {}
        return bool(section.get("quant_method") != QUANT_METHOD)
    except (OSError, ValueError, AttributeError):
        return False

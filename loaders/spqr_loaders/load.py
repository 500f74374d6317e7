"""Loading with every structural rule checked first."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM

from spqr_format.reader import Checkpoint


def from_pretrained(path: str | os.PathLike[str], *args: Any, auto_class: Any = None, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained`, after a check of the whole folder: config.json, the index and all headers.

    Plain `from_pretrained` runs the same checks on the shards that transformers finds, but transformers reads
    config.json and the index itself, and reports what it finds wrong there in its own exceptions and words. Here these
    are SpqrErrors with codes. A `path` that is no folder is a repository's name and goes to transformers as it is.
    auto_class: AutoModelForCausalLM if None.
    """
    if os.path.isdir(path) and not {"subfolder", "variant"} & kwargs.keys():
        Checkpoint.open(path).close()
    return (auto_class or AutoModelForCausalLM).from_pretrained(path, *args, **kwargs)

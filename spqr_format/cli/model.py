"""A model and its tokenizer, SpQR or dense, as eval and generate load them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from ..errors import SpqrError


def install_hint(extra: str) -> click.ClickException:
    """What to say where a command's own libraries are not installed."""
    return click.ClickException(f"this command needs more libraries: pip install 'spqr-format[{extra}]'")


def load_model(path: Path, device: str, dtype: str) -> Any:
    """A causal language model on the device. dtype: auto (the checkpoint's), float32, float16 or bfloat16.

    Raises SpqrError E501 where the folder is no model, and the loader's codes for a broken one.
    """
    try:
        import spqr_loaders  # registers the format
        import torch
    except ImportError as error:
        raise install_hint("transformers") from error
    if not (path / "config.json").is_file():
        raise SpqrError("E501", str(path), "no config.json: not a model folder")
    _quiet()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    return spqr_loaders.from_pretrained(path, dtype=wanted, device_map=device).eval()


def load_tokenizer(path: Path) -> Any:
    """The folder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _quiet() -> None:
    """transformers' own loading bar would draw over ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def device_option(command: Any) -> Any:
    """--device, the same in every command."""
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")(command)


def dtype_option(command: Any) -> Any:
    """--dtype, the same in every command."""
    choice = click.Choice(["auto", "float32", "float16", "bfloat16"])
    return click.option("--dtype", type=choice, default="auto", show_default=True, help="Of activations and dense weights.")(command)

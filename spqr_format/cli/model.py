"""A model and its tokenizer, SpQR or dense, as eval and generate load them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import SpqrError


@contextmanager
def libraries(extra: str) -> Iterator[None]:
    """Around imports: a library that is not installed becomes the advice to install the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("spqr_"):
            raise
        advice = f"this command needs {error.name}: pip install 'spqr-format[{extra}]'"
        raise click.ClickException(advice) from error


def load_model(path: Path, device: str, dtype: str) -> Any:
    """A causal language model on the device. dtype: auto (the checkpoint's), float32, float16 or bfloat16.

    Raises SpqrError E501 where the folder is no model, and the loader's codes for a broken one.
    """
    with libraries("transformers"):
        import torch

        import spqr_loaders  # registers the format
    if not (path / "config.json").is_file():
        raise SpqrError("E501", str(path), "no config.json: not a model folder")
    _quiet()
    device = chosen_device(device)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    return spqr_loaders.from_pretrained(path, dtype=wanted, device_map=device).eval()


def chosen_device(device: str) -> str:
    """The device, where it is auto a GPU if there is one."""
    if device != "auto":
        return device
    with libraries("transformers"):
        import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    return click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."
    )(command)


def dtype_option(command: Any) -> Any:
    """--dtype, the same in every command."""
    choice = click.Choice(["auto", "float32", "float16", "bfloat16"])
    return click.option("--dtype", type=choice, default="auto", show_default=True, help="Of activations and dense weights.")(
        command
    )


def tokens_option(command: Any) -> Any:
    """--tokens, of the text that a conversion or a tuning reads."""
    return click.option(
        "--tokens", type=click.IntRange(1), default=131072, show_default=True, help="Of the calibration text to use."
    )(command)


def context_option(command: Any) -> Any:
    """--context, the same in every command that cuts a text into windows."""
    return click.option("--context", type=click.IntRange(2), help="Tokens in a window.  [default: the model's, at most 2048]")(
        command
    )

"""spqr generate"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from .model import chosen_device, device_option, dtype_option, load_model, load_tokenizer
from .output import duration

_PATIENCE = 5.0  # seconds without a token, after which a GPU's user is told why


@click.command("generate")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 always takes the most likely token.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option(
    "--compile", "compiled", is_flag=True,
    help="Compile what is recorded as a CUDA graph: some half a minute at the first tokens, then faster.",
)  # fmt: skip
@click.option("--eager", is_flag=True, help="Run a step's operations one by one, as transformers does by itself.")
@device_option
@dtype_option
def generate_command(
    model: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    compiled: bool,
    eager: bool,
    device: str,
    dtype: str,
) -> None:
    """Continue a prompt, token by token as they come. Speed is printed on stderr.

    On a GPU a step is recorded once as a CUDA graph and replayed (models whose layers look at a window excepted).

    \b
    Examples:
      spqr generate ./llama-spqr "The history of" --max-new-tokens 40
      spqr generate ./llama-spqr "The history of" --max-new-tokens 2000 --compile
    """
    if compiled and chosen_device(device).startswith("cpu"):
        raise click.UsageError("--compile needs a GPU")
    if compiled and eager:
        raise click.UsageError("--compile or --eager")
    loaded = load_model(model, device, dtype)
    tokenizer = load_tokenizer(model)
    import torch
    from transformers import TextStreamer

    from spqr_loaders import RecordingError, graph_decoding

    class Timed(TextStreamer):
        """Writes down when the prompt, and then each token, came. Calls `begun` before the first token."""

        def __init__(self, begun: Callable[[], None]) -> None:
            super().__init__(tokenizer, skip_special_tokens=True)
            self.times: list[float] = []
            self.begun = begun

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            if len(self.times) == 2:
                self.begun()
            super().put(value)

    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with _explained(loaded.device.type) as begun:
        streamer = Timed(begun)
        if loaded.device.type == "cuda" and not eager:
            # transformers hands no streamer to a custom_generate.
            how["custom_generate"] = functools.partial(graph_decoding, streamer=streamer)
            how |= {"cache_implementation": "static", "disable_compile": not compiled}
        try:
            loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **how)
        except RecordingError as error:
            raise click.ClickException(
                f"{model}: a step cannot be recorded as a CUDA graph: use --eager ({error.__cause__})"
            ) from error
    if compiled and getattr(loaded, "_compiled_call", None) is None:
        click.echo("transformers did not compile this model", err=True)
    click.echo(speed(streamer.times), err=True)


@contextlib.contextmanager
def _explained(device: str) -> Iterator[Callable[[], None]]:
    """Says on stderr what a GPU's user waits for, unless what it gives is called in time."""
    # on a line of its own: the prompt's stands open
    text = "\ncompiling kernels for this GPU and the shapes of this model: they are kept, and later runs begin at once"
    notice = threading.Timer(_PATIENCE, functools.partial(click.echo, text, err=True))
    notice.daemon = True
    if device == "cuda":
        notice.start()
    try:
        yield notice.cancel
    finally:
        notice.cancel()


def speed(times: list[float]) -> str:
    """How fast tokens came. times: when the prompt, and then each token, was there, in seconds."""
    steps = [then - now for now, then in itertools.pairwise(times[1:])]
    first = f"the first token after {duration(times[1] - times[0])}" if len(times) > 1 else "no token"
    return f"{first}, then {1 / statistics.median(steps):.1f} tokens/s (median)" if steps else first

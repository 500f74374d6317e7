"""spqr generate"""

from __future__ import annotations

from pathlib import Path

import click

from .model import device_option, dtype_option, load_model, load_tokenizer


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
@device_option
@dtype_option
def generate_command(
    model: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str, dtype: str
) -> None:
    """Continue a prompt, token by token as they come.

    \b
    Example:  spqr generate ./llama-spqr "The history of" --max-new-tokens 40
    """
    loaded = load_model(model, device, dtype)
    tokenizer = load_tokenizer(model)
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    loaded.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **sampling
    )

"""spqr eval"""

from __future__ import annotations

from pathlib import Path

import click

from .model import device_option, dtype_option, libraries, load_model, load_tokenizer
from .output import plus_minus, print_json, table
from .progress import progress_bar


@click.command("eval")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--reference",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The original model: adds KL divergence and top-1 agreement.",
)
@click.option("--tokens", type=click.IntRange(2), help="Only the first so many tokens of the text.")
@click.option("--context", type=click.IntRange(2), help="Window in tokens.  [default: the model's, at most 2048]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Windows in one forward pass.")
@device_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def eval_command(
    model: Path, text: Path, reference: Path | None, tokens: int | None, context: int | None, batch: int, device: str,
    dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure perplexity on a text file, and how far a model is from its original.

    The text is cut into windows that do not overlap (stride = context); each predicts its tokens from the second on. KL is
    KL(original || model) in nats a token; top-1 is the share of positions where both rank the same token first. ± is one
    standard error, over windows.

    \b
    Example:  spqr eval ./llama-spqr wikitext2_test.txt --reference ./llama
    """
    with libraries("transformers"):
        from spqr_converters.evaluation import context_of, evaluate, read_text, windows_of
    content = read_text(text)
    loaded = load_model(model, device, dtype)
    original = None if reference is None else load_model(reference, device, dtype)
    windows = windows_of(content, load_tokenizer(model), context_of(loaded.config, context), tokens)
    with progress_bar("evaluating", shown=not as_json) as bar:
        result = evaluate(loaded, windows, reference=original, batch=batch, progress=lambda done, total: bar("", done, total))
    if as_json:
        print_json(result.as_dict())
        return
    rows = []
    if result.reference_perplexity and result.kl and result.top1:
        rows.append(
            [
                "perplexity of the original",
                plus_minus(result.reference_perplexity.mean, result.reference_perplexity.error, 3),
            ]
        )
    rows.append(["perplexity", plus_minus(result.perplexity.mean, result.perplexity.error, 3)])
    if result.kl and result.top1:
        rows.append(["KL to the original, nats a token", plus_minus(result.kl.mean, result.kl.error, 5)])
        rows.append(["top-1 agreement, %", plus_minus(100 * result.top1.mean, 100 * result.top1.error, 2)])
    table([f"{result.tokens} tokens in {result.windows} windows of {result.context}", ""], rows)

"""spqr eval"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import SpqrError
from .model import context_option, device_option, dtype_option, libraries, load_model, load_tokenizer
from .output import plus_minus, print_json, table
from .progress import progress_bar


@click.command("eval")
@click.argument(
    "models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--reference",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The original model: adds KL divergence and top-1 agreement.",
)
@click.option("--compare", is_flag=True, help="Several MODELs of one original in one table, with their bits on disk.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="With --compare: bits and KL as an SVG file.")
@click.option("--tokens", type=click.IntRange(2), help="Only the first so many tokens of the text.")
@context_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Windows in one forward pass.")
@device_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def eval_command(
    models: tuple[Path, ...], text: Path, reference: Path | None, compare: bool, plot: Path | None, tokens: int | None,
    context: int | None, batch: int, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure perplexity on a text file, and how far a model is from its original.

    The text is cut into windows that do not overlap (stride = context); each predicts its tokens from the second on. KL is
    KL(original || model) in nats a token; top-1 is the share of positions where both rank the same token first. ± is one
    standard error, over windows.

    With --compare the original runs once over each window, for all models; all of them are in memory together.

    \b
    Examples:
      spqr eval ./llama-spqr wikitext2_test.txt --reference ./llama
      spqr eval --compare ./llama-3.2 ./llama-3.9 ./llama-4.6 wikitext2_test.txt --reference ./llama --plot bits.svg
    """
    if compare and reference is None:
        raise click.UsageError("--compare needs the original: --reference")
    if not compare and (len(models) > 1 or plot):
        raise click.UsageError(f"{'--plot' if plot else 'more than one model'} goes with --compare")
    with libraries("transformers"):
        from spqr_converters.evaluation import context_of, evaluate_all, read_text, windows_of
    if plot:
        with libraries("plot"):
            import matplotlib  # noqa: F401 - said before the work, not after it
    content = read_text(text)
    loaded = [load_model(model, device, dtype) for model in models]
    original = None if reference is None else load_model(reference, device, dtype)
    windows = windows_of(content, load_tokenizer(models[0]), context_of(loaded[0].config, context), tokens)
    for other in [*models[1:], *([] if reference is None else [reference])]:
        same = windows_of(content, load_tokenizer(other), windows.shape[1], tokens)
        if same.shape != windows.shape or not (same == windows).all():
            raise SpqrError("E508", str(other), f"its tokenizer makes other tokens of {text} than that of {models[0]}")
    with progress_bar("evaluating", shown=not as_json) as bar:
        results = evaluate_all(
            loaded, windows, reference=original, batch=batch, progress=lambda done, total: bar("", done, total)
        )
    if compare:
        _show_comparison(models, results, plot, as_json)
    else:
        _show(results[0], as_json)


def _show_comparison(models: tuple[Path, ...], results: list[Any], plot: Path | None, as_json: bool) -> None:
    from spqr_converters import comparison

    rows = [
        comparison.Compared(str(model), comparison.stored_bits(model), result)
        for model, result in zip(models, results, strict=True)
    ]
    if plot:
        comparison.plot(rows, plot)
    first = results[0]
    if as_json:
        protocol = {"tokens": first.tokens, "windows": first.windows, "context": first.context, "stride": first.context}
        print_json({"protocol": protocol, "models": [row.as_dict() for row in rows]})
        return
    shown = [["the original", "", _figure(first.reference_perplexity, 3), "", ""]]
    for row in rows:
        result, bits = row.evaluation, "-" if row.bits is None else f"{row.bits:.3f}"
        top1 = _figure(result.top1, 2, 100)
        shown.append([row.name, bits, _figure(result.perplexity, 3), _figure(result.kl, 5), top1])
    table(["model", "bits", "perplexity", "KL, nats a token", "top-1, %"], shown)
    click.echo(f"{first.tokens} tokens in {first.windows} windows of {first.context}, stride {first.context}")


def _figure(estimate: Any, digits: int, times: int = 1) -> str:
    return plus_minus(times * estimate.mean, times * estimate.error, digits)


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(result.as_dict())
        return
    rows = []
    if result.reference_perplexity and result.kl and result.top1:
        rows.append(["perplexity of the original", _figure(result.reference_perplexity, 3)])
    rows.append(["perplexity", _figure(result.perplexity, 3)])
    if result.kl and result.top1:
        rows.append(["KL to the original, nats a token", _figure(result.kl, 5)])
        rows.append(["top-1 agreement, %", _figure(result.top1, 2, 100)])
    table([f"{result.tokens} tokens in {result.windows} windows of {result.context}", ""], rows)

"""spqr export"""

from __future__ import annotations

from pathlib import Path

import click

from .model import libraries
from .output import duration, print_json, size
from .progress import progress_bar


@click.command("export")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["safetensors", "gguf", "gptq"]), default="safetensors", show_default=True, help="The format."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32", "q8_0"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto is the model's own. q8_0: GGUF only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export_command(model: Path, destination: Path, to: str, dtype: str, as_json: bool) -> None:
    """Write MODEL, an SpQR checkpoint, in another format into the new folder DESTINATION.

    \b
    safetensors  the dense weights, as any Hugging Face tool loads them
    gguf         one .gguf file with tokenizer for llama.cpp (llama, mistral, mixtral, qwen2, qwen3, gemma, phi3)
    gptq         the same codes as GPTQ v2; only for what was imported with --lossless, else SPQR-E510

    \b
    Examples:
      spqr export ./llama-spqr ./dense --to safetensors --dtype bfloat16
      spqr export ./llama-spqr ./llama-gguf --to gguf --dtype q8_0
    """
    with libraries("convert"):
        from spqr_converters.export import export
    with libraries("convert"), progress_bar("exporting", shown=not as_json) as bar:
        report = export(model, destination, to=to, dtype=dtype, progress=bar)
    if as_json:
        print_json(report.as_dict())
        return
    click.echo(
        f"{report.tensors} tensors, {report.parameters:,} parameters as {report.dtype}: {size(report.bytes)} in "
        f"{duration(report.seconds)}; rounding of the quantized weights at most "
        f"{max(report.rounding.values(), default=0.0):.2g} relative"
    )
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"wrote {destination}")

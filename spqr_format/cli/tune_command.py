"""spqr tune"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .model import context_option, device_option, libraries, tokens_option
from .output import duration, print_json
from .progress import progress_bar


@click.command("tune")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("original", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A UTF-8 text like the model's use.",
)
@tokens_option
@context_option
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Windows in a step.")
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Passes over the windows.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=1e-3,
    show_default=True,
    help="1 moves a scale by all of itself in a step.",
)
@click.option(
    "--learn",
    type=click.Choice(["all", "matrices", "vectors"]),
    default="all",
    show_default=True,
    help="matrices: the statistics and outliers of quantized layers. vectors: norms and biases.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the windows and their order.")
@device_option
@click.option("--restart", is_flag=True, help="Throw away what an interrupted tuning left in DESTINATION.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def tune_command(
    model: Path, original: Path, destination: Path, calibration: Path, tokens: int, context: int | None, batch: int,
    epochs: int, learning_rate: float, learn: str, seed: int, device: str, restart: bool, as_json: bool,
) -> None:  # fmt: skip
    """Bring MODEL, an SpQR folder, nearer to ORIGINAL, the dense model it was made of, at the same bits.

    The scales, zeros and outliers (and norms and biases) are learnt from the original's predictions on the calibration text;
    the codes stay. Some windows are held out, and the state that does best on them is written into the new folder
    DESTINATION; where nothing helps, that is MODEL as it was.

    Takes the memory of both models in float32, and the time of about four forward passes over the text per epoch. When it is
    interrupted, the same command goes on after the last finished epoch.

    \b
    Example:  spqr tune ./llama-spqr ./llama ./llama-tuned --calibration text.txt
    """
    with libraries("convert"):
        from spqr_converters import Calibration, TuningOptions, tune

        from ..journal import PARTIAL
    data = Calibration(text=calibration, tokens=tokens, seqlen=context)
    options = TuningOptions(epochs=epochs, learning_rate=learning_rate, batch=batch, learn=learn)
    try:
        with progress_bar("tuning", shown=not as_json) as bar:
            report: Any = tune(
                model, original, destination, data, options, device=device, seed=seed, restart=restart, progress=bar
            )
    except (KeyboardInterrupt, OSError):
        if destination.is_dir() and any(path.name.endswith(PARTIAL) for path in destination.iterdir()):
            click.echo("interrupted: the same command goes on from here, or begins anew with --restart", err=True)
        raise
    if as_json:
        print_json(report.as_dict())
        return
    click.echo(f"KL to the original on held-out windows: {report.before:.5f} before, {report.after:.5f} after; "
               f"epoch {report.best} of {len(report.epochs)} kept; in {duration(report.seconds)}")  # fmt: skip
    click.echo(f"wrote {destination}")

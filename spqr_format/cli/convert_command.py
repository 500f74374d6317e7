"""spqr convert"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..journal import JOURNAL
from .launcher import process_group
from .model import context_option, device_option, libraries, tokens_option
from .output import duration, print_json, size, table
from .progress import progress_bar


class Share(click.ParamType):
    """A fraction, or a percentage with its sign: 0.003 or 0.3%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(value[:-1]) / 100 if str(value).endswith("%") else float(value)
        except ValueError:
            self.fail(f"{value!r} is no share: write 0.003 or 0.3%", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is not between 0 and 1", param, ctx)
        return share


class Size(click.ParamType):
    """Bytes, with a unit if you like: 5GB, 500MB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", str(value))
        if not match:
            self.fail(f"{value!r} is no size: write 5GB or 500MB", param, ctx)
        return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


class MemoryLimit(Size):
    """Bytes of one kind of memory: 8GB is RAM, cuda=20GB a GPU's."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        kind, _, amount = value.rpartition("=")
        return kind or "cpu", super().convert(amount, param, ctx)


_UNIFORM = ("weight_bits", "group_size", "statistics", "outlier_share", "outlier_threshold")  # the same for every module
_BUDGET = ("bits_per_weight", "preset")
_REQUANTIZE = ("calibration", *_UNIFORM, *_BUDGET, "seed")
_PRESETS = ("near-lossless", "balanced", "small")


@click.command("convert")
@click.pass_context
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--lossless",
    is_flag=True,
    help="Carry the codes of a quantized source (GPTQ, AWQ, ...) over bit for bit, in its own bits and groups.",
)
@click.option(
    "--gptq-zeros",
    type=click.Choice(["auto", "v1", "v2"]),
    default="auto",
    show_default=True,
    help="How a GPTQ source stores its zero points: v1 less one, v2 as they are.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 text like the model's use. Without it the weights alone decide, at a visible loss.",
)
@tokens_option
@context_option
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Calibration windows in one forward pass.")
@click.option(
    "--preset",
    type=click.Choice(_PRESETS),
    default="balanced",
    show_default=True,
    help="A budget with a name: 4.65, 3.9 or 3.15 stored bits a weight. Every module gets its own bits, group size and "
    "outliers, so that the predicted loss is least.",
)
@click.option("--bits-per-weight", type=click.FloatRange(0, min_open=True), help="Instead: a budget of your own, such as 3.9.")
@click.option(
    "--weight-bits", "-b", type=click.IntRange(2, 4), default=3, show_default=True,
    help="Instead of a budget, as the options down to the outliers: bits of a code, the same for every module.",
)  # fmt: skip
@click.option(
    "--group-size",
    "-g",
    type=click.IntRange(16),
    default=16,
    show_default=True,
    help="Columns that share a scale and a zero; a multiple of 16.",
)
@click.option(
    "--statistics",
    type=click.Choice(["bilevel", "direct"]),
    default="bilevel",
    show_default=True,
    help="bilevel: 3-bit scales and zeros. direct: an fp16 scale and an integer zero a group.",
)
@click.option("--outlier-share", type=Share(), help="Weights kept apart in fp16, 32 bits each: 0.003 or 0.3%.  [default: none]")
@click.option("--outlier-threshold", type=click.FloatRange(0, min_open=True), help="Instead: SpQR's relative threshold.")
@click.option(
    "--keep-dense",
    multiple=True,
    metavar="PATTERN",
    help="Modules that stay as they are, such as 'model.layers.0.*' or '*.down_proj'. May be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the calibration windows.")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Of one output file.")
@device_option
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Modules at a time, on a CPU and without calibration. The output is the same.  [default: one a core, at most 8]",
)
@click.option(
    "--max-memory",
    type=MemoryLimit(),
    multiple=True,
    help="RAM that may be taken, such as 8GB, and a GPU's, such as cuda=20GB. Activations that do not fit lie in a file in "
    "DESTINATION. The output is the same.  [default: what is free]",
)
@click.option("--restart", is_flag=True, help="Throw away what an interrupted conversion left in DESTINATION.")
@click.option("--dry-run", is_flag=True, help="Print what is predicted and the plan of a budget; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert_command(
    invocation: click.Context, source: Path, destination: Path, lossless: bool, gptq_zeros: str, calibration: Path | None,
    tokens: int, context: int | None, batch: int, preset: str, bits_per_weight: float | None, weight_bits: int,
    group_size: int, statistics: str, outlier_share: float | None, outlier_threshold: float | None,
    keep_dense: tuple[str, ...], seed: int, max_shard_size: int, device: str, workers: int | None,
    max_memory: tuple[tuple[str, int], ...], restart: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Quantize a checkpoint: SOURCE, a Hugging Face model folder, into the new folder DESTINATION.

    SOURCE may be dense, or quantized by another tool: then its dequantized weights are quantized anew, and the report says
    what this step added; or, with --lossless, its codes are carried over as they are. What SOURCE is, is found from its files.

    Works block by block, so that memory holds one block of the model and not the model; --dry-run says how much that is, and
    --max-memory bounds it. Output embedding and token embedding stay as they are. The destination gets the tokenizer, a
    report (spqr_report.json) and where it all comes from.

    When it is interrupted, the same command goes on where it was, and the result is that of an unbroken run.

    \b
    Examples:
      spqr convert ./llama ./llama-spqr --calibration text.txt
      spqr convert ./llama ./llama-spqr --calibration text.txt --bits-per-weight 3.5
      spqr convert ./llama ./llama-spqr --calibration text.txt --weight-bits 3 --outlier-share 0.3%
      spqr convert ./llama ./llama-spqr --dry-run
      spqr convert ./llama-gptq ./llama-spqr --lossless
      torchrun --nproc-per-node 4 --no-python spqr convert ./llama ./llama-spqr --calibration text.txt
    """
    with libraries("convert"):
        from spqr_converters import Calibration, convert, predict
        from spqr_converters.sources import GptqSource
    given = [name for name in _REQUANTIZE if invocation.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if lossless and given:
        raise click.UsageError(f"--lossless takes no --{given[0].replace('_', '-')}: the source's codes stay as they are")
    budget = _budget(given, preset, bits_per_weight) if not lossless else None
    data = None
    if calibration is not None:
        data = Calibration(text=calibration, tokens=tokens, seqlen=context, batch=batch)
    options: dict[str, Any] = {
        "weight_bits": weight_bits, "group_size": group_size, "statistics": statistics, "outlier_share": outlier_share,
        "outlier_threshold": outlier_threshold, "bits_per_weight": budget, "calibration": data, "device": device,
        "keep": keep_dense, "workers": workers, "max_memory": dict(max_memory),
    }  # fmt: skip
    origin = source if gptq_zeros == "auto" else GptqSource(source, zeros=gptq_zeros)  # type: ignore[arg-type]
    if dry_run:
        _print_prediction(predict(origin, lossless=lossless, seed=seed, **options), as_json)
        return
    warnings.filterwarnings("always", module="spqr_converters")
    memory: dict[str, Any] = {}
    with process_group(device) as rank:
        speaks = rank == 0

        def announce(plan: Any) -> None:
            memory.update(plan.as_dict())
            if speaks:
                click.echo(_memory_line(memory), err=True)

        if data is None and not lossless and speaks:
            click.echo("no --calibration text: only the weights decide, which costs quality (see --help)", err=True)
        try:
            with progress_bar("converting", shown=speaks and not as_json) as bar:
                report = convert(
                    origin, destination, lossless=lossless, **options, seed=seed, max_shard_bytes=max_shard_size,
                    restart=restart, progress=bar, announce=announce,
                )  # fmt: skip
        except (KeyboardInterrupt, OSError):
            if speaks and (destination / JOURNAL).exists():
                click.echo("interrupted: the same command goes on from here, or begins anew with --restart", err=True)
            raise
    if not speaks:
        return
    if as_json:
        print_json({**report.as_dict(), "memory": memory})
    else:
        _print_report(report, destination)


def _budget(given: list[str], preset: str, bits_per_weight: float | None) -> float | None:
    """Bits a weight to be spread over the modules, or None where the command line says what every module is stored as."""
    from spqr_converters.presets import PRESETS

    uniform, budgets = [name for name in given if name in _UNIFORM], [name for name in given if name in _BUDGET]
    if len(budgets) > 1 or (uniform and budgets):
        one, other = [*budgets, *uniform][:2]
        raise click.UsageError(f"--{one.replace('_', '-')} and --{other.replace('_', '-')}: choose one of the two")
    return None if uniform else bits_per_weight or PRESETS[preset]


def _memory_line(memory: dict[str, Any]) -> str:
    parts = [f"{size(memory['peak_memory'])} of RAM"]
    if memory["device_memory"]:
        parts.append(f"{size(memory['device_memory'])} of the GPU's memory")
    if memory["scratch_file"]:
        parts.append(f"{size(memory['scratch_file'])} of disk for activations")
    return f"takes about {', '.join(parts)}"


def _print_plan(budget: dict[str, Any]) -> None:
    rows = [
        [name, str(module["weight_bits"]), str(module["group_size"]), f"{100 * module['outlier_share']:.1f} %",
         f"{module['bits']:.3f}", f"{module['predicted_loss']:.2g}"]
        for name, module in budget["modules"].items()
    ]  # fmt: skip
    table(["module", "bits", "group size", "outliers", "stored bits", "predicted loss"], rows)
    kl = budget["predicted_kl"]
    predicted = "" if kl is None else f", predicted KL {kl:.3g} nats a token"
    click.echo(f"{budget['planned_bits']:.3f} bits a weight of {budget['bits_per_weight']:g}{predicted}")


def _print_prediction(prediction: Any, as_json: bool) -> None:
    figures = prediction.as_dict()
    if as_json:
        print_json(figures)
        return
    if budget := figures.pop("budget"):
        _print_plan(budget)
    memory = figures.pop("memory")
    stages = memory.pop("stages")
    rows = [[name.replace("_", " "), _shown(name, value)] for name, value in {**figures, **memory}.items()]
    table(["prediction", ""], rows)
    rows = [[name, *(size(value) for value in stage.values())] for name, stage in stages.items()]
    table(["stage", "RAM", "GPU", "activations on GPU", "in RAM", "on disk"], rows)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if "bytes" in name or "memory" in name or name == "scratch_file":
        return size(value)
    if "seconds" in name:
        return "about " + duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_report(report: Any, destination: Path) -> None:
    if budget := report.provenance.get("budget"):
        _print_plan(budget)
    totals = report.totals()
    click.echo(f"source: {report.source}, {report.mode}")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(
        f"{totals['modules']} modules, {totals['quantised_parameters']:,} weights: "
        f"{totals['bits_per_quantised_weight']:.3f} bits a weight, {100 * totals['outlier_share']:.2f} % outliers, "
        f"{size(totals['quantised_bytes'])}; in {duration(report.seconds)}"
    )
    for reason, count in totals["dense_parameters_by_reason"].items():
        click.echo(f"left dense: {count:,} parameters, {reason}")
    worst = max(report.modules, key=lambda module: module.weight_error, default=None)
    if worst is not None:
        if report.mode == "lossless" and worst.weight_error == 0:
            click.echo(f"weight error: 0 in all {totals['modules']} modules, against the weights of the source's own tool")
            compared = sum(m.compared or m.shape[0] * m.shape[1] for m in report.modules)
            if compared < totals["quantised_parameters"]:
                click.echo(f"compared: every code bit by bit, {compared:,} weights as numbers")
        else:
            click.echo(f"largest weight error: {worst.weight_error:.3g} relative, {worst.name}")
    click.echo(f"wrote {destination}")

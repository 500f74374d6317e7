"""spqr inspect"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from .output import print_json, size, table


@click.command("inspect")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(path: Path, as_json: bool) -> None:
    """Show what a checkpoint holds, module by module: shape, stored bits a weight, outliers, error.

    Bits are counted from the bytes on disk, everything included. Errors are those that the conversion measured and wrote
    to spqr_report.json: the relative norm of the weights' error and, where it was calibrated, the share of the output's
    energy that was lost on the calibration text.

    \b
    Example:  spqr inspect ./llama-spqr
    """
    summary = summarize(path)
    if as_json:
        print_json(summary)
        return
    rows = [
        [
            name, f"{m['out_features']} x {m['in_features']}", f"{m['weight_bits']}b g{m['group_size']} {m['statistics']}",
            f"{m['bits']:.3f}", f"{100 * m['outlier_share']:.2f}", _figure(m["weight_error"]), _figure(m["output_error"]),
        ]
        for name, m in summary["modules"].items()
    ]  # fmt: skip
    table(["module", "out x in", "codes", "bits", "outliers %", "weight error", "output error"], rows)
    total = summary["totals"]
    click.echo(
        f"{total['modules']} quantized modules: {total['weights']:,} weights, {size(total['bytes'])}, "
        f"{total['bits']:.3f} bits a weight, {100 * total['outlier_share']:.2f} % outliers"
    )
    click.echo(f"{total['dense_tensors']} dense tensors: {size(total['dense_bytes'])}")


def summarize(path: Path) -> dict[str, Any]:
    """Geometry, bits and errors of each module, totals, and what config.json says. Structural rules are checked."""
    from ..reader import Checkpoint

    errors = _reported_errors(path)
    modules: dict[str, Any] = {}
    with Checkpoint.open(path) as checkpoint:
        for name, layout in sorted(checkpoint.modules.items(), key=lambda item: _natural(item[0])):
            weights = layout.out_features * layout.in_features
            stored = checkpoint.stored_bytes(name)
            modules[name] = {
                **layout.as_dict(), "bytes": stored, "bits": 8 * stored / weights,
                "outlier_share": layout.outliers / weights,
                "weight_error": errors.get(name, {}).get("weight_error"),
                "output_error": errors.get(name, {}).get("output_error"),
            }  # fmt: skip
        dense = {name: checkpoint.info(name).nbytes for name in checkpoint.dense}
        config = checkpoint.config or {}
    weights = sum(m["out_features"] * m["in_features"] for m in modules.values())
    stored = sum(m["bytes"] for m in modules.values())
    totals = {
        "modules": len(modules), "weights": weights, "bytes": stored, "bits": 8 * stored / max(weights, 1),
        "outlier_share": sum(m["outliers"] for m in modules.values()) / max(weights, 1),
        "dense_tensors": len(dense), "dense_bytes": sum(dense.values()),
    }  # fmt: skip
    return {
        "quantization_config": config.get("quantization_config"), "totals": totals, "modules": modules, "dense": dense,
    }  # fmt: skip


def _reported_errors(path: Path) -> dict[str, dict[str, Any]]:
    report = path / "spqr_report.json"
    if not report.is_file():
        return {}
    try:
        return {module["name"]: module for module in json.loads(report.read_bytes())["modules"]}
    except (ValueError, KeyError, TypeError):
        click.echo(f"spqr: {report} is not a conversion report; errors are not shown", err=True)
        return {}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"

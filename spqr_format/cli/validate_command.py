"""spqr validate"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .output import print_json, size
from .progress import progress_bar


@click.command("validate")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--deep", is_flag=True, help="Also compare every tensor with its recorded sha256 (reads every byte).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate_command(path: Path, deep: bool, as_json: bool) -> None:
    """Check a checkpoint folder, or one .safetensors file, against every rule of the format.

    The structure is checked from the headers alone, then statistics, padding and outlier indices are read. A 3-bit code
    cannot be wrong by itself: a flipped bit in the codes is found by --deep only.

    \b
    Example:  spqr validate ./llama-spqr --deep
    Exit code 0: valid. 1: broken; every finding is printed with its code.
    """
    from ..validate import validate

    with progress_bar("validating", shown=not as_json) as bar:
        report = validate(path, deep=deep, progress=lambda done, total: bar("", done, total))
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.findings:
            click.echo(str(finding))
        if report.truncated:
            click.echo("... and more; only the first findings are listed")
        count = f"{report.modules} quantized modules, {report.tensors} tensors, {size(report.bytes)}"
        click.echo(f"{'valid' if report.ok else 'NOT VALID'}: {count}; hashes {report.hashes}")
    sys.exit(0 if report.ok else 1)

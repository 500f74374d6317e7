"""The command `spqr`. Each command imports what it needs when it runs, so that `spqr validate` starts without torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from .. import __version__
from ..errors import SpqrError

COMMANDS = ("convert", "tune", "export", "validate", "inspect", "eval", "generate")

BREAKS_THE_SPEC, USAGE, INPUT_OUTPUT = 1, 2, 3  # exit codes; 0 is fine


class _Commands(click.Group):
    """Finds a command `x` as `x_command` in the module `x_command` beside this file."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}_command", __name__)
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpqrError as error:
            click.echo(str(error), err=True)
            sys.exit(BREAKS_THE_SPEC)
        except BrokenPipeError:
            raise  # the reader of our output has left; click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"spqr: {where}{error.strerror or error}", err=True)
            sys.exit(INPUT_OUTPUT)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="spqr")
def main() -> None:
    """SpQR: LLM weights at under four bits, near-lossless, in files that can be checked.

    \b
    Make a checkpoint     spqr convert ORIGINAL DESTINATION --calibration text.txt
    Tune one further      spqr tune DESTINATION ORIGINAL TUNED --calibration text.txt
    Check one             spqr validate DESTINATION --deep
    Look inside           spqr inspect DESTINATION
    Measure it            spqr eval DESTINATION text.txt --reference ORIGINAL
    Try it                spqr generate DESTINATION "Once upon a time"
    Take it elsewhere     spqr export DESTINATION ./dense --to safetensors

    Exit codes: 0 fine, 1 a rule is broken or a request cannot be met (the code SPQR-Exxx on stderr says which; see
    spec/spqr-1.0.md), 2 wrong usage, 3 a file cannot be read or written.
    """

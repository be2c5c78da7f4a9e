"""The command line: `bitween quantize | analyze | plan | evaluate | export | report | info`, also `python -m bitween`.

Exit codes: 0 done; 1 an error in the input or while working, told in one line; 2 wrong usage;
3 the targets were met only in part (the report says which); 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    help="The best mixed-precision language model within a memory target and a perplexity budget, with the proof.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut the names of options where a terminal has 80 columns
)


def _version(wanted: bool) -> None:
    if wanted:
        from bitween import __version__

        typer.echo(f"bitween {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point: errors become one line and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"bitween: {error}", err=True)
        sys.exit(1)

"""`bitween info`."""

from __future__ import annotations

from bitween.cli.app import app
from bitween.cli.inputs import show
from bitween.cli.options import Json


@app.command()
def info(as_json: Json = False) -> None:
    """What bitween runs on: version, instruction set, threads, BLAS."""
    from bitween.functional import info as facts

    show(facts(), as_json)

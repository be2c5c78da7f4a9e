"""`bitween report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bitween.cli.app import app
from bitween.cli.options import Json


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="directory that bitween saved")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; default report.html in it")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved model's report as one HTML page, or print it as JSON."""
    from bitween.report.page import page
    from bitween.store.checkpoint import MANIFEST, read_json
    from bitween.store.files import atomic_write

    found = read_json(model / MANIFEST).get("report")
    if not found:
        raise ValueError(f"{model}: expected a report in {MANIFEST}; the model was saved without one")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    output = output or model / "report.html"
    atomic_write(output, page(found, f"{model.resolve().name}, quantized by bitween").encode())
    typer.echo(str(output))

"""Options that several commands share, and the TOML file that may hold them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Calibration", "Config", "Dtype", "For", "Ignored", "Json", "Model", "Reduction", "Seed", "Text"]


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Options of a TOML file become the defaults of those not given on the command line."""
    if path is None:
        return None
    with path.open("rb") as file:
        found = {name.replace("-", "_"): value for name, value in tomllib.load(file).items()}
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(found.keys() - known):
        raise ValueError(
            f"--config: {path} has {unknown[0]!r}, which is no option; there are {', '.join(sorted(known))}"
        )
    context.default_map = {**(context.default_map or {}), **found}
    return path


Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with options by name", callback=_from_file, is_eager=True)
]
Model = Annotated[str, typer.Argument(help="directory of a Hugging Face model, or its name on the hub")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Reduction = Annotated[float, typer.Option(help="share of the bytes to save, 0 to 1")]
Text = Annotated[str | None, typer.Option(help="text file, or dataset name; default bitween's own")]
Calibration = Annotated[int, typer.Option(help="windows of calibration text, at most")]
Ignored = Annotated[list[str] | None, typer.Option(help="name or pattern of layers to leave alone")]
For = Annotated[str, typer.Option("--for", help="any, vllm, marlin, gguf or auto-round")]
Dtype = Annotated[str, typer.Option(help="dtype to load the model in: auto, bfloat16, float32")]
Seed = Annotated[int, typer.Option(help="same seed, same result")]

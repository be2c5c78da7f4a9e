"""`bitween export`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from bitween.cli.app import app
from bitween.cli.inputs import check_at_least, check_output, compare, load, show
from bitween.cli.options import Json


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="directory that bitween saved")],
    output: Annotated[Path, typer.Option("--output", "-o", help="file for gguf, else a directory, empty or new")],
    format: Annotated[str, typer.Option(help="compressed-tensors, auto-round, exl3 or gguf")],
    exact: Annotated[bool, typer.Option(help="gguf: only block types that hold the same numbers")] = False,
    template: Annotated[Path | None, typer.Option(help="gguf: a GGUF of the same model to copy settings from")] = None,
    samples: Annotated[int, typer.Option(help="gguf: windows that measure what re-rounding costs; 0 for none")] = 8,
    as_json: Json = False,
) -> None:
    """Write a quantized model for other tools."""
    if format not in _FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(_FORMATS)}; got {format!r}")
    check_at_least("--samples", samples, 0)
    if format != "gguf":
        output = check_output(output)
    loaded, tokenizer = load(str(model), "auto")
    done = _FORMATS[format](loaded, tokenizer, output, exact=exact, template=template, samples=samples)
    show({"format": format, "output": str(output), **done}, as_json)


def _to_directory(module: str, function: str) -> Callable[..., dict]:
    """A format whose exporter writes a directory; its module is imported when it is asked for."""

    def write(model, tokenizer, output: Path, **_) -> dict:
        getattr(import_module(f"bitween.export.{module}"), function)(model, tokenizer, output)
        return {"bytes": sum(p.stat().st_size for p in output.rglob("*") if p.is_file())}

    return write


def _to_gguf(model, tokenizer, output: Path, exact: bool, template: Path | None, samples: int) -> dict:
    from bitween.export.gguf import export_gguf

    written = export_gguf(model, tokenizer, output, exact=exact, template=template)
    found = {"bytes": written.nbytes, **{f"{kind} tensors": n for kind, n in sorted(written.types.items())}}
    if written.rounded:
        found["layers rounded again"] = len(written.rounded)
    if written.rounded and samples:
        compared = compare(load(str(output), "float32")[0], model, tokenizer, None, samples)
        found["KL from this model, nats per token"] = round(compared.quality.damage, 6)
    return found


_FORMATS = {
    "compressed-tensors": _to_directory("compressed_tensors", "export_compressed_tensors"),
    "auto-round": _to_directory("auto_round", "export_auto_round"),
    "exl3": _to_directory("exl3", "export_exl3"),
    "gguf": _to_gguf,
}

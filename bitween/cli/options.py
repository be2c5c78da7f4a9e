"""Options that several commands share, and the TOML file that may hold them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

__all__ = [
    "Calibration",
    "Config",
    "Domains",
    "Dtype",
    "For",
    "Ignored",
    "Json",
    "Model",
    "Reduction",
    "Seed",
    "Text",
    "Trellis",
    "Trust",
]


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Options of a TOML file become the defaults of those not given on the command line."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid TOML: {error}") from error
    names = {}  # every name of an option: that of its flags and that of its parameter
    for parameter in context.command.params:
        for name in (parameter.name, *(opt.lstrip("-") for opt in (*parameter.opts, *parameter.secondary_opts))):
            names.setdefault(name.replace("-", "_"), parameter)
    values: dict[str, Any] = {}
    for name, value in found.items():
        parameter = names.get(name.replace("-", "_"))
        if parameter is None:
            known = sorted({p.opts[0].lstrip("-").replace("-", "_") for p in context.command.params} - {"help"})
            raise ValueError(f"--config: {path} has {name!r}, which is no option; there are {', '.join(known)}")
        if parameter.name in values:
            raise ValueError(f"--config: {path} has {name!r} under two of its names")
        values[parameter.name] = _checked(_kind(context, parameter), value, f"--config: {path}: {name}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _kind(context: typer.Context, parameter: Any) -> Any:
    """What an option is in Python: bool, int, float, str, Path or list[str]."""
    hint = get_type_hints(context.command.callback)[parameter.name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if isinstance(hint, UnionType) else hint


def _checked(kind: Any, value: Any, where: str) -> Any:
    """The value, or the error that names the file, where it is not what the option takes."""
    if kind == list[str]:
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise ValueError(f"{where}: expected a list of strings; got {value!r}")
        return found
    taken, name = {
        bool: (bool, "true or false"),
        int: (int, "a whole number"),
        float: ((int, float), "a number"),
    }.get(kind, (str, "a string"))
    if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {name}; got {value!r}")
    return value


Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with options by name", callback=_from_file, is_eager=True)
]
Model = Annotated[str, typer.Argument(help="directory of a Hugging Face model, or its name on the hub")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Reduction = Annotated[float, typer.Option(help="share of the bytes to save, 0 to 1")]
Text = Annotated[str | None, typer.Option(help="text file, or data set name; default bitween's own")]
Domains = Annotated[
    list[str] | None,
    typer.Option("--domain", help="a domain of text that counts, NAME or NAME=BUDGET; default all"),
]
Calibration = Annotated[int, typer.Option(help="windows of calibration text, at most")]
Ignored = Annotated[list[str] | None, typer.Option(help="name or pattern of layers to leave alone")]
For = Annotated[str, typer.Option("--for", help="any, vllm, marlin, gguf, exl3 or auto-round")]
Trellis = Annotated[bool, typer.Option("--trellis", help="consider trellis codes too: docs/planning.md")]
Dtype = Annotated[str, typer.Option(help="dtype to load the model in: auto, float32, bfloat16 or float16")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model, as yours")]
Seed = Annotated[int, typer.Option(help="same seed, same result")]

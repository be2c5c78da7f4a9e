"""What commands have in common: models loaded, outputs checked, results shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer

__all__ = [
    "check_at_least",
    "check_dtype",
    "check_model",
    "check_output",
    "check_text",
    "check_unquantized",
    "compare",
    "load",
    "natural",
    "read_domains",
    "show",
]


def compare(candidate, base, tokenizer, text: str | None, samples: int):
    from bitween.gradual import GradualEvaluator

    options = {"calibration_samples": 1, "selection_samples": 1, "evaluation_samples": samples, "bounded": False}
    evaluator = GradualEvaluator(base, tokenizer, calibration_data=text, **options)
    return evaluator.comprehensive_evaluation(candidate)


def load(name: str, dtype: str, trust: bool = False):
    """Model and tokenizer. What bitween, GPTQ, AWQ or AutoRound wrote becomes packed layers, GGUF plain numbers.

    Code that comes with a model is run with `trust` only; nothing is ever asked on standard input.
    """
    check_dtype(dtype)
    check_model(name)
    from bitween.store.loading import is_packed, load_model
    from bitween.store.opening import open_model

    return load_model(name) if is_packed(Path(name)) else open_model(name, dtype, trust=trust)


def check_dtype(dtype: str) -> None:
    from bitween.store.opening import check_dtype

    check_dtype(dtype, "--dtype")


def check_model(name: str) -> None:
    """What is no directory, file or name on the hub is told before anything is loaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"model: expected the directory of a Hugging Face model; {name} has no config.json")
        return
    if path.is_file() and path.suffix == ".gguf":
        return
    if path.exists():
        raise ValueError(f"model: expected a directory, a .gguf file or a name on the hub; {name} is a file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".gguf"):
        raise FileNotFoundError(f"model: expected a directory or a name on the hub; {name} does not exist")


def check_unquantized(name: str) -> None:
    """ValueError where the model is quantized already: there is nothing full to compare with."""
    config = Path(name).expanduser() / "config.json"
    if not config.is_file():
        return
    from bitween.store.checkpoint import read_json

    settings = read_json(config).get("quantization_config")
    if settings:
        method = settings.get("quant_method", "an unknown tool") if isinstance(settings, dict) else "an unknown tool"
        raise ValueError(
            f"model: expected a model in full precision; {name} is quantized already ({method}): give the model it "
            "was made from"
        )


def check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least:g}; got {value:g}")


def check_text(text: str | None, domains: dict[str, float | None] | None = None) -> None:
    from bitween.text.mix import checked

    checked(text, domains, tokenizer="there will be one")


def read_domains(given: list[str] | None) -> dict[str, float | None] | None:
    """NAME or NAME=BUDGET, several, as {name: budget or None}; None where none was given."""
    found: dict[str, float | None] = {}
    for text in given or ():
        name, mark, budget = text.partition("=")
        try:
            found[name] = float(budget) if mark else None
        except ValueError:
            raise ValueError(f"--domain: expected NAME or NAME=BUDGET, as in code=0.05; got {text!r}") from None
    return found or None


def check_output(output: Path) -> Path:
    """The directory to write, links followed; refused at once where it could not be put in place as a whole."""
    real = output.expanduser().resolve()
    if real == Path.cwd():
        raise ValueError(
            f"--output: expected a directory that is put in place as a whole; got {output}, where this command runs: "
            "name a new one in it"
        )
    if real.exists() and (not real.is_dir() or any(real.iterdir())):
        raise FileExistsError(f"--output: expected a new or empty directory; {output} exists and is not empty")
    return real


def show(values: dict, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        typer.echo(f"{name:18s} {shown}")


def natural(name: str) -> list:
    """Sorts layers as people count: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

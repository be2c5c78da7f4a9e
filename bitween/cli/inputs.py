"""What commands have in common: models loaded, outputs checked, results shown."""

from __future__ import annotations

import json
from pathlib import Path

import typer

__all__ = ["check_output", "compare", "load", "show"]


def compare(candidate, base, tokenizer, text: str | None, samples: int):
    from bitween.gradual import GradualEvaluator

    options = {"calibration_samples": 1, "selection_samples": 1, "evaluation_samples": samples}
    evaluator = GradualEvaluator(base, tokenizer, calibration_data=text, **options)
    return evaluator.comprehensive_evaluation(candidate)


def load(name: str, dtype: str):
    """Model and tokenizer. What bitween, GPTQ, AWQ or AutoRound wrote becomes packed layers, GGUF plain numbers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitween.store.loading import is_packed, load_model

    if is_packed(Path(name)):
        return load_model(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind is None:
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16; got {dtype!r}")
    place, options = (name, {})
    if name.endswith(".gguf"):
        place, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=kind, **options)
    return model, AutoTokenizer.from_pretrained(place, **options)


def check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output: expected a new or empty directory; {output} exists and is not empty")


def show(values: dict, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        typer.echo(f"{name:18s} {shown}")

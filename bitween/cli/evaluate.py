"""`bitween evaluate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bitween.cli.app import app
from bitween.cli.inputs import check_at_least, check_model, check_text, compare, load
from bitween.cli.options import Json, Model, Trust


@app.command()
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="the model it came from, to compare with")] = None,
    text: Annotated[str | None, typer.Option(help="text file; default bitween's own")] = None,
    samples: Annotated[int, typer.Option(help="windows of 512 tokens, at most")] = 32,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, and its KL divergence from the model it came from."""
    check_at_least("--samples", samples, 1)
    check_text(text)
    for name in (model, reference):
        if name is not None:
            check_model(name)
    candidate, tokenizer = load(model, "auto", trust_remote_code)
    base = load(reference, "auto", trust_remote_code)[0] if reference else candidate
    result = compare(candidate, base, tokenizer, text, samples)
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))

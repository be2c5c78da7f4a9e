"""`bitween analyze`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bitween.cli.app import app
from bitween.cli.inputs import check_dtype, check_model, check_text, check_unquantized, load
from bitween.cli.options import Dtype, Json, Model, Seed, Text, Trust


@app.command()
def analyze(
    model: Model,
    calibration_data: Text = None,
    layers: Annotated[bool, typer.Option(help="every layer instead of every block")] = False,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What each block bears, by four measured methods, in nats of KL per token."""
    check_dtype(dtype)
    check_text(calibration_data)
    check_model(model)
    check_unquantized(model)
    from bitween.gradual import ImportanceAnalyzer
    from bitween.report.progress import ProgressBars

    loaded, tokenizer = load(model, dtype, trust_remote_code)
    analyzer = ImportanceAnalyzer(
        loaded.float(), tokenizer, calibration_data=calibration_data, seed=seed, progress=ProgressBars()
    )
    found = analyzer.analyze_layer_importance() if layers else analyzer.analyze_block_importance()
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))

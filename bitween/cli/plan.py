"""`bitween plan`."""

from __future__ import annotations

import json

import typer

from bitween.cli.app import app
from bitween.cli.inputs import check_dtype, check_model, check_text, check_unquantized, load, natural
from bitween.cli.options import (
    Calibration,
    Config,
    Dtype,
    For,
    Ignored,
    Json,
    Model,
    Reduction,
    Seed,
    Text,
    Trellis,
    Trust,
)


@app.command()
def plan(
    model: Model,
    target_memory_reduction: Reduction = 0.6,
    calibration_data: Text = None,
    calibration_samples: Calibration = 100,
    ignore_layer: Ignored = None,
    export_target: For = "any",
    trellis: Trellis = False,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Predict the trade-off between size and damage, and the scheme of each layer at a target; quantizes nothing."""
    check_dtype(dtype)
    from bitween.gradual.options import check_options

    options = check_options(
        target_memory_reduction=target_memory_reduction,
        calibration_samples=calibration_samples,
        ignore_layers=ignore_layer or (),
        export_target=export_target,
        trellis=trellis,
        seed=seed,
    )
    check_text(calibration_data)
    check_model(model)
    check_unquantized(model)
    from bitween.gradual import GradualQuantizer
    from bitween.gradual.utils import perplexity_increase
    from bitween.report.progress import Story

    loaded, tokenizer = load(model, dtype, trust_remote_code)
    quantizer = GradualQuantizer(loaded, tokenizer, calibration_data=calibration_data, progress=Story(), **options)
    front, chosen = quantizer.plan()
    schemes = {name: str(chosen.schemes[name] or "kept") for name in sorted(chosen.schemes, key=natural)}
    if as_json:
        found = {"plan": schemes, "nbytes": chosen.nbytes, "damage": chosen.damage, "frontier": front.points()}
        typer.echo(json.dumps(found, indent=1))
        return
    sizes = quantizer.preflight()
    typer.echo("memory of the model   saved   predicted KL   about perplexity")
    for share in (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.725, 0.75, 0.775, 0.8, 0.85):
        limit = sizes["bytes"] * (1 - share)
        if limit < sizes["least_bytes"]:
            break
        damage = front.within_bytes(limit - sizes["fixed_bytes"]).damage
        typer.echo(f"{limit / 2**20:15,.1f} MiB  {share:6.1%}  {damage:13.4f}  {perplexity_increase(damage):+16.2%}")
    typer.echo(f"\nat {target_memory_reduction:.1%} saved:")
    for name, scheme in schemes.items():
        typer.echo(f"  {name:44s} {scheme}")

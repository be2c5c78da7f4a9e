"""`bitween quantize`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from bitween.cli.app import app
from bitween.cli.inputs import (
    check_dtype,
    check_model,
    check_output,
    check_text,
    check_unquantized,
    read_domains,
    show,
)
from bitween.cli.options import (
    Calibration,
    Config,
    Domains,
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
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write; must be empty or new")],
    target_memory_reduction: Reduction = 0.6,
    max_perplexity_increase: Annotated[float, typer.Option(help="relative, 0.05 = 5 %")] = 0.05,
    calibration_data: Text = None,
    domain: Domains = None,
    calibration_samples: Calibration = 100,
    evaluation_samples: Annotated[int, typer.Option(help="windows of text for the proof, at most")] = 200,
    ignore_layer: Ignored = None,
    on_conflict: Annotated[str, typer.Option(help="quality, memory or error")] = "quality",
    export_target: For = "any",
    trellis: Trellis = False,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    max_memory: Annotated[float | None, typer.Option(help="GiB that the process may take, about")] = None,
    resume: Annotated[bool, typer.Option(help="go on where a stopped run of the same inputs left off")] = True,
    dry_run: Annotated[bool, typer.Option(help="only show sizes and the least reachable bytes")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Quantize a model gradually and save it.

    Finished steps are kept in OUTPUT.journal until the model is saved: the same command goes on with a stopped run.
    """
    output = check_output(output)
    check_dtype(dtype)
    from bitween.gradual.options import check_options

    options = check_options(
        target_memory_reduction=target_memory_reduction,
        max_perplexity_increase=max_perplexity_increase,
        calibration_samples=calibration_samples,
        evaluation_samples=evaluation_samples,
        ignore_layers=ignore_layer or (),
        on_conflict=on_conflict,
        export_target=export_target,
        trellis=trellis,
        seed=seed,
        max_memory=None if max_memory is None else int(max_memory * 2**30),
    )
    domains = read_domains(domain)
    check_text(calibration_data, domains)
    check_model(model)
    check_unquantized(model)
    journal = output.with_name(output.name + ".journal")
    from bitween.gradual import GradualQuantizer
    from bitween.report.progress import Story

    quantizer = GradualQuantizer(
        model,
        None,
        calibration_data=calibration_data,
        domains=domains,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=Story(),
        journal=journal,
        resume=resume,
        **options,
    )
    if dry_run:
        show(quantizer.preflight(), as_json)
        return
    try:
        quantized = quantizer.quantize()
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is kept in {journal}, and the same command goes on from there", err=True)
        raise
    report = quantizer.get_quantization_report()
    from bitween.store.saving import save_model

    save_model(quantized, quantizer.tokenizer, output, report=report.to_dict(), certificate=report.proof)
    shutil.rmtree(journal)
    typer.echo(report.to_json() if as_json else str(report))
    if report.conflict:
        raise typer.Exit(3)

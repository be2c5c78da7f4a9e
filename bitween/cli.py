"""The command line: `bitween quantize | evaluate | info`, also as `python -m bitween`.

Exit codes: 0 done; 1 an error in the input or while working, told in one line; 2 wrong usage;
3 the targets were met only in part (the report says which); 130 interrupted.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    help="The best mixed-precision language model within a memory target and a perplexity budget, with the proof.",
    pretty_exceptions_enable=False,
)

_Model = Annotated[str, typer.Argument(help="directory of a Hugging Face model, or its name on the hub")]
_Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@app.command()
def quantize(
    model: _Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write; must be empty or new")],
    target_memory_reduction: Annotated[float, typer.Option(help="share of the bytes to save, 0 to 1")] = 0.6,
    max_perplexity_increase: Annotated[float, typer.Option(help="relative, 0.05 = 5 %")] = 0.05,
    calibration_data: Annotated[
        str | None, typer.Option(help="text file, or dataset name; default bitween's own")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="windows of calibration text, at most")] = 100,
    evaluation_samples: Annotated[int, typer.Option(help="windows of text for the proof, at most")] = 200,
    ignore_layer: Annotated[list[str] | None, typer.Option(help="name or pattern of layers to leave alone")] = None,
    on_conflict: Annotated[str, typer.Option(help="quality, memory or error")] = "quality",
    export_target: Annotated[str, typer.Option("--for", help="any, vllm or marlin")] = "any",
    dtype: Annotated[str, typer.Option(help="dtype to load the model in: auto, bfloat16, float32")] = "auto",
    seed: Annotated[int, typer.Option(help="same seed, same result")] = 0,
    resume: Annotated[bool, typer.Option(help="go on where a stopped run of the same inputs left off")] = True,
    dry_run: Annotated[bool, typer.Option(help="only show sizes and the least reachable bytes")] = False,
    as_json: _Json = False,
) -> None:
    """Quantize a model gradually and save it.

    Finished steps are kept in OUTPUT.journal until the model is saved: the same command goes on with a stopped run.
    """
    _check_output(output)
    journal = output.with_name(output.name + ".journal")
    from .gradual import GradualQuantizer
    from .progress import ProgressBars

    loaded, tokenizer = _load(model, dtype)
    quantizer = GradualQuantizer(
        loaded,
        tokenizer,
        target_memory_reduction,
        max_perplexity_increase,
        calibration_data=calibration_data,
        calibration_samples=calibration_samples,
        evaluation_samples=evaluation_samples,
        ignore_layers=ignore_layer or (),
        on_conflict=on_conflict,
        export_target=export_target,
        seed=seed,
        progress=ProgressBars(),
        journal=journal,
        resume=resume,
    )
    if dry_run:
        _show(quantizer.preflight(), as_json)
        return
    try:
        quantized = quantizer.quantize()
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is kept in {journal}, and the same command goes on from there", err=True)
        raise
    report = quantizer.get_quantization_report()
    from .saving import save_model

    save_model(quantized, tokenizer, output, report=report.to_dict(), certificate=report.proof)
    shutil.rmtree(journal)
    typer.echo(report.to_json() if as_json else str(report))
    if report.conflict:
        raise typer.Exit(3)


@app.command()
def evaluate(
    model: _Model,
    reference: Annotated[str | None, typer.Option(help="the model it came from, to compare with")] = None,
    text: Annotated[str | None, typer.Option(help="text file; default bitween's own")] = None,
    samples: Annotated[int, typer.Option(help="windows of 512 tokens, at most")] = 32,
    as_json: _Json = False,
) -> None:
    """Perplexity of a model, and its KL divergence from the model it came from."""
    from .gradual import GradualEvaluator

    candidate, tokenizer = _load(model, "auto")
    base = _load(reference, "auto")[0] if reference else candidate
    evaluator = GradualEvaluator(
        base, tokenizer, calibration_data=text, calibration_samples=1, selection_samples=1, evaluation_samples=samples
    )
    result = evaluator.comprehensive_evaluation(candidate)
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))


@app.command()
def info(as_json: _Json = False) -> None:
    """What bitween runs on: version, instruction set, threads, BLAS."""
    from .functional import info as facts

    _show(facts(), as_json)


def _load(name: str, dtype: str):
    """Model and tokenizer; directories that bitween wrote are read by its own careful loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .checkpoint import MANIFEST
    from .loading import load_model

    if (Path(name) / MANIFEST).is_file():
        return load_model(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind is None:
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16; got {dtype!r}")
    return AutoModelForCausalLM.from_pretrained(name, dtype=kind), AutoTokenizer.from_pretrained(name)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output: expected a new or empty directory; {output} exists and is not empty")


def _show(values: dict, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        typer.echo(f"{name:18s} {shown}")


def main() -> None:
    """Entry point: errors become one line and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"bitween: {error}", err=True)
        sys.exit(1)

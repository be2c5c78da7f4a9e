"""The command line: `bitween quantize | analyze | plan | evaluate | export | report | info`, also `python -m bitween`.

Exit codes: 0 done; 1 an error in the input or while working, told in one line; 2 wrong usage;
3 the targets were met only in part (the report says which); 130 interrupted.
"""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    help="The best mixed-precision language model within a memory target and a perplexity budget, with the proof.",
    pretty_exceptions_enable=False,
)


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


_Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with options by name", callback=_from_file, is_eager=True)
]
_Model = Annotated[str, typer.Argument(help="directory of a Hugging Face model, or its name on the hub")]
_Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
_Reduction = Annotated[float, typer.Option(help="share of the bytes to save, 0 to 1")]
_Text = Annotated[str | None, typer.Option(help="text file, or dataset name; default bitween's own")]
_Calibration = Annotated[int, typer.Option(help="windows of calibration text, at most")]
_Ignored = Annotated[list[str] | None, typer.Option(help="name or pattern of layers to leave alone")]
_For = Annotated[str, typer.Option("--for", help="any, vllm, marlin, gguf or auto-round")]
_Dtype = Annotated[str, typer.Option(help="dtype to load the model in: auto, bfloat16, float32")]
_Seed = Annotated[int, typer.Option(help="same seed, same result")]


@app.command()
def quantize(
    model: _Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write; must be empty or new")],
    target_memory_reduction: _Reduction = 0.6,
    max_perplexity_increase: Annotated[float, typer.Option(help="relative, 0.05 = 5 %")] = 0.05,
    calibration_data: _Text = None,
    calibration_samples: _Calibration = 100,
    evaluation_samples: Annotated[int, typer.Option(help="windows of text for the proof, at most")] = 200,
    ignore_layer: _Ignored = None,
    on_conflict: Annotated[str, typer.Option(help="quality, memory or error")] = "quality",
    export_target: _For = "any",
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    max_memory: Annotated[float | None, typer.Option(help="GiB that the process may take, about")] = None,
    resume: Annotated[bool, typer.Option(help="go on where a stopped run of the same inputs left off")] = True,
    dry_run: Annotated[bool, typer.Option(help="only show sizes and the least reachable bytes")] = False,
    as_json: _Json = False,
    config: _Config = None,
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
        max_memory=None if max_memory is None else int(max_memory * 2**30),
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
def analyze(
    model: _Model,
    calibration_data: _Text = None,
    layers: Annotated[bool, typer.Option(help="every layer instead of every block")] = False,
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """What each block bears, by four measured methods, in nats of KL per token."""
    from .gradual import ImportanceAnalyzer
    from .progress import ProgressBars

    loaded, tokenizer = _load(model, dtype)
    analyzer = ImportanceAnalyzer(
        loaded.float(), tokenizer, calibration_data=calibration_data, seed=seed, progress=ProgressBars()
    )
    found = analyzer.analyze_layer_importance() if layers else analyzer.analyze_block_importance()
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))


@app.command()
def plan(
    model: _Model,
    target_memory_reduction: _Reduction = 0.6,
    calibration_data: _Text = None,
    calibration_samples: _Calibration = 100,
    ignore_layer: _Ignored = None,
    export_target: _For = "any",
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
    config: _Config = None,
) -> None:
    """Predict the trade-off between size and damage, and the scheme of each layer at a target; quantizes nothing."""
    from .gradual import GradualQuantizer
    from .gradual.utils import perplexity_increase
    from .progress import ProgressBars

    loaded, tokenizer = _load(model, dtype)
    quantizer = GradualQuantizer(
        loaded,
        tokenizer,
        target_memory_reduction,
        calibration_data=calibration_data,
        calibration_samples=calibration_samples,
        ignore_layers=ignore_layer or (),
        export_target=export_target,
        seed=seed,
        progress=ProgressBars(),
    )
    front, chosen = quantizer.plan()
    schemes = {name: "kept" if scheme is None else str(scheme) for name, scheme in chosen.schemes.items()}
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


@app.command()
def evaluate(
    model: _Model,
    reference: Annotated[str | None, typer.Option(help="the model it came from, to compare with")] = None,
    text: Annotated[str | None, typer.Option(help="text file; default bitween's own")] = None,
    samples: Annotated[int, typer.Option(help="windows of 512 tokens, at most")] = 32,
    as_json: _Json = False,
) -> None:
    """Perplexity of a model, and its KL divergence from the model it came from."""
    candidate, tokenizer = _load(model, "auto")
    base = _load(reference, "auto")[0] if reference else candidate
    result = _compare(candidate, base, tokenizer, text, samples)
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="directory that bitween saved")],
    output: Annotated[Path, typer.Option("--output", "-o", help="file for gguf, else a directory, empty or new")],
    format: Annotated[str, typer.Option(help="compressed-tensors, auto-round or gguf")],
    exact: Annotated[bool, typer.Option(help="gguf: only block types that hold the same numbers")] = False,
    template: Annotated[Path | None, typer.Option(help="gguf: a GGUF of the same model to copy settings from")] = None,
    samples: Annotated[int, typer.Option(help="gguf: windows that measure what re-rounding costs; 0 for none")] = 8,
    as_json: _Json = False,
) -> None:
    """Write a quantized model for other tools."""
    if format not in _FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(_FORMATS)}; got {format!r}")
    if format != "gguf":
        _check_output(output)
    loaded, tokenizer = _load(str(model), "auto")
    done = _FORMATS[format](loaded, tokenizer, output, exact=exact, template=template, samples=samples)
    _show({"format": format, "output": str(output), **done}, as_json)


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="directory that bitween saved")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; default report.html in it")] = None,
    as_json: _Json = False,
) -> None:
    """Write a saved model's report as one HTML page, or print it as JSON."""
    from .checkpoint import MANIFEST, read_json
    from .files import atomic_write
    from .report_page import page

    found = read_json(model / MANIFEST).get("report")
    if not found:
        raise ValueError(f"{model}: expected a report in {MANIFEST}; the model was saved without one")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    output = output or model / "report.html"
    atomic_write(output, page(found, f"{model.resolve().name}, quantized by bitween").encode())
    typer.echo(str(output))


@app.command()
def info(as_json: _Json = False) -> None:
    """What bitween runs on: version, instruction set, threads, BLAS."""
    from .functional import info as facts

    _show(facts(), as_json)


def _compare(candidate, base, tokenizer, text: str | None, samples: int):
    from .gradual import GradualEvaluator

    options = {"calibration_samples": 1, "selection_samples": 1, "evaluation_samples": samples}
    evaluator = GradualEvaluator(base, tokenizer, calibration_data=text, **options)
    return evaluator.comprehensive_evaluation(candidate)


def _load(name: str, dtype: str):
    """Model and tokenizer. What bitween, GPTQ, AWQ or AutoRound wrote becomes packed layers, GGUF plain numbers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .loading import is_packed, load_model

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


def _to_compressed_tensors(model, tokenizer, output: Path, **_) -> dict:
    from .saving import save_model

    return {"bytes": save_model(model, tokenizer, output, format="compressed-tensors").nbytes}


def _to_auto_round(model, tokenizer, output: Path, **_) -> dict:
    from .export.auto_round import export_auto_round

    export_auto_round(model, tokenizer, output)
    return {"bytes": sum(p.stat().st_size for p in output.rglob("*") if p.is_file())}


def _to_gguf(model, tokenizer, output: Path, exact: bool, template: Path | None, samples: int) -> dict:
    from .export.gguf import export_gguf

    written = export_gguf(model, tokenizer, output, exact=exact, template=template)
    found = {"bytes": written.nbytes, **{f"{kind} tensors": n for kind, n in sorted(written.types.items())}}
    if written.rounded:
        found["layers rounded again"] = len(written.rounded)
    if written.rounded and samples:
        compared = _compare(_load(str(output), "float32")[0], model, tokenizer, None, samples)
        found["KL from this model, nats per token"] = round(compared.quality.damage, 6)
    return found


_FORMATS = {"compressed-tensors": _to_compressed_tensors, "auto-round": _to_auto_round, "gguf": _to_gguf}


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

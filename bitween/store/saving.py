"""Saving a quantized model with all that a stranger needs: weights, tokenizer, card, checksums; whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitween import __version__
from bitween.store.checkpoint import MANIFEST, SCHEMA_VERSION, sha256
from bitween.store.files import atomic_directory, check_space
from bitween.store.hub import attach, plan_of
from bitween.store.loading import check_saved
from bitween.store.plain import save_plain

__all__ = ["Saved", "save_model"]


@dataclass(frozen=True)
class Saved:
    """What was written: `directory`, `format`, `nbytes` of all files, and the `reasons` against compressed-tensors."""

    directory: Path
    format: str
    nbytes: int
    reasons: dict[str, str]


def save_model(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike,
    *,
    format: str = "auto",
    report: dict[str, Any] | None = None,
    certificate: str = "",
    max_shard_size: str | int = "5GB",
) -> Saved:
    """Write a quantized model and its tokenizer.

    Parameters
    ----------
    model : transformers model with quantized layers, or any torch module with some: of the latter tensors and plan are
        written, and `load_model(directory, into=module)` fills a module built as it was
    tokenizer : its tokenizer, or None
    directory : must not exist, or be empty
    format : "auto", "compressed-tensors" or "native", as for `bitween.attach`
    report : JSON values, kept in `bitween.json`
    certificate : text for the model card
    max_shard_size : bytes, or a text like "5GB"

    Raises
    ------
    ValueError
        as `bitween.attach`.
    FileExistsError
        the directory has files.
    CheckpointError
        what was written, read back, would not load as this model.
    OSError
        of the failed step; nothing is left under the name.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ValueError(
            "model: expected a model without adapters; got peft's around one, whose save_pretrained(directory) writes "
            "the adapters alone: save them so, and the quantized model with save_model(model.unload(), ...)"
        )
    if not hasattr(model, "save_pretrained"):
        return Saved(Path(directory), "plain", save_plain(model, directory, report), {})
    attached = attach(model, format=format)
    check_space(directory, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    with atomic_directory(directory) as folder:
        with warnings.catch_warnings():  # the card says it
            warnings.filterwarnings("ignore", message="written in bitween's own format")
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        check_saved(folder, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(model, attached.format, certificate), encoding="utf-8")
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "bitween_version": __version__,
            "format": attached.format,
            "plan": {name: str(scheme) for name, scheme in plan_of(model).items()},
            "report": report or {},
            "sha256": {name: sha256(folder / name) for name in names if name != "README.md"},
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return Saved(Path(directory), attached.format, nbytes, attached.reasons)


def _card(model: Any, format: str, certificate: str) -> str:
    kind = "AutoModelForCausalLM" if type(model).__name__.endswith("ForCausalLM") else type(model).__name__
    load = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(DIRECTORY)"
    if format == "native":
        first = "**Run `import bitween` before loading this model**: without it transformers fills layers at random."
        load = f"import bitween\n{load}"
    else:
        first = "Loads with transformers and `compressed-tensors>=0.18`; bitween is not needed."
        if len(set(plan_of(model).values())) > 1:
            first += (
                " Its layers have several schemes, so leave `dequantize` alone: with `CompressedTensorsConfig("
                "dequantize=True)` transformers 5.24 unpacks all layers by the first of them, into other numbers."
            )
    base = getattr(model.config, "_name_or_path", "")
    head = ["---", "library_name: transformers", "tags: [bitween, quantized]"]
    if base and "/" in base and not os.path.isabs(base):
        head += [f"base_model: {base}", "base_model_relation: quantized"]
    parts = [
        "\n".join([*head, "---"]),
        first,
        f"# {base.rstrip('/').rpartition('/')[2] or 'Model'}, quantized by bitween {__version__}",
        _plan_table(model),
        certificate and f"## Certificate\n\n{certificate.strip()}",
        f"## Use\n\n```python\n{load}\n```\n\n"
        "`bitween.load_model(DIRECTORY)` keeps the weights packed in memory and checks every field first.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plan_table(model: Any) -> str:
    """Layers, bytes and bits a weight of each scheme, then what stayed as it was."""
    count, size, weights = Counter(), Counter(), Counter()
    for name, scheme in plan_of(model).items():
        q = model.get_submodule(name).quantized
        count[scheme] += 1
        size[scheme] += q.nbytes
        weights[scheme] += q.shape[0] * q.shape[1]
    rows = [f"| {s} | {count[s]} | {size[s]:,} | {8 * size[s] / weights[s]:.2f} |" for s in sorted(count)]
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    rows.append(f"| not quantized | | {kept:,} | |")
    return "\n".join(["| scheme | layers | bytes | bits per weight |", "|---|---:|---:|---:|", *rows])

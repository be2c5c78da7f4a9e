"""Saving and loading a quantized torch module that is no transformers model: its tensors and its plan.

A directory holds `model.safetensors` (the state dict, packed) and `bitween.json` (the plan, and the checksum of the
tensors). The code of the module is not in it: loading fills a module that the caller has built.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from bitween import __version__
from bitween.model.experts import stack_fields
from bitween.store.checkpoint import MANIFEST, SCHEMA_VERSION, CheckpointError, TensorFiles, read_json, sha256
from bitween.store.files import atomic_directory, check_space
from bitween.store.hub import STACK_FIELDS, BitweenConfig, check_stored, plan_of, swap

__all__ = ["load_into", "save_plain"]

_TENSORS = "model.safetensors"
FORMAT = "plain"


def save_plain(model: nn.Module, directory: str | os.PathLike, report: dict | None = None) -> int:
    """Write a quantized module; returns the bytes written.

    Parameters
    ----------
    model : any module with packed layers
    directory : must not exist, or be empty
    report : JSON values, kept beside the plan

    Raises
    ------
    ValueError
        It has no packed layer.
    FileExistsError, OSError
        of the failed step; nothing is left under the name.
    """
    from safetensors.torch import save_model

    plan = plan_of(model)
    if not plan:
        raise ValueError("model: expected quantized layers; it has none")
    for name in plan:
        check_stored(model.get_submodule(name), name)
    check_space(directory, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    with atomic_directory(directory) as folder:
        save_model(model, str(folder / _TENSORS))  # tensors that share memory are written once
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "bitween_version": __version__,
            "format": FORMAT,
            "class": type(model).__name__,
            "plan": {name: str(scheme) for name, scheme in plan.items()},
            **{name: value for name, value in stack_fields(model).items() if value},
            "report": report or {},
            "sha256": {_TENSORS: sha256(folder / _TENSORS)},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return sum(p.stat().st_size for p in folder.iterdir())


def load_into(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Fill a module, built as the saved one was before it was quantized, with what `save_plain` wrote; returns it.

    Its layers that the plan names become packed ones.

    Raises
    ------
    CheckpointError
        with file, tensor and reason: a changed file, a plan of other layers, a tensor missing, left over or of another
        shape or dtype. The module's own layers may be packed by then.
    """
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"format: expected {FORMAT!r}; got {manifest.get('format')!r}", directory / MANIFEST)
    stacks = {name: manifest[name] for name in STACK_FIELDS if name in manifest}
    version = manifest.get("bitween_version", "")
    known = BitweenConfig(manifest.get("plan"), manifest.get("schema_version"), version, **stacks)
    sums = manifest.get("sha256")
    file = directory / _TENSORS
    if not isinstance(sums, dict) or not file.is_file() or sums.get(_TENSORS) != sha256(file):
        raise CheckpointError("differs from its checksum in " + MANIFEST, file)
    files = TensorFiles(directory)
    swap(model, known.schemes, **known.stacks)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in files.names:
            _fill(files, name, tensor)
    own = {(t.data_ptr(), t.numel()) for n, t in expected.items() if n in files.names and t.numel()}
    for name, tensor in expected.items():
        if name not in files.names and tensor.numel() and (tensor.data_ptr(), tensor.numel()) not in own:
            raise files.error("missing", name)
    for name in files.names:
        if name not in expected:
            raise files.error("not a tensor of this model", name)
    for name in known.schemes:
        check_stored(model.get_submodule(name), name)
    return model


def _fill(files: TensorFiles, name: str, tensor: torch.Tensor) -> None:
    stored = files.read(name)
    if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
        got, wanted = (f"{x.dtype} of {tuple(x.shape)}" for x in (stored, tensor))
        raise files.error(f"expected {wanted}; got {got}", name)
    with torch.no_grad():
        tensor.copy_(stored)

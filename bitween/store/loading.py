"""Loading a quantized checkpoint into packed layers, nothing taken on trust.

Every file is checked against its checksum where there is one, every tensor against the model and the plan, before
the model gets it. A tensor that is missing, left over or of another shape is an error: nothing is filled at random.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitween.store import compressed_tensors, importing, names
from bitween.store.checkpoint import MANIFEST, SCHEMA_VERSION, CheckpointError, TensorFiles, read_json, sha256
from bitween.store.hub import METHOD, STACK_FIELDS, BitweenConfig, check_stored, swap
from bitween.store.plain import load_into

__all__ = ["is_packed", "load_model"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_packed(directory: Path) -> bool:
    """Whether `load_model` is the way to load what may be a directory: bitween, GPTQ, AWQ or AutoRound wrote it."""
    if (directory / MANIFEST).is_file():
        return True
    if not (directory / "config.json").is_file():
        return False
    settings = read_json(directory / "config.json").get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") in (METHOD, *importing.METHODS)


def load_model(
    directory: str | os.PathLike, *, dtype: torch.dtype | str = "auto", into: nn.Module | None = None
) -> tuple[nn.Module, Any]:
    """Load a checkpoint in bitween's own format or as compressed-tensors, or one of GPTQ, AWQ or AutoRound.

    Parameters
    ----------
    directory : of config.json, model.safetensors (or shards) and perhaps a tokenizer
    dtype : of the parameters that are not quantized; "auto" takes the config's
    into : a module built as the saved one was before it was quantized, for what is no transformers model

    Returns
    -------
    (model, tokenizer)
        The model in evaluation mode on the CPU, its layers packed; the tokenizer, or None if there is none.

    Raises
    ------
    CheckpointError
        with file, tensor and reason. No code in the directory is run, whatever the config asks for.
    """
    directory = Path(directory)
    if into is not None:
        return load_into(into, directory).eval(), None
    if not (directory / "config.json").is_file() and (directory / MANIFEST).is_file():
        kind = read_json(directory / MANIFEST).get("class")
        raise CheckpointError(f"holds the tensors of a {kind}: give one as into=", directory)
    files, config, model, state = _read(directory)
    state = _checked_state(files, model, state)
    model = _filled(type(model), config, state, dtype)
    return model, _tokenizer(directory)


def _read(directory: Path) -> tuple[TensorFiles, Any, nn.Module, dict[str, torch.Tensor] | None]:
    """The files, the config with the plan in bitween's own words, the packed model on meta, and the tensors if they
    lie in the files under other names."""
    files = TensorFiles(directory)
    _check_manifest(directory)
    settings = read_json(directory / "config.json")
    config = _config(directory, settings, len(files.entries))
    model = _guarded(lambda: _skeleton(config), "config.json")
    _guarded(lambda: names.under_module_names(files, model), "config.json")
    plan, state = _plan(files, settings["quantization_config"], model)
    stacks = {name: settings["quantization_config"].get(name, kind()) for name, kind in STACK_FIELDS.items()}
    _guarded(lambda: swap(model, plan, **stacks), "config.json")
    config.quantization_config = BitweenConfig(plan, **stacks).to_dict()
    return files, config, model, state


def check_saved(directory: str | os.PathLike, model: nn.Module) -> None:
    """Read back what was written of a model: CheckpointError unless it loads, and holds the model's very tensors.

    A new model of the written config is laid out without memory and compared with the files name by name, shape by
    shape and dtype by dtype, as `load_model` does; then each tensor is compared with the model's own.
    """
    directory = Path(directory)
    try:
        files, _, skeleton, state = _read(directory)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
            raise error.__cause__ from None  # a fault of the machine, not of what was written
        raise
    own = model.state_dict()
    for name, tensor in _checked_state(files, skeleton, state).items():
        if name not in own:
            raise files.error("the saved model has no such tensor", name)
        same = own[name].is_meta or torch.equal(tensor, own[name].detach().to("cpu", tensor.dtype))
        if not same:
            raise files.error("differs from the model's own", name)


def _check_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    version, sums = manifest.get("schema_version"), manifest.get("sha256")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise CheckpointError(f"schema_version: this bitween reads 1 to {SCHEMA_VERSION}; got {version!r}", path)
    if not isinstance(sums, dict) or "config.json" not in sums:
        raise CheckpointError("sha256: expected the checksum of every file", path)
    for name, digest in sums.items():
        file = directory / name
        if not name or os.path.isabs(name) or ".." in name or "\0" in name or not file.is_file():
            raise CheckpointError(f"lists {name[:80]!r}, which is not a file here", path)
        if sha256(file) != digest:
            raise CheckpointError("differs from its checksum in " + MANIFEST, file)


def _config(directory: Path, settings: dict[str, Any], n_tensors: int) -> Any:
    from transformers import AutoConfig

    config = _guarded(lambda: AutoConfig.from_pretrained(directory, trust_remote_code=False), "config.json")
    for name in ("num_hidden_layers", "num_experts", "num_local_experts"):
        count = getattr(config, name, None)
        limit = n_tensors if name == "num_hidden_layers" else 4096
        if count is not None and (type(count) is not int or not 0 <= count <= limit):
            raise CheckpointError(f"{name}: {count!r} with {n_tensors} tensors in the files", directory / "config.json")
    if not isinstance(settings.get("quantization_config"), dict):
        raise CheckpointError("quantization_config: expected that of a quantized model", directory / "config.json")
    del config.quantization_config
    return config


def _serves(kind: type, config: Any) -> bool:
    """Whether transformers builds models of a config by a class written for another (InternLM3's by Llama's)."""
    from transformers.models.auto import modeling_auto

    tables = (x for name, x in vars(modeling_auto).items() if name.endswith("_MAPPING"))
    found = (table.get(type(config), None) for table in tables)
    return any(kind in (x if isinstance(x, (tuple, list)) else (x,)) for x in found)


def _skeleton(config: Any) -> nn.Module:
    """The model without memory for its weights: of the class that the config names, where transformers has it."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class is not None:
            if not isinstance(config, kind.config_class) and not _serves(kind, config):
                raise ValueError(f"architectures: {names[0]} is no model of a {type(config).__name__}")
            return kind._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _plan(
    files: TensorFiles, quantization: dict[str, Any], model: nn.Module
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """The plan, and the tensors under bitween's names; None where the files hold them so."""
    method, state = quantization.get("quant_method"), None
    if method == METHOD:
        unknown = set(quantization) - {
            "quant_method",
            "plan",
            "schema_version",
            "bitween_version",
            *STACK_FIELDS,
        }
        if unknown and quantization.get("schema_version") == SCHEMA_VERSION:
            raise CheckpointError(f"quantization_config: unknown field {sorted(unknown)[0]!r}", "config.json")
        known = {key: value for key, value in quantization.items() if key not in unknown}
        plan = BitweenConfig(**known).schemes
    elif method == compressed_tensors.METHOD:
        plan = compressed_tensors.plan_from_config(quantization, model)
        state = compressed_tensors.tensors_from(files, plan, model)
    elif method in importing.METHODS:
        plan, state = importing.plan_and_tensors(files, quantization, model)
    else:
        known = ", ".join((METHOD, compressed_tensors.METHOD, *importing.METHODS))
        raise CheckpointError(f"quant_method: expected one of {known}; got {method!r}", "config.json")
    if not plan:
        raise CheckpointError("the plan names no layer", "config.json")
    return plan, state


def _checked_state(files: TensorFiles, model: nn.Module, state: dict[str, Any] | None) -> dict[str, Any]:
    """Tensors by name, each of the dtype and shape that the model has for it; nothing missing, nothing left over."""
    expected = model.state_dict()
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    given = files.names if state is None else state
    for name in expected:
        if name not in given and ties.get(name) not in given:
            raise files.error("missing", name)
    for name in given:
        if name not in expected:
            raise files.error("not a tensor of this model", name)
    found, parameters = {}, {name for name, _ in model.named_parameters()}
    for name in given:
        if state is None and name in files.entries and files.entries[name].shape != tuple(expected[name].shape):
            raise files.error(f"expected {tuple(expected[name].shape)}; got {files.entries[name].shape}", name)
        tensor = files.read(name) if state is None else state[name]
        _check_tensor(files, name, tensor, expected[name], name in parameters)
        found[name] = tensor
    for name, tensor in expected.items():
        if name in found and tensor.dtype == torch.float16 and name.endswith(".scales"):
            owner = model.get_submodule(name.rpartition(".")[0])
            _check_codes(owner, name.rpartition(".")[0], found)
    return found


def _check_tensor(files: TensorFiles, name: str, tensor: torch.Tensor, like: torch.Tensor, parameter: bool) -> None:
    if tensor.shape != like.shape:
        raise files.error(f"expected {tuple(like.shape)}; got {tuple(tensor.shape)}", name)
    if parameter and tensor.dtype in _FLOATS and like.dtype in _FLOATS:
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise files.error("holds NaN or infinity", name)
    elif tensor.dtype != like.dtype:
        raise files.error(f"expected {like.dtype}; got {tensor.dtype}", name)


def _check_codes(layer: nn.Module, name: str, found: dict[str, torch.Tensor]) -> None:
    """The values of one layer's buffers, before the layer gets them."""

    class Stored:
        scheme, codes, scales = layer.scheme, found[f"{name}.codes"], found[f"{name}.scales"]
        zeros = found.get(f"{name}.zeros")

    check_stored(Stored, name)


def _filled(kind: type, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype | str) -> nn.Module:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    model, info = _guarded(
        lambda: kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True),
        "config.json",
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            raise CheckpointError(key.replace("_", " "), tensor=str(sorted(info[key], key=str)[0]))
    return model.eval()


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return _guarded(
        lambda: AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True), "tokenizer"
    )


def _guarded(step: Any, file: str) -> Any:
    """What a library says about a file's content becomes a CheckpointError; faults of the machine do not."""
    try:
        return step()
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{type(error).__name__}: {error}", file) from error

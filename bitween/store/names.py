"""Names of tensors in files and names in models: transformers renames on the way in and out, bitween follows.

A family keeps the names of its first checkpoints (`embed_out`, experts one by one, nested text models) while its
modules are called otherwise. Which is which, the library knows; here its own table is asked, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ["in_model", "survives", "under_module_names"]


def _table(model: nn.Module) -> tuple[list, list]:
    """(renamings, converters) by which transformers loads this model; none in versions before it had any."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    steps = get_model_conversion_mapping(model)
    return (
        [step for step in steps if isinstance(step, WeightRenaming)],
        [step for step in steps if isinstance(step, WeightConverter)],
    )


def in_model(names: Iterable[str], model: nn.Module) -> dict[str, tuple[str, Any, str | None]]:
    """{name in a file: (name in the model, converter, its pattern)}; the latter two None where only names change.

    A name whose module the model has is taken as it is, and a renamed one only where the model has that module: what
    the packed parts of a layer are called, the library's table does not know.
    """
    renamings, converters = _table(model)
    state, modules = model.state_dict(), {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    if renamings or converters:
        from transformers.core_model_loading import rename_source_key

    def known(name: str) -> bool:
        return name in state or (name.rpartition(".")[0] in modules and _packed_part(name))

    found = {}
    for name in names:
        renamed, pattern = name, None
        if renamings or converters:
            renamed, pattern = rename_source_key(name, renamings, converters)
        options = [(renamed, pattern), (name, None)]
        options += [(f"{prefix}.{n}", p) for n, p in options] + [(n.removeprefix(f"{prefix}."), p) for n, p in options]
        best, by = next(((n, p) for n, p in options if known(n)), (name, None))
        found[name] = best, by_pattern.get(by), by
    return found


def _packed_part(name: str) -> bool:
    """Whether a name ends as the parts of packed layers do, here and in the formats that are read."""
    return name.rpartition(".")[2] in (
        "codes", "scales", "zeros", "multiplier", "weight_packed", "weight_scale", "weight_shape",
        "qweight", "qzeros", "g_idx",
    )  # fmt: skip


def under_module_names(files: Any, model: nn.Module) -> None:
    """Let a checkpoint's tensors be found under the names of the model's modules; what needs conversion is converted
    when it is read.

    Parameters
    ----------
    files : TensorFiles, changed
    model : the plain model, on the meta device
    """
    gathered: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    entries, taken = {}, in_model(files.entries, model)
    for name, (own, converter, pattern) in taken.items():
        if converter is None:
            if own in entries:
                raise files.error(f"a second tensor for {own}", name)
            entries[own] = files.entries[name]
        else:
            gathered.setdefault(own, (converter, []))[1].append((name, pattern))
    for own, (converter, sources) in gathered.items():
        parts = {name: files.read(name) for name, _ in sorted(sources, key=lambda s: _natural(s[0]))}
        files.converted |= convert(own, converter, [(name, p, parts[name]) for name, p in sources], model)
    files.entries = entries


def convert(
    own: str, converter: Any, parts: list[tuple[str, str, torch.Tensor]], model: nn.Module
) -> dict[str, torch.Tensor]:
    """{name in the model: tensor} that a converter of transformers makes of (name in the file, pattern, tensor)."""
    step = deepcopy(converter)
    for name, pattern, tensor in sorted(parts, key=lambda part: _natural(part[0])):
        step.add_tensor(own, name, pattern, tensor)
    made = step.convert(own, model=model, config=model.config)
    made = made[0] if isinstance(made, tuple) else made  # the first versions of transformers 5 add what went wrong
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _natural(name: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)


def survives(state: dict[str, torch.Tensor], model: nn.Module) -> bool:
    """Whether tensors that transformers writes under a family's first names come back under those of the modules.

    Not so where they are taken apart: compressed-tensors' reader looks for packed parts in every piece (an expert's
    matrix, say), so that what stays in full precision must be written whole.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion

        shapes = {name: tensor.detach().to("meta") for name, tensor in state.items()}
        written = revert_weight_conversion(model, dict(shapes))
    except ImportError:  # a version that renames nothing
        return True
    except Exception:  # a conversion that packed tensors cannot go through
        return False
    read = in_model(written, model)
    if any(converter is not None for _, converter, _ in read.values()):
        return False
    return {own: written[name].shape for name, (own, _, _) in read.items()} == {n: t.shape for n, t in shapes.items()}

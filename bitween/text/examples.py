"""Examples of a model's inputs from whatever people hold them in: one call of the model each, split in three.

What is taken: a DataLoader, a `datasets` Dataset, a generator, a list or a tensor; each item a dict (BatchEncoding), a
tensor, or a tuple of tensors. Batches come apart into single examples, so that each counts by itself in the proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitween.text.mix import is_domains

__all__ = ["Example", "ExampleSplits", "Signature", "gather", "is_inputs", "split"]

_LEAST = 3  # one for each use
_SELECTION = 32  # examples that steer the search, at most


@dataclass(frozen=True)
class Example:
    """One call of a model: `model(*args, **kwargs)`.

    Attributes
    ----------
    args, kwargs : tensors, with a batch dimension of one where the model has one
    labels : what stood beside the inputs and the model does not take, or None
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything by name; arguments by position are "0", "1", ..."""
        return {**{str(i): x for i, x in enumerate(self.args)}, "labels": self.labels, **self.kwargs}

    @property
    def signature(self) -> tuple:
        """Equal for examples that can stand in one batch."""
        parts = [(str(i), x) for i, x in enumerate(self.args)] + sorted(self.kwargs.items())
        return tuple((n, tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else (n, repr(x)) for n, x in parts)


@dataclass(frozen=True)
class ExampleSplits:
    """Examples for three uses, none in two of them; `document` tells which belong together, of each split."""

    calibration: list[Example]
    selection: list[Example]
    certification: list[Example]
    document: dict[str, list[int]]
    report: dict[str, Any]


@dataclass(frozen=True)
class Signature:
    """What a model's forward takes.

    Attributes
    ----------
    names : of its arguments; None where it takes any by name
    positional : how many it needs by position
    main : name and dimensions of the main input with its batch dimension, as ("pixel_values", 4), where known
    labels_in : it makes inputs of its decoder from "labels"
    """

    names: tuple[str, ...] | None
    positional: int = 1
    main: tuple[str, int] | None = None
    labels_in: bool = False


def is_inputs(source: Any, *, encoded: bool = False) -> bool:
    """Whether a source holds a model's inputs (dicts or tensors of numbers), rather than text or token ids.

    Looks at the first element of what can be looked at without using it up.

    Parameters
    ----------
    encoded : also take dicts of token ids and masks alone, which causal language models join to windows, for inputs
    """
    only_text = set() if encoded else {"input_ids", "attention_mask", "token_type_ids"}
    if source is None or isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        return False
    if isinstance(source, torch.Tensor | np.ndarray):
        return torch.as_tensor(source).is_floating_point()
    if isinstance(source, Mapping):
        if is_domains(source) or any(isinstance(value, str) for value in source.values()) or "messages" in source:
            return False
        return bool(set(source) - only_text)
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list | tuple):
        if encoded:
            return not any(name in columns for name in ("text", "messages")) or "input_ids" in columns
        return not any(name in columns for name in ("text", "messages", "conversations", "input_ids"))
    if isinstance(source, Sequence) and len(source):
        first = source[0]
        if isinstance(first, tuple | list) and first and isinstance(first[0], torch.Tensor):
            return True
        return not isinstance(first, (str, int, list, tuple)) and is_inputs(first, encoded=encoded)
    if isinstance(source, Iterable) and not isinstance(source, Sequence) and not hasattr(source, "__next__"):
        # it begins anew each time, as a DataLoader does
        return is_inputs(list(itertools.islice(source, 1)), encoded=encoded)
    return False


def gather(source: Any, signature: Signature, most: int) -> list[Example]:
    """The first `most` examples of a source.

    Raises
    ------
    TypeError, ValueError
        naming the item that is no input of the model, or a source without any.
    """
    found: list[Example] = []
    for i, item in enumerate(_items(source)):
        found += _examples(item, i, signature)
        if len(found) >= most:
            break
    if not found:
        raise ValueError("calibration_data: expected examples of the model's inputs; got none")
    return found[:most]


def split(
    examples: Sequence[Example],
    *,
    calibration: int,
    certification: int,
    seed: int = 0,
    document: Sequence[int] | None = None,
    source: str = "examples",
) -> ExampleSplits:
    """Deal examples out to three uses; what belongs to one document goes to one of them.

    Half are to learn from, a sixth to steer by, the rest for the proof, each up to what is asked for. Where one is all
    that is asked for the proof, all but two are to learn from.

    Raises
    ------
    ValueError
        Fewer than three.
    """
    document = list(range(len(examples))) if document is None else list(document)
    names = sorted(set(document))
    if len(names) < _LEAST:
        raise ValueError(
            f"calibration_data: expected at least {_LEAST} examples, one to learn from, one to steer by and one for "
            f"the proof; got {len(names)}"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    learn = max(1, min(calibration, len(names) // 2 if certification > 1 else len(names) - 2))
    steer = max(1, min(_SELECTION, len(names) // 6)) if certification > 1 else 1
    prove = min(certification, len(names) - learn - steer)
    parts = {"calibration": order[:learn], "selection": order[learn : learn + steer]}
    parts["certification"] = order[learn + steer : learn + steer + prove]
    home = {names[int(place)]: part for part, places in parts.items() for place in places}
    dealt: dict[str, list[Example]] = {part: [] for part in parts}
    documents: dict[str, list[int]] = {part: [] for part in parts}
    for example, name in zip(examples, document, strict=True):
        if name in home:
            dealt[home[name]].append(example)
            documents[home[name]].append(name)
    report = {"source": source, "seed": seed} | {part: {"examples": len(dealt[part])} for part in parts}
    return ExampleSplits(**dealt, document=documents, report=report)


# ---- inside -----------------------------------------------------------------------------------------


def _items(source: Any) -> Iterable[Any]:
    if isinstance(source, torch.Tensor | np.ndarray):
        return [torch.as_tensor(source)]
    if isinstance(source, Mapping):
        if "train" in source and not isinstance(source["train"], torch.Tensor | list):
            return _items(source["train"])
        return [source]
    if not isinstance(source, Iterable):
        raise TypeError(
            "calibration_data: expected a DataLoader, a data set, a generator, or a list of dicts or tensors; got "
            f"{type(source).__name__}"
        )
    return source


def _examples(item: Any, i: int, signature: Signature) -> list[Example]:
    """One item as examples; a batch comes apart."""
    if isinstance(item, Example):
        return [item]
    if isinstance(item, Mapping):
        return _apart(*_named(item, i, signature))
    if isinstance(item, torch.Tensor | np.ndarray):
        return _apart((torch.as_tensor(item),), {}, None)
    if isinstance(item, tuple | list) and item:
        parts = [_as_tensor(value) for value in item]
        if all(isinstance(part, torch.Tensor) for part in parts):
            args, rest = tuple(parts[: signature.positional]), parts[signature.positional :]
            return _apart(args, {}, rest[0] if rest else None)
        if len(item) == 2 and isinstance(item[0], Mapping):
            args, kwargs, _ = _named(item[0], i, signature)
            return _apart(args, kwargs, parts[1])
    raise TypeError(
        f"calibration_data: item {i}: expected a dict of tensors, a tensor or a tuple of tensors; got "
        f"{type(item).__name__}"
    )


def _named(item: Mapping, i: int, signature: Signature) -> tuple[tuple, dict[str, Any], Any]:
    names = signature.names
    given = dict(item)
    for singular in ("label", "label_ids"):
        if singular in given and "labels" not in given:
            given["labels"] = given.pop(singular)
    kwargs = {n: _as_tensor(value) for n, value in given.items() if names is None or n in names}
    kwargs = {n: value for n, value in kwargs.items() if value is not None and not isinstance(value, str)}
    labels = _as_tensor(given.get("labels"))
    if not signature.labels_in or "decoder_input_ids" in kwargs:  # labels are compared with the answer, no more
        kwargs.pop("labels", None)
    tensors = {n: value for n, value in kwargs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        taken = "any" if names is None else ", ".join(names[:8])
        raise ValueError(
            f"calibration_data: item {i}: expected inputs of the model ({taken}); got {', '.join(map(repr, given))}"
        )
    main = signature.main
    if main and main[0] in tensors and tensors[main[0]].ndim == main[1] - 1:  # a row of a data set: no batch yet
        kwargs |= {n: value[None] for n, value in tensors.items()}
        labels = labels[None] if isinstance(labels, torch.Tensor) else labels
    if isinstance(labels, torch.Tensor) and not labels.ndim:
        labels = labels[None]
    return (), kwargs, labels


def _as_tensor(value: Any) -> Any:
    """Numbers in any form as a tensor; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.as_tensor(value)
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(x, torch.Tensor) for x in value):
            same = len({x.shape for x in value}) == 1
            return torch.stack(list(value)) if same else value
        try:
            return torch.as_tensor(np.asarray(value)) if np.asarray(value).dtype.kind in "biuf" else value
        except ValueError:  # rows of several lengths
            return value
    return value


def _apart(args: tuple, kwargs: dict[str, Any], labels: Any) -> list[Example]:
    """Single examples of a batch: cut where every tensor has the same, longer first dimension."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    sizes = {x.shape[0] if x.ndim else 0 for x in tensors}
    if len(sizes) != 1 or not sizes.isdisjoint({0, 1}) or any(x.ndim < 2 for x in (*args,)):
        return [Example(args, kwargs, labels)]
    count = sizes.pop()
    if any(x.ndim < 2 and n != "labels" for n, x in kwargs.items() if isinstance(x, torch.Tensor)):
        return [Example(args, kwargs, labels)]

    def one(x: Any, i: int) -> Any:
        return x[i : i + 1] if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == count else x

    return [
        Example(tuple(one(x, i) for x in args), {n: one(x, i) for n, x in kwargs.items()}, one(labels, i))
        for i in range(count)
    ]

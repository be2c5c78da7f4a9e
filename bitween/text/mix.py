"""Several domains of text: which ones, windows in equal shares of each, and nothing of one in another.

A domain is a kind of text that has a name: those that ship with bitween, or a user's own. Each is split into
calibration, selection and certification on its own, so that each can be certified on its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bitween.text import calibration, shipped, sources
from bitween.text.calibration import Splits, TokenWindows
from bitween.text.repeats import Repeats

__all__ = ["FEWEST_WINDOWS", "Mix", "checked", "is_domains", "prepare"]

FEWEST_WINDOWS = 8  # of a domain that can be bounded: the spread of fewer can't be told
_OF_DATA = ("input_ids", "messages", "conversations", "text", "train")  # keys of data, not names of domains


@dataclass(frozen=True)
class Mix:
    """Kinds of text by name.

    Attributes
    ----------
    sources : {name: what `sources.resolve` gives, or None for the shipped domain of that name}
    budgets : {name: largest relative increase of the perplexity}, of those domains that have one of their own
    """

    sources: dict[str, Any]
    budgets: dict[str, float] = field(default_factory=dict)


def checked(data: Any = None, domains: Any = None, tokenizer: Any = None) -> Mix:
    """What `calibration_data` and `domains` mean together; what is wrong with them is told before any work.

    Parameters
    ----------
    data : None for the text that ships with bitween; one text (`sources.resolve`), which is one domain called "text";
        or {name: text, ...}, where None stands for the shipped domain of that name
    domains : None for all there are; names of some; or {name: its own budget, a relative increase of the perplexity, or
        None for that of the run}

    Raises
    ------
    TypeError, ValueError
        No such domain; a budget that is no share; a text that `sources.checked` refuses.
    """
    if data is None:
        known = dict.fromkeys(shipped.DOMAINS)
    elif is_domains(data, named=domains is not None):
        known = dict(data)
    else:
        if domains is not None:
            raise ValueError(
                "domains: expected None where calibration_data is one text; give calibration_data={name: text, ...} to "
                f"name several; got {domains!r}"
            )
        return Mix({"text": sources.checked(data, tokenizer)})
    budgets = _budgets(domains, known)
    found = {}
    for name in known if domains is None else budgets:
        source = known[name]
        if source is None and name not in shipped.DOMAINS:
            raise ValueError(
                f"calibration_data: domain {name!r}: expected a text; got None, which stands for a domain that ships "
                f"with bitween: {', '.join(shipped.DOMAINS)}"
            )
        found[name] = _named(name, source, tokenizer)
    return Mix(found, {name: budget for name, budget in budgets.items() if budget is not None})


def is_domains(data: Any, named: bool = False) -> bool:
    """Whether `data` is {name: text}, rather than one text, a data set, or inputs of a model by name.

    Parameters
    ----------
    named : the names are known to be those of domains; else a dict that holds tensors or numbers is one of inputs
    """
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(name, str) for name in data)
        and not any(name in data for name in _OF_DATA)
        and not hasattr(data, "column_names")
        and (named or not any(map(_numbers, data.values())))
    )


def _numbers(value: Any) -> bool:
    """Whether a value is an input of a model: a number, a tensor, or a list of numbers."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float) or hasattr(value, "shape")


def _budgets(domains: Any, known: Mapping[str, Any]) -> dict[str, float | None]:
    if domains is None:
        return {}
    if isinstance(domains, str):
        domains = [domains]
    if not isinstance(domains, Mapping):
        if not isinstance(domains, Iterable):
            raise TypeError(f"domains: expected names of domains, or {{name: budget}}; got {domains!r}")
        domains = dict.fromkeys(domains)
    if not domains:
        raise ValueError("domains: expected at least one name; got none")
    for name, budget in domains.items():
        if name not in known:
            raise ValueError(f"domains: expected some of {', '.join(known)}; got {name!r}")
        if budget is None:
            continue
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise TypeError(f"domains: {name!r}: expected a relative increase as a number, or None; got {budget!r}")
        if not 0 < budget < 1:
            raise ValueError(f"domains: {name!r}: expected a relative increase between 0 and 1; got {budget!r}")
    return dict(domains)


def _named(name: str, source: Any, tokenizer: Any) -> Any:
    try:
        if source is not None:
            return sources.checked(source, tokenizer)
        if name == "dialogue":
            shipped.documents(name, tokenizer)  # the chat template is a program: whether it works shows by running it
        return sources.checked(None, tokenizer)
    except (TypeError, ValueError, FileNotFoundError) as error:
        prefix = "calibration_data: "
        if not str(error).startswith(prefix):
            raise
        raise type(error)(f"{prefix}domain {name!r}: {str(error).removeprefix(prefix)}") from error


def prepare(
    tokenizer: Any,
    mix: Mix,
    *,
    length: int = 512,
    calibration_windows: int = 128,
    selection: int = 32,
    certification: int = 240,
    seed: int = 0,
    bounded: bool = True,
    **limits: Any,
) -> Splits:
    """Windows of all domains, in turn, as `calibration.prepare` cuts them from each.

    Parameters
    ----------
    calibration_windows, selection, certification : windows of all domains together, dealt out in equal shares
    bounded : each domain must have enough windows of certification for a bound, even where fewer are asked for
    **limits : `context` and `vocabulary`, as for `calibration.prepare`

    Raises
    ------
    TypeError, ValueError
        as `calibration.prepare`; a domain too small to be bounded; one that repeats a document of another.
    """
    wanted = {"calibration": calibration_windows, "selection": selection, "certification": certification}
    if len(mix.sources) == 1 and None not in mix.sources.values():
        ((name, source),) = mix.sources.items()
        splits = calibration.prepare(tokenizer, source, length=length, seed=seed, **wanted, **limits)
        return Splits(splits.calibration, splits.selection, splits.certification, splits.report, (name,))
    if bounded and certification:
        wanted["certification"] = max(certification, FEWEST_WINDOWS * len(mix.sources))
    repeats, parts = Repeats(), {}
    for place, (name, source) in enumerate(mix.sources.items()):
        shares = {split: _share(count, place, len(mix.sources)) for split, count in wanted.items()}
        if not any(shares.values()):
            continue
        text = shipped.documents(name, tokenizer) if source is None else source
        parts[name] = calibration.prepare(
            tokenizer, text, length=length, seed=seed, repeats=repeats, domain=name, **shares, **limits
        )
        if source is None:
            parts[name].report["source"] = "ships with bitween"
        if bounded:
            _check_size(name, parts[name], shares)
    return _joined(parts, tuple(mix.sources), wanted, seed)


def _share(count: int, place: int, domains: int) -> int:
    """Windows of one domain: equal shares, what is left over to the first ones."""
    return count // domains + (place < count % domains)


def _check_size(name: str, part: Splits, shares: Mapping[str, int]) -> None:
    have = len(part.certification)
    if have >= FEWEST_WINDOWS or not shares["certification"]:
        return
    length = part.report["length"]
    needed = length * (shares["calibration"] + shares["selection"] + FEWEST_WINDOWS)
    got = sum(split["tokens"] for split in part.report["splits"].values())
    raise ValueError(
        f"calibration_data: domain {name!r}: expected at least {FEWEST_WINDOWS} windows of {length} tokens for the "
        f"proof, a bound needs so many; got {have}. It needs about {needed:,} tokens for its three uses, {got:,} were "
        "found: give more text, a smaller length, or leave the domain out"
    )


def _joined(parts: Mapping[str, Splits], names: tuple[str, ...], wanted: Mapping[str, int], seed: int) -> Splits:
    """One Splits of all: windows of the domains in turn, but those of certification one domain after the other."""
    offset, documents = {}, 0
    for name, part in parts.items():
        offset[name] = documents
        documents += part.report["documents"]
    lengths = {part.report["length"] for part in parts.values()}
    if len(lengths) > 1:
        raise ValueError(f"calibration_data: expected windows of one length in all domains; got {sorted(lengths)}")
    ready = {}
    for split in calibration.SPLITS:
        rows = [
            (place if split == "certification" else 0, i, place, getattr(part, split), offset[name])
            for place, name in enumerate(names)
            if (part := parts.get(name)) is not None
            for i in range(len(getattr(part, split)))
        ]
        rows.sort(key=lambda row: row[:3])
        ids = [windows.ids[i] for _, i, _, windows, _ in rows]
        ready[split] = TokenWindows(
            torch.stack(ids) if ids else torch.zeros((0, *lengths), dtype=torch.long),
            torch.tensor([int(windows.document[i]) + first for _, i, _, windows, first in rows], dtype=torch.long),
            torch.tensor([place for _, _, place, _, _ in rows], dtype=torch.long),
        )
    return Splits(**ready, report=_report(parts, names, ready, wanted, seed, documents), domains=names)


def _report(parts, names, ready, wanted, seed: int, documents: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for windows in ready.values():
        digest.update(windows.ids.numpy().tobytes())
    first = next(iter(parts.values())).report
    return {
        "source": _sources({name: part.report["source"] for name, part in parts.items()}),
        "seed": seed,
        "length": first["length"],
        "begins_with": first["begins_with"],
        "documents": documents,
        "splits": calibration.count_splits(ready, wanted),
        "domains": {name: parts[name].report if name in parts else None for name in names},
        "warnings": [f"{name}: {note}" for name, part in parts.items() for note in part.report["warnings"]],
        "sha256": digest.hexdigest(),
    }


def _sources(named: Mapping[str, str]) -> str:
    """Where the text comes from: domains of the same source together."""
    together: dict[str, list[str]] = {}
    for name, source in named.items():
        together.setdefault(source, []).append(name)
    return "; ".join(f"{', '.join(names)} ({source})" for source, names in together.items())

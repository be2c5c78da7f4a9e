"""What people hold their text in, as one of three: a list of strings, lists of token ids, or a tensor of windows.

Files and names of data sets are left to `documents.py`; everything here works on objects, and touches no network.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["ChatTemplateError", "TokenLists", "chat", "checked", "is_chat", "is_text", "resolve", "written"]

_MOST_ITEMS = 100_000  # taken of what may never end
_LONGEST_NAME = 1000  # a longer string is no path
_COLUMNS = ("text", "input_ids", "messages", "conversations")
_GATHERED = "expected a path, text, a list of strings, token windows, a data set, a DataLoader or chats"


class TokenLists(list):
    """Documents that are tokens already: a list of lists of int, of any lengths."""


class ChatTemplateError(ValueError):
    """A tokenizer's chat template, which is a program that came with it, failed; the message says how."""


def is_text(source: str) -> bool:
    """Whether a string is text itself, rather than the name of a file or data set.

    Names are short, of one line and without spaces unless they end like a file or are there.
    """
    if "\n" in source or len(source) > _LONGEST_NAME:
        return True
    if not re.search(r"\s", source.strip()):
        return not source.strip()
    from bitween.text.documents import is_path

    return not is_path(source)


def resolve(source: Any, tokenizer: Any = None) -> Any:
    """The source as None, a path or name (str or PathLike), a list of strings, TokenLists or a tensor of token ids.

    Parameters
    ----------
    source : also one long string of text; a `datasets` Dataset, DatasetDict (its "train") or Column; a DataLoader,
        generator or other iterable; a BatchEncoding or dicts with "input_ids" (padding is left out by their
        "attention_mask"); chats: lists of {"role", "content"}, or dicts with these as "messages"
    tokenizer : its chat template writes chats down

    Raises
    ------
    TypeError, ValueError
        naming the item that is none of these, or the chat that the template refuses.
    """
    if source is None or isinstance(source, os.PathLike | TokenLists):
        return source
    if isinstance(source, str):
        return [source] if is_text(source) else source
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(source, np.ndarray) and source.dtype != object and source.dtype.kind in "iu":
        return torch.from_numpy(source)
    if isinstance(source, bytes | bytearray | int | float):
        raise TypeError(f"calibration_data: {_GATHERED}; got {type(source).__name__}")
    items = list(_items(source))
    if is_chat(items):
        items = [items]
    parts = [_part(item, i, tokenizer) for i, item in enumerate(items)]
    return _joined([part for found in parts for part in found])


def checked(source: Any, tokenizer: Any) -> Any:
    """`resolve`, and the errors that can be known before any work: no such file, text without a tokenizer."""
    from bitween.text.documents import is_path

    source = resolve(source, tokenizer)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and is_path(source)):
        path = os.path.expanduser(source)
        if not os.path.exists(path):
            raise FileNotFoundError(f"calibration_data: expected a file; {path} does not exist")
    if tokenizer is None and not isinstance(source, torch.Tensor | TokenLists):
        raise TypeError("tokenizer: expected a tokenizer, since calibration_data is no tensor of token ids; got None")
    return source


def _items(source: Any) -> Iterable[Any]:
    """The elements of whatever holds several."""
    if isinstance(source, Mapping) and "input_ids" not in source and "messages" not in source:
        if "train" in source:
            return _items(source["train"])
        if "text" in source and not isinstance(source["text"], str):
            return _items(source["text"])
        raise TypeError(
            f'calibration_data: expected "input_ids", "messages", "text" or a split "train"; got a '
            f"{type(source).__name__} of {', '.join(map(repr, list(source)[:5]))}"
        )
    if isinstance(source, Mapping):
        return [source]
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list | tuple):
        name = next((c for c in _COLUMNS if c in columns), None)
        if name is None:
            raise ValueError(
                f'calibration_data: expected a column "text", "input_ids" or "messages"; got the columns '
                f"{', '.join(columns)}"
            )
        return _some(row if name == "input_ids" else row[name] for row in source)
    if not isinstance(source, Iterable):
        raise TypeError(f"calibration_data: {_GATHERED}; got {type(source).__name__}")
    return _some(source)


def _some(items: Iterable[Any]) -> list[Any]:
    if isinstance(items, list | tuple):
        return list(items)
    found = list(itertools.islice(items, _MOST_ITEMS + 1))
    if len(found) > _MOST_ITEMS:
        warnings.warn(f"calibration_data: the first {_MOST_ITEMS:,} items are taken", stacklevel=4)
    return found[:_MOST_ITEMS]


def is_chat(items: Any) -> bool:
    """Whether this is one conversation: a list of messages with "role" and "content"."""
    return isinstance(items, list | tuple) and bool(items) and all(
        isinstance(item, Mapping) and "role" in item and "content" in item for item in items
    )  # fmt: skip


def _part(item: Any, i: int, tokenizer: Any) -> list[Any]:
    """Strings and lists of token ids in one element: a text, a row of tokens, a batch of either, or a chat."""
    if isinstance(item, str):
        return [item]
    if isinstance(item, Mapping):
        if "input_ids" in item:
            return _token_rows(item["input_ids"], i, item.get("attention_mask"))
        for name in ("messages", "conversations"):
            if name in item:
                return _part(item[name], i, tokenizer)
        if isinstance(item.get("text"), str):
            return [item["text"]]
        if isinstance(item.get("text"), list | tuple):  # what a DataLoader makes of dicts
            return [text for j in item["text"] for text in _part(j, i, tokenizer)]
    if is_chat(item):
        return [chat(item, i, tokenizer)]
    if isinstance(item, torch.Tensor | np.ndarray):
        return _token_rows(item, i)
    if isinstance(item, list | tuple) and item:
        if all(isinstance(x, int) and not isinstance(x, bool) for x in item):
            return [list(item)]
        if not any(item is x for x in item):
            return [part for x in item for part in _part(x, i, tokenizer)]
    raise TypeError(
        f'calibration_data: item {i}: expected a string, token ids, a chat, or an object with "text", "input_ids" or '
        f'"messages"; got {type(item).__name__}'
    )


def _token_rows(ids: Any, i: int, mask: Any = None) -> list[list[int]]:
    """Rows of token ids, without what the attention mask hides."""
    try:
        rows, shown = torch.as_tensor(ids), None if mask is None else torch.as_tensor(mask)
    except (ValueError, TypeError):  # rows of several lengths
        masks = [None] * len(ids) if mask is None else mask
        return [row for x, m in zip(ids, masks, strict=True) for row in _token_rows(x, i, m)]
    if rows.is_floating_point() or rows.dtype == torch.bool or rows.ndim not in (1, 2):
        raise ValueError(
            f"calibration_data: item {i}: expected token ids, integers of one or two dimensions; got {rows.dtype} of "
            f"shape {tuple(rows.shape)}"
        )
    rows = rows.reshape(-1, rows.shape[-1])
    if shown is None:
        return rows.tolist()
    return [row[keep].tolist() for row, keep in zip(rows, shown.reshape(rows.shape).bool(), strict=True)]


def chat(messages: Any, i: int, tokenizer: Any) -> str:
    """A chat as its template writes it, or an error that names the item."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"calibration_data: item {i} is a chat, and the tokenizer has no chat template to write it down; got "
            f"{type(tokenizer).__name__}: set tokenizer.chat_template, or give texts"
        )
    try:
        return written(messages, tokenizer)
    except ChatTemplateError as error:
        raise ValueError(f"calibration_data: item {i}: the tokenizer's chat template refused it: {error}") from error


def written(messages: Any, tokenizer: Any) -> str:
    """A chat as the tokenizer's template writes it, without the token that begins every window anyhow."""
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except Exception as error:  # whatever a template may raise
        raise ChatTemplateError(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise ChatTemplateError(f"it wrote nothing; expected text, got {text!r}")
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")


def _joined(parts: list[Any]) -> Any:
    texts = sum(isinstance(part, str) for part in parts)
    if texts == len(parts):
        return parts
    if texts:
        raise TypeError(f"calibration_data: expected texts or token ids; got {texts} texts of {len(parts)} items")
    if len({len(part) for part in parts}) == 1 and len(parts[0]) > 1:
        return torch.tensor(parts)
    return TokenLists(parts)

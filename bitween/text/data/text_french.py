"""French: the manual of a web server, each page as (title, parts) of a document."""

import html
import re

from packages import Prose, package


class _Manual(Prose):
    """A page of the manual: its menus and summary stand in divs of other classes."""

    HIDDEN = "nosearch|menu|toc|codeblock|qview|toplang|bottomlang|footer|page-header|example|directive-summary|up$"


def apache(folder):
    files = package(folder, "apache2-doc_*.deb")
    pages = []
    for name in sorted(files):
        if "/manual/fr/" not in name or not name.endswith(".html"):
            continue
        text = files[name].decode("utf-8", "replace")
        if re.search(r'<html[^>]*lang="fr"', text) and not re.search("quickreference|license|/faq/|index.html", name):
            pages.append((name, text))
    for name, text in pages[::3]:
        title = html.unescape(re.search(r"<title>(.*?)</title>", text, re.S)[1]).strip()
        reader = _Manual()
        reader.feed(text[text.index("<body") :])
        reader.close()
        seen = dict.fromkeys(p for p in reader.paragraphs if len(p) >= 40 and not p.startswith("Apache > "))
        # What is shorter is an entry of a menu or a heading.
        yield f"{title} ({name.rpartition('/')[2]})", list(seen)

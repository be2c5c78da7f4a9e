"""Questions and answers as conversations of several turns, each as (title, messages)."""

import html
import re
from html.parser import HTMLParser

from packages import COARSE, package

_LONGEST = 5_000  # characters of one conversation, unless one answer is longer


def _conversations(title: str, pairs, longest: int = _LONGEST):
    """Consecutive questions with their answers, as many as fit."""
    messages, used, count = [], 0, 0
    for question, answer in pairs:
        if COARSE.search(question + answer):
            continue
        size = len(question) + len(answer)
        if messages and used + size > longest:
            count += 1
            yield f"{title}, {count}", messages
            messages, used = [], 0
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        used += size
    if messages:
        yield f"{title}, {count + 1}", messages


class _Answers(HTMLParser):
    """Questions, which stand in headings, and the paragraphs, lists and listings below them."""

    BLOCKS = frozenset({"p", "li", "pre", "blockquote", "dt", "dd"})

    def __init__(self, heading: str):
        super().__init__()
        self.heading, self.pairs, self.words, self.listing, self.hidden = heading, [], [], False, 0

    def _end(self):
        text = "".join(self.words)
        text = text.strip("\n").rstrip() if self.listing else " ".join(text.split())
        if text and self.pairs:
            self.pairs[-1][1].append(f"```\n{text}\n```" if self.listing else text)
        self.words = []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "style") or (tag == "a" and "headerlink" in (dict(attributes).get("class") or "")):
            self.hidden += 1
        elif tag == self.heading or tag in self.BLOCKS:
            self._end()
            self.listing = tag == "pre"

    def handle_endtag(self, tag):
        if self.hidden and tag in ("a", "script", "style"):
            self.hidden -= 1
        elif tag == self.heading:
            self.pairs.append((" ".join("".join(self.words).split()), []))
            self.words = []
        elif tag in self.BLOCKS:
            self._end()
            self.listing = False

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def python_faq(folder):
    files = package(folder, "python3.11-doc_*.deb")
    for page in ("general", "programming", "design", "library", "extending", "windows", "gui"):
        text = files[f"./usr/share/doc/python3.11/html/faq/{page}.html"].decode()
        body = text[text.index('role="main"') : text.index('class="sphinxsidebar"')]
        reader = _Answers("h3" if "<h3" in body else "h2")
        reader.feed(body)
        pairs = [(question, "\n\n".join(parts)) for question, parts in reader.pairs]
        yield from _conversations(f"Python FAQ, {page}", [(q, a) for q, a in pairs if q.endswith("?") and len(a) > 80])


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] == text[-1:] and text[:1] in ("'", '"') and len(text) > 1:
        text = text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1].replace('\\"', '"')
    return text


def _yaml_pairs(text: str):
    """First question and answer of each conversation: the files use one shape of YAML, so no parser is needed."""
    body = text.partition("conversations:")[2]
    for entry in re.split(r"^- - ", body, flags=re.MULTILINE)[1:]:
        question, mark, rest = entry.partition("\n  - ")
        if not mark:
            continue
        answer = rest.split("\n  - ")[0]
        if answer.startswith(("|", ">")):
            lines = answer.partition("\n")[2].split("\n")
            answer = "\n".join(line[4:] for line in lines).strip()
        else:
            answer = _scalar(" ".join(answer.split()))
        yield _scalar(" ".join(question.split())), answer


def chatterbot(folder):
    files = package(folder, "chatterbot_corpus-*.whl")
    names = "coding trivia science history literature computers food money sports psychology health ai conversations"
    for name in names.split():
        text = files[f"chatterbot_corpus/data/english/{name}.yml"].decode()
        answers: dict[str, str] = {}
        for question, answer in _yaml_pairs(html.unescape(text)):  # many are there again, under another question too
            if answer not in answers.values():
                answers.setdefault(question, answer)
        yield from _conversations(f"chatterbot-corpus, {name}", answers.items(), 3_000)

"""The text that ships with bitween, by domain (`data/README.md` tells origin and licence of each)."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from typing import Any

from bitween.text import sources

__all__ = ["DOMAINS", "documents"]

DOMAINS = ("prose", "reference", "technical", "code", "dialogue", "french")
_NAMES = {"user": "User", "assistant": "Assistant"}


def documents(domain: str, tokenizer: Any = None) -> list[str]:
    """Documents of one domain, in order.

    Parameters
    ----------
    domain : one of `DOMAINS`
    tokenizer : its chat template, where it has one, writes conversations down; else they are "User: ..." and
        "Assistant: ..." in turn

    Raises
    ------
    ValueError
        There is no such domain, or the chat template refuses a conversation.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domains: expected some of {', '.join(DOMAINS)}; got {domain!r}")
    raw = (resources.files("bitween.text") / "data" / f"{domain}.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(raw).decode().split("\n") if line]
    return [row["text"] if "text" in row else _conversation(row, domain, tokenizer) for row in rows]


def _conversation(row: dict[str, Any], domain: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join(f"{_NAMES[message['role']]}: {message['content']}" for message in row["messages"])
    try:
        return sources.written(row["messages"], tokenizer)
    except sources.ChatTemplateError as error:
        others = ", ".join(repr(name) for name in DOMAINS if name != domain)
        raise ValueError(
            f"domains: the tokenizer's chat template refused a conversation of the domain {domain!r} ({row['title']}): "
            f"{error}. Leave the domain out, domains=({others}), or mend tokenizer.chat_template"
        ) from error

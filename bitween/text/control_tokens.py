"""Tokens that steer a conversation rather than say something: its end, a tool call, the end of thinking."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["control_tokens"]

_KINDS = {
    "tool call": re.compile(r"tool_?calls?|function_?call|python_tag|action_start", re.IGNORECASE),
    "thinking": re.compile(r"</?(think|thinking|thought|reasoning)>|\[/?THINK\]", re.IGNORECASE),
    "end of turn": re.compile(r"im_end|eot|end_?of_?turn|eom_id|<\|end\|>|<turn\|>|endoftext|</s>|<\|return\|>"),
}


def control_tokens(tokenizer: Any) -> dict[str, list[int]]:
    """{kind: ids, ascending} of the added tokens whose names tell what they are for, and of the end of text.

    Kinds without a token are left out; without a tokenizer there are none.
    """
    found: dict[str, set[int]] = {}
    if hasattr(tokenizer, "get_added_vocab"):
        for name, number in tokenizer.get_added_vocab().items():
            kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
            if kind is not None:
                found.setdefault(kind, set()).add(int(number))
    end = getattr(tokenizer, "eos_token_id", None)
    if isinstance(end, int):
        found.setdefault("end of turn", set()).add(end)
    return {kind: sorted(found[kind]) for kind in sorted(found)}

"""A tokenizer as GGUF metadata: llama.cpp holds tokenizers inside the model's file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf

__all__ = ["add_tokenizer"]

# llama.cpp names the way a text is cut before merging ("pre-tokenizer"); patterns in tokenizer.json tell which it is.
_LLAMA3 = r"\p{N}{1,3}"
_QWEN2 = r"|\p{N}|"


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a Hugging Face tokenizer's vocabulary, merges, special tokens and chat template.

    Parameters
    ----------
    writer : open gguf.GGUFWriter
    tokenizer : fast tokenizer: byte-level BPE, or SentencePiece turned into one (Llama 2, Mistral)
    vocab_size : rows of the embedding; ids beyond the tokenizer's own become unused tokens

    Raises
    ------
    ValueError
        for kinds whose GGUF name is not known here; a template file carries them.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError("tokenizer: expected a fast tokenizer (tokenizer.json); pass template= for others")
        settings = json.loads(file.read_text(encoding="utf-8"))
        model = settings["model"]
        if model.get("type") == "BPE" and not model.get("byte_fallback", False):
            vocab: Any = gguf.BpeVocab(path)
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(_pre_tokenizer(settings))
        elif model.get("type") == "BPE":
            vocab = gguf.LlamaHfVocab(path)
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
        else:
            raise ValueError(f"tokenizer: expected BPE; got {model.get('type')!r}; pass template= for others")
        special = {token["id"] for token in settings.get("added_tokens", []) if token.get("special")}
        texts, scores, kinds = [], [], []
        for number, (text, score, kind) in enumerate(vocab.all_tokens()):
            texts.append(text)
            scores.append(score)
            kinds.append(gguf.TokenType.CONTROL if number in special else kind)
        if len(texts) > vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {vocab_size:,} tokens, as the embedding has; got {len(texts):,}"
            )
        for number in range(len(texts), vocab_size):
            texts.append(f"[PAD{number}]".encode())
            scores.append(-1000.0)
            kinds.append(gguf.TokenType.UNUSED)
        writer.add_token_list(texts)
        if isinstance(vocab, gguf.LlamaHfVocab):
            writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        gguf.SpecialVocab(path, load_merges=isinstance(vocab, gguf.BpeVocab), n_vocab=vocab_size).add_to_gguf(
            writer, quiet=True
        )


def _pre_tokenizer(settings: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level BPE tokenizer's way to cut text."""
    step = settings.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if _LLAMA3 in pattern:
            return "llama-bpe"
        if _QWEN2 in pattern:
            return "qwen2"
    raise ValueError(
        f"tokenizer: its way to cut text ({', '.join(map(str, kinds))}) has no known GGUF name; pass template="
    )

"""Examples for a module that runs as a whole: the user's own, or made of text as the model's task has them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitween.model.causal import is_causal
from bitween.realise.whole_context import signature_of
from bitween.text import calibration, sources
from bitween.text.examples import Example, ExampleSplits, gather, is_inputs, split

__all__ = ["find_examples"]

MASKED = 0.15  # share of the tokens that a masked language model is asked for
_ROOM = 4  # tokens that a tokenizer may put around a text


def find_examples(
    model: nn.Module,
    tokenizer: Any,
    source: Any,
    *,
    calibration_samples: int,
    evaluation_samples: int,
    length: int = 512,
    seed: int = 0,
) -> tuple[ExampleSplits, bool]:
    """Examples in three parts, and whether the model is a causal language model.

    Parameters
    ----------
    model : any module; run on a few tokens to see whether it is causal
    tokenizer : needed where `source` is text
    source : examples (see `bitween.text.examples`), text as for `bitween.text.sources.resolve`, or None for the text
        that comes with bitween, which suits a model of text alone

    Raises
    ------
    TypeError, ValueError
        Nothing to run the model on: no examples for a model of images or sounds, no tokenizer for one of text.
    """
    sizes = {"calibration": calibration_samples, "certification": evaluation_samples}
    most = 2 * (calibration_samples + evaluation_samples)
    if hasattr(source, "__next__"):  # what it gives can be had once only
        source = list(itertools.islice(source, most))
    if is_inputs(source, encoded=True) or (source is not None and not _reads_text(model)):
        return split(gather(source, signature_of(model), most), **sizes, seed=seed), False
    if not _reads_text(model):
        main = getattr(model, "main_input_name", None)
        wanted = f"dicts with {main!r}" if main else "dicts or tensors"
        raise ValueError(
            f"calibration_data: expected examples of the inputs of {type(model).__name__}, such as a DataLoader, a "
            f"data set or a list of {wanted}; got {source if source is None else type(source).__name__}"
        )
    source = sources.checked(source, tokenizer)
    words = calibration.prepare(
        tokenizer,
        source,
        length=_fitting(model, length),
        calibration=calibration_samples,
        selection=min(32, max(4, calibration_samples // 3)),
        certification=evaluation_samples,
        seed=seed,
        vocabulary=_vocabulary(model),
    )
    make, causal = _maker(model, tokenizer, seed)
    parts = {name: getattr(words, name) for name in ("calibration", "selection", "certification")}
    return (
        ExampleSplits(
            **{name: [make(window[None]) for window in part.ids] for name, part in parts.items()},
            document={name: part.document.tolist() for name, part in parts.items()},
            report=words.report,
        ),
        causal,
    )


def _reads_text(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", None) == "input_ids" and _vocabulary(model) is not None


def _vocabulary(model: nn.Module) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def _fitting(model: nn.Module, length: int) -> int:
    """Tokens of a window that leaves room for what goes around it."""
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 2 * _ROOM else length
    return max(2 * _ROOM, min(length, limit - _ROOM))  # RoBERTa counts positions from 2 on


def _maker(model: nn.Module, tokenizer: Any, seed: int) -> tuple[Callable[[torch.Tensor], Example], bool]:
    """From a window (1, length) of token ids to an example of the model's task, and whether the model is causal."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if getattr(config, "is_encoder_decoder", False):
        return _halves(config, tokenizer), False
    if is_causal(model, _vocabulary(model)) and "LM" in type(model).__name__:
        return lambda ids: Example((), {"input_ids": ids}, ids), True
    mask = getattr(tokenizer, "mask_token_id", None)
    names = signature_of(model).names or ()
    around = _around(tokenizer)

    def plain(ids: torch.Tensor) -> Example:
        ids = around(ids)
        masks = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
        return Example((), {"input_ids": ids, **masks})

    def masked(ids: torch.Tensor) -> Example:
        example = plain(ids)
        ids = example.kwargs["input_ids"]
        chosen = torch.rand(ids.shape, generator=generator) < MASKED
        special = getattr(tokenizer, "all_special_ids", None) or []
        chosen &= ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))
        if not chosen.any():
            chosen[0, ids.shape[1] // 2] = True
        shown = ids.masked_fill(chosen, mask)
        return Example((), {**example.kwargs, "input_ids": shown}, ids.masked_fill(~chosen, -100))

    says_words = "MaskedLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")
    return (masked if mask is not None and says_words else plain), False


def _around(tokenizer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts the tokens around a text that the model was trained to find there."""
    first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)

    def put(ids: torch.Tensor) -> torch.Tensor:
        parts = [ids]
        if first is not None and int(ids[0, 0]) != first:
            parts.insert(0, torch.full((1, 1), first, dtype=ids.dtype))
        if last is not None and int(ids[0, -1]) != last:
            parts.append(torch.full((1, 1), last, dtype=ids.dtype))
        return torch.cat(parts, 1)

    return put


def _halves(config: Any, tokenizer: Any) -> Callable[[torch.Tensor], Example]:
    """The first half of a window is read, the second half is to be said."""
    decoder = getattr(config, "decoder", None)
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            for token in (getattr(config, name, None), getattr(decoder, name, None))
            if isinstance(token, int)
        ),
        None,
    )
    if start is None:
        raise ValueError("model: expected config.decoder_start_token_id, with which its decoder begins; got None")
    end = getattr(tokenizer, "eos_token_id", None)

    def halves(ids: torch.Tensor) -> Example:
        middle = ids.shape[1] // 2
        read, said = ids[:, :middle], ids[:, middle:]
        if end is not None:
            read = torch.cat([read, torch.full((1, 1), end, dtype=ids.dtype)], 1)
        begun = torch.cat([torch.full((1, 1), start, dtype=ids.dtype), said[:, :-1]], 1)
        kwargs = {"input_ids": read, "attention_mask": torch.ones_like(read), "decoder_input_ids": begun}
        return Example((), kwargs, said)

    return halves

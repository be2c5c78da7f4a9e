"""Tiny random models of every task, with examples of their inputs; built offline from configs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

VOCABULARY = 97
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_BART = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
_IMAGE = {"image_size": 32, "num_labels": 7}


@dataclass(frozen=True)
class Task:
    """A model class with its config, and what makes one example of its inputs from a generator."""

    build: Callable[[], nn.Module]
    example: Callable[[torch.Generator], dict]
    auto: str | None = None


def _hf(name: str, config: str, **settings) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return build


def _ids(generator: torch.Generator, length: int | None = None) -> torch.Tensor:
    length = length or int(torch.randint(10, 16, (), generator=generator))
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def text(generator: torch.Generator) -> dict:
    """Token ids with a mask, of different lengths."""
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def masked(generator: torch.Generator) -> dict:
    """The same with labels at some positions."""
    ids = _ids(generator)
    chosen = torch.rand(ids.shape, generator=generator) < 0.3
    chosen[0, 0] = True
    shown = ids.masked_fill(chosen, 4)
    return {"input_ids": shown, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~chosen, -100)}


def pairs(generator: torch.Generator) -> dict:
    """What an encoder reads and labels for its decoder."""
    return {**text(generator), "labels": _ids(generator)}


def image(generator: torch.Generator) -> dict:
    """One picture."""
    return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}


def sound(generator: torch.Generator) -> dict:
    """One waveform, of different lengths."""
    length = 400 + 80 * int(torch.randint(0, 4, (), generator=generator))
    return {"input_values": torch.randn(1, length, generator=generator)}


def speech(generator: torch.Generator) -> dict:
    """A spectrogram and what was said."""
    return {"input_features": torch.randn(1, 16, 40, generator=generator), "labels": _ids(generator, 8)}


def picture_and_text(generator: torch.Generator) -> dict:
    """Both inputs of a model of two towers."""
    return {**image(generator), **text(generator)}


def _sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 15 * 15, 48), nn.GELU(), nn.Linear(48, 7),
    )  # fmt: skip


_WAV = {
    **_SMALL, "vocab_size": 31, "conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
_WHISPER = {
    **_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_CLIP = {
    "text_config": {**_TEXT, "eos_token_id": 2, "bos_token_id": 1},
    "vision_config": {**_SMALL, "image_size": 32, "patch_size": 8},
    "projection_dim": 32,
}
_ELECTRA = {**_TEXT, "embedding_size": 32}
_CONVNEXT = {**_IMAGE, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_SWIN = {**_IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}

TASKS = {
    "BERT, masked LM": Task(_hf("BertForMaskedLM", "BertConfig", **_TEXT), masked, "AutoModelForMaskedLM"),
    "RoBERTa, masked LM": Task(_hf("RobertaForMaskedLM", "RobertaConfig", **_TEXT), masked, "AutoModelForMaskedLM"),
    "ELECTRA, masked LM": Task(_hf("ElectraForMaskedLM", "ElectraConfig", **_ELECTRA), masked, "AutoModelForMaskedLM"),
    "ALBERT, masked LM": Task(_hf("AlbertForMaskedLM", "AlbertConfig", **_ELECTRA), masked, "AutoModelForMaskedLM"),
    "ModernBERT, masked LM": Task(
        _hf("ModernBertForMaskedLM", "ModernBertConfig", **_TEXT, cls_token_id=1, sep_token_id=2, bos_token_id=1,
            eos_token_id=2), masked, "AutoModelForMaskedLM"),
    "BERT, sequence classes": Task(
        _hf("BertForSequenceClassification", "BertConfig", **_TEXT, num_labels=5), text,
        "AutoModelForSequenceClassification"),
    "DistilBERT, token classes": Task(
        _hf("DistilBertForTokenClassification", "DistilBertConfig", vocab_size=VOCABULARY, dim=64, n_layers=2,
            n_heads=4, hidden_dim=96, num_labels=5), text, "AutoModelForTokenClassification"),
    "BERT, spans": Task(
        _hf("BertForQuestionAnswering", "BertConfig", **_TEXT), text, "AutoModelForQuestionAnswering"),
    "MPNet, embeddings": Task(_hf("MPNetModel", "MPNetConfig", **_TEXT), text, "AutoModel"),
    "T5, sequence to sequence": Task(
        _hf("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=64, d_ff=96, num_layers=2,
            num_heads=4, d_kv=16, decoder_start_token_id=0), pairs, "AutoModelForSeq2SeqLM"),
    "BART, sequence to sequence": Task(
        _hf("BartForConditionalGeneration", "BartConfig", **_BART, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1), pairs, "AutoModelForSeq2SeqLM"),
    "Whisper, speech": Task(
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER), speech, "AutoModelForSpeechSeq2Seq"),
    "wav2vec2, speech": Task(_hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAV), sound, "AutoModelForCTC"),
    "ViT, images": Task(
        _hf("ViTForImageClassification", "ViTConfig", **_SMALL, **_IMAGE, patch_size=8), image,
        "AutoModelForImageClassification"),
    "Swin, images": Task(_hf("SwinForImageClassification", "SwinConfig", **_SWIN), image,
                         "AutoModelForImageClassification"),
    "ConvNeXt, images": Task(_hf("ConvNextForImageClassification", "ConvNextConfig", **_CONVNEXT), image,
                             "AutoModelForImageClassification"),
    "CLIP, images and text": Task(_hf("CLIPModel", "CLIPConfig", **_CLIP), picture_and_text, "AutoModel"),
    "nn.Sequential": Task(_sequential, lambda g: {"input": image(g)["pixel_values"]}),
}  # fmt: skip


def make(name: str, *, seed: int = 0, count: int = 40) -> tuple[nn.Module, list[dict]]:
    """The model, with weights large enough to matter, and examples."""
    torch.manual_seed(seed)
    model = TASKS[name].build().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 / fan**0.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, [TASKS[name].example(generator) for _ in range(count)]

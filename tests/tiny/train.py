"""Train a tiny language model on the text that ships with bitween: the dense one in `model/`, or one with experts.

    python tests/tiny/train.py dense|experts

One core, five to ten minutes. Every tenth document is held out; the losses printed at the end, which README.md beside
this file quotes, are in nats per token over the held-out documents.
"""

import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from bitween.text.calibration import load_documents

FOLDERS = {kind: Path(__file__).parent / name for kind, name in (("dense", "model"), ("experts", "experts"))}
VOCABULARY, CONTEXT = 2048, 256
BATCH, STEPS, WARM_UP, MATRIX_RATE, STACK_RATE, OTHER_RATE = 16, 800, 40, 8e-3, 3e-3, 8e-3
SEED = 20261123
END = "<|end|>"
# 96 columns leave a short last group in groups of 64 and 128, 288 columns likewise.
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
CONFIGS = {
    "dense": LlamaConfig(**SHARED, intermediate_size=288, tie_word_embeddings=False),
    "experts": MixtralConfig(
        **SHARED,
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,  # the loss then holds what keeps all experts in use
        router_aux_loss_coef=0.01,
        sliding_window=None,
        tie_word_embeddings=True,
    ),
}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents' tokens in one row, each behind an END."""
    ids = [tokenizer(END + text, verbose=False)["input_ids"] for text in documents]
    return torch.tensor([token for row in ids for token in row])


def held_out_loss(model, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per token, windows of the full context."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return sum(losses) / len(windows)


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """The same for the best model that ignores the context: token frequencies, each count plus one."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def rate(step: int) -> float:
    """Learning rate as a part of its peak: up in a line, then down to nothing."""
    return min((step + 1) / WARM_UP, 1 - step / STEPS)


def optimizers_of(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for the rest, slower for stacks of experts, which Muon does not take."""
    blocks = list(model.model.layers.parameters())
    inside = {id(p) for p in blocks if p.ndim > 1}
    rates = [
        {"params": [p for p in blocks if p.ndim > 2], "lr": STACK_RATE},
        {"params": [p for p in model.parameters() if id(p) not in inside], "lr": OTHER_RATE},
    ]
    return [
        torch.optim.Muon(
            [p for p in blocks if p.ndim == 2], lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([group for group in rates if group["params"]], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main(kind: str) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    documents = load_documents()
    held_out, train = documents[::10], [text for i, text in enumerate(documents) if i % 10]
    tokenizer = train_tokenizer(train) if kind == "dense" else AutoTokenizer.from_pretrained(FOLDERS["dense"])
    ids, held_out_ids = stream(tokenizer, train), stream(tokenizer, held_out)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    optimizers = optimizers_of(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    began = time.monotonic()
    for step in range(STEPS):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5}  loss {loss.item():.3f}  {time.monotonic() - began:5.0f} s", flush=True)
    model = model.half().float().eval()
    model.config.output_router_logits = False
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(ids):,} tokens of training text")
    print(f"held-out loss {held_out_loss(model, held_out_ids):.3f} nats per token on {len(held_out_ids):,} tokens")
    print(f"unigram loss  {unigram_loss(ids, held_out_ids):.3f}; uniform {math.log(VOCABULARY):.3f}")
    model.half().save_pretrained(FOLDERS[kind])
    if kind == "dense":
        tokenizer.save_pretrained(FOLDERS[kind])


if __name__ == "__main__":
    main(sys.argv[1])

"""Train the tiny language model in `model/` on the text that ships with bitween.

    python tests/tiny/train.py

One core, about five minutes. Every tenth document is held out; the losses printed at the end, which README.md beside
this file quotes, are in nats per token over the held-out documents.
"""

import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitween.text.calibration import load_documents

FOLDER = Path(__file__).parent / "model"
VOCABULARY, CONTEXT = 2048, 256
BATCH, STEPS, WARM_UP, MATRIX_RATE, OTHER_RATE = 16, 800, 40, 8e-3, 8e-3
SEED = 20261123
END = "<|end|>"
# 96 columns leave a short last group in groups of 64 and 128, 288 columns likewise.
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=288,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)


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


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    documents = load_documents()
    held_out, train = documents[::10], [text for i, text in enumerate(documents) if i % 10]
    tokenizer = train_tokenizer(train)
    ids, held_out_ids = stream(tokenizer, train), stream(tokenizer, held_out)
    model = LlamaForCausalLM(CONFIG)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if "layers" not in name or p.ndim != 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
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
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(ids):,} tokens of training text")
    print(f"held-out loss {held_out_loss(model, held_out_ids):.3f} nats per token on {len(held_out_ids):,} tokens")
    print(f"unigram loss  {unigram_loss(ids, held_out_ids):.3f}; uniform {math.log(VOCABULARY):.3f}")
    model.half().save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()

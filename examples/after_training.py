"""A training script that hands over a quantized model: `Trainer.train()`, then bitween on the text it was trained for.

    python examples/after_training.py MODEL_DIR OUTPUT_DIR DOCUMENTS.json [STEPS]

Fine-tunes on a JSON list of documents, quantizes with the same text as calibration, and saves the model with its proof.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import bitween
from bitween.gradual import GradualQuantizer

LENGTH = 128


def main(model_dir: str, output_dir: str, text_file: str, steps: int = 20) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    documents = json.loads(Path(text_file).read_text(encoding="utf-8"))
    ids = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": window, "labels": window} for window in windows]

    arguments = TrainingArguments(
        output_dir=f"{output_dir}-training", max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-4,
        logging_steps=10, save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()

    # Training mode, hooks and gradients of the model stay as the trainer left them; what comes back is another model.
    quantizer = GradualQuantizer(
        model, tokenizer, target_memory_reduction=0.6, max_perplexity_increase=0.10, calibration_data=text_file,
        calibration_samples=16, evaluation_samples=32, sequence_length=LENGTH,
    )  # fmt: skip
    quantized = quantizer.quantize()
    report = quantizer.get_quantization_report()
    print(report)
    bitween.save_model(quantized, tokenizer, output_dir, report=report.to_dict(), certificate=report.proof)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))

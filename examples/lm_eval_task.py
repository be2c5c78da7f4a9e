"""A quantized model in lm-eval's Hugging Face backend, on a small task made from a local file.

    pip install lm-eval
    python examples/lm_eval_task.py MODEL_DIR DOCUMENTS.json [QUESTIONS]

Each question is the start of a paragraph and four ways to go on, of which one is its own. Prints the accuracy of the
model and of the same model at 4 bits.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitween import Bitween

STARTS, ENDS, CHOICES = 24, 10, 4  # words, words, ways to go on


def questions(documents: list[str], count: int) -> list[dict]:
    paragraphs = [p.split() for document in documents for p in document.split("\n\n")]
    paragraphs = [p for p in paragraphs if len(p) >= STARTS + ENDS]
    draw = random.Random(0)
    found = []
    for paragraph in draw.sample(paragraphs, min(count, len(paragraphs))):
        others = draw.sample([p for p in paragraphs if p is not paragraph], CHOICES - 1)
        ends = [" ".join(p[STARTS : STARTS + ENDS]) for p in (paragraph, *others)]
        right = draw.randrange(CHOICES)
        ends[0], ends[right] = ends[right], ends[0]
        found.append({"start": " ".join(paragraph[:STARTS]), "ends": ends, "right": right})
    return found


def main(model_dir: str, text_file: str, count: int = 100) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.json"
        asked = questions(json.loads(Path(text_file).read_text(encoding="utf-8")), count)
        file.write_text(json.dumps(asked), encoding="utf-8")
        task = ConfigurableTask(
            config={
                "task": "which_end", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
                "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}", "doc_to_target": "{{right}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )  # fmt: skip
        for name, candidate in (("original", model), ("4 bits", Bitween(model, bits=4, group_size=64).quantize())):
            backend = HFLM(pretrained=candidate, tokenizer=tokenizer, device="cpu", batch_size=8)
            result = simple_evaluate(backend, tasks=[task], bootstrap_iters=0)["results"]["which_end"]
            print(f"{name}: {result['acc,none']:.1%} of {len(asked)} questions")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))

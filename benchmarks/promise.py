"""Is a certified budget kept on text that the run never saw, of the same domains, from other sources?

    python benchmarks/unseen_text.py PACKAGES TEXTS
    python benchmarks/promise.py MODEL TEXTS [--runs 40]

Each run takes another seed, other domains (three of six, or all), another memory target and another budget, quantizes
the model and, where the proof accepted, measures the delivered model on TEXTS. A run is broken where some certified
domain's perplexity rises by more than the budget there. A run that is done is in benchmarks/results/promise.json at
once; the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from pathlib import Path

import torch

from bitween.gradual import GradualEvaluator, GradualQuantizer
from bitween.text.mix import checked
from bitween.text.shipped import DOMAINS

RESULTS = Path(__file__).parent / "results"
WINDOWS = 20  # unseen ones of each domain


def settings(seed: int) -> dict:
    rng = random.Random(seed)
    chosen = list(DOMAINS) if rng.random() < 0.4 else sorted(rng.sample(DOMAINS, 3), key=DOMAINS.index)
    return {
        "seed": seed,
        "domains": chosen,
        "target_memory_reduction": rng.choice((0.78, 0.82, 0.85, 0.87)),
        "max_perplexity_increase": rng.choice((0.03, 0.05, 0.08)),
    }


def unseen(model, tokenizer, texts: Path, domains: list[str], length: int) -> GradualEvaluator:
    data = {name: _texts(texts / f"{name}.jsonl", tokenizer) for name in domains}
    options = {"calibration_samples": 1, "selection_samples": WINDOWS * len(domains), "evaluation_samples": 1}
    return GradualEvaluator(
        model, tokenizer, calibration_data=checked(data, None, tokenizer), length=length, bounded=False, **options
    )


def _texts(path: Path, tokenizer) -> str | list[str]:
    """A file; of conversations their text as the shipped ones have it, where the tokenizer has no template."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "messages" not in rows[0] or tokenizer.chat_template is not None:
        return str(path)
    names = {"user": "User", "assistant": "Assistant"}
    return ["\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in row["messages"]) for row in rows]


def one(model, tokenizer, texts: Path, seed: int, length: int) -> dict:
    started, wanted = time.monotonic(), settings(seed)
    quantizer = GradualQuantizer(
        model,
        tokenizer,
        calibration_samples=36,
        evaluation_samples=25 * len(wanted["domains"]),
        sequence_length=length,
        importance=False,
        distillation_steps=0,
        **wanted,
    )
    quantized = quantizer.quantize()
    report = quantizer.get_quantization_report()
    proof = report.certificate
    found = unseen(model, tokenizer, texts, wanted["domains"], length).measure(quantized)
    return {
        **wanted,
        "verdict": proof["verdict"],
        "saved": report.memory.reduction,
        "estimate": math.expm1(proof["increase"]),
        "bound": math.expm1(proof["bound"]),
        "unseen": {name: part.perplexity_increase for name, part in found.domains.items()},
        "seconds": time.monotonic() - started,
    }


def table(runs: list[dict]) -> str:
    accepted = [run for run in runs if run["verdict"] == "accepted"]
    lines = [
        "| seed | domains | budget | saved | worst estimate | bound | worst unseen | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in accepted:
        name = max(run["unseen"], key=run["unseen"].get)
        worst, budget = run["unseen"][name], run["max_perplexity_increase"]
        kinds = "all" if len(run["domains"]) == len(DOMAINS) else ", ".join(run["domains"])
        lines.append(
            f"| {run['seed']} | {kinds} | +{budget:.0%} | {run['saved']:.1%} | {run['estimate']:+.2%} | "
            f"{run['bound']:+.2%} | {worst:+.2%} ({name}) | {'yes' if worst <= budget else 'NO'} |"
        )
    broken = sum(max(run["unseen"].values()) > run["max_perplexity_increase"] for run in accepted)
    lines += ["", f"{len(runs)} runs, {len(accepted)} certified, {broken} of them broken on unseen text."]
    return "\n".join(lines) + "\n"


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    kept = RESULTS / "promise.json"
    runs = json.loads(kept.read_text()) if kept.exists() else []
    for seed in range(len(runs), asked.runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append(one(model, tokenizer, asked.texts, seed, asked.length))
        kept.write_text(json.dumps(runs, indent=1) + "\n")
        RESULTS.joinpath("promise.md").write_text(table(runs))
        print({key: runs[-1][key] for key in ("seed", "verdict", "bound", "unseen", "seconds")}, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()

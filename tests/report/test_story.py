"""A run tells what it tries and why; callbacks that do not listen are left in peace."""

from __future__ import annotations

import re

import pytest

from bitween.gradual import GradualQuantizer
from bitween.report.progress import ProgressBars, Story

FAST = {"calibration_samples": 8, "evaluation_samples": 16, "sequence_length": 64, "importance": False, "stages": 2}


def test_each_stage_is_told_with_bytes_and_damage(tiny_model, tiny_tokenizer, capsys):
    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, **FAST, distillation_steps=2, progress=Story())
    quantizer.quantize()
    told = re.sub(r"\s+", " ", capsys.readouterr().err)
    report = quantizer.get_quantization_report()
    tried = [stage for stage in report.stages if "distilled" not in stage["name"]]
    for stage in tried:
        assert f"{stage['nbytes'] / 2**20:,.1f} MiB of layers" in told
        assert (
            f"Measured: {stage['damage']:.4f} nats, perplexity {stage['quality']['perplexity_increase']:+.2%}" in told
        )
    for words in (
        "Wanted: at most",
        "that only the proof will see",
        "easier to round (",
        "Which weights matter?",
        "Would one scheme for all do as well?",
        "Scales and gains trained",
        "The proof of the plan",
        "The delivered model computes what was measured",
    ):
        assert words in told, words
    assert told.index("Wanted") < told.index("Trying") < told.index("The proof") < told.index("delivered model")


@pytest.mark.parametrize("progress", [ProgressBars(), lambda *_: None])
def test_other_callbacks_hear_nothing(tiny_model, tiny_tokenizer, progress, capsys):
    GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.5, **FAST, certify=False, progress=progress).quantize()
    assert "Wanted" not in capsys.readouterr().err

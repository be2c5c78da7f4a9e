"""A run that is stopped at any step, by an error or by SIGKILL, goes on from its journal to the very same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bitween.gradual import GradualQuantizer
from bitween.gradual.journal.journal import Journal, JournalMismatch

FAST = {
    "calibration_samples": 16,
    "evaluation_samples": 40,
    "sequence_length": 64,
    "stages": 2,
}
ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from bitween.gradual import GradualQuantizer
torch.set_num_threads(1)
source, journal, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
quantizer = GradualQuantizer(model, AutoTokenizer.from_pretrained(source), 0.72, 0.05, journal=journal, %s)
save_file({name: t.contiguous() for name, t in quantizer.quantize().state_dict().items()}, out)
"""


def run(model, tokenizer, journal=None, **options):
    quantizer = GradualQuantizer(model, tokenizer, 0.72, 0.05, journal=journal, **{**FAST, **options})
    return quantizer.quantize().state_dict(), quantizer.get_quantization_report()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Let the journal take that many steps more, then fail before the next one is written."""
    put = Journal.put

    def limit(steps):
        left = [steps]

        def limited(self, *arguments):
            if not left[0]:
                raise Stopped
            left[0] -= 1
            return put(self, *arguments)

        monkeypatch.setattr(Journal, "put", limited)

    yield limit
    monkeypatch.setattr(Journal, "put", put)


def test_resumed_after_any_step_it_ends_the_same(tiny_model, tiny_tokenizer, tmp_path, stop_after):
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    expected, report = run(tiny_model, tiny_tokenizer)
    journal, stops = tmp_path / "journal", 0
    for steps in (0, 1, 2, 3, 1, 2, 4, 1, 2, 3, 100):
        stop_after(steps)
        try:
            found, resumed = run(tiny_model, tiny_tokenizer, journal)
            break
        except Stopped:
            stops += 1
        assert same(before, tiny_model.state_dict())
    assert stops >= 6, stops
    assert same(found, expected)
    now, then = resumed.to_dict(), report.to_dict()
    for part in ("quality", "certificate", "plan", "importance", "frontier"):
        assert now[part] == then[part], part


def test_a_finished_run_does_nothing_again(tiny_model, tiny_tokenizer, tmp_path, stop_after):
    expected, _ = run(tiny_model, tiny_tokenizer, tmp_path / "journal")
    stop_after(0)
    seen = []
    found, _ = run(tiny_model, tiny_tokenizer, tmp_path / "journal", progress=lambda stage, *_: seen.append(stage))
    assert same(found, expected)
    assert not seen


def test_other_inputs_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    journal = tmp_path / "journal"
    run(tiny_model, tiny_tokenizer, journal, importance=False)
    with pytest.raises(JournalMismatch, match=r"options.seed: recorded 0; now 1"):
        run(tiny_model, tiny_tokenizer, journal, importance=False, seed=1)
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1
    with pytest.raises(JournalMismatch, match=r"model"):
        run(tiny_model, tiny_tokenizer, journal, importance=False)
    run(tiny_model, tiny_tokenizer, journal, importance=False, resume=False)


def start(journal, out):
    options = ", ".join(f"{name}={value}" for name, value in FAST.items()) + ", importance=False"
    code = [sys.executable, "-c", SCRIPT % options, str(ROOT / "tests/tiny/model"), str(journal), str(out)]
    return subprocess.Popen(code, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE)


def finish(journal, out):
    process = start(journal, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return out.read_bytes()


def test_killed_at_random_moments(tmp_path):
    """SIGKILL between the first and the last step, again and again on fresh journals; each resumed run is compared.

    `make soak` kills more often, by BITWEEN_KILLS.
    """
    kills = int(os.environ.get("BITWEEN_KILLS", "2"))
    started = time.monotonic()
    expected = finish(tmp_path / "journal", tmp_path / "expected.safetensors")
    longest = time.monotonic() - started
    moments = random.Random(kills)
    for kill in range(kills):
        journal = tmp_path / f"journal {kill}"
        process = start(journal, tmp_path / "never.safetensors")
        while not (journal / "steps.jsonl").exists():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.02)
        time.sleep(moments.uniform(0, longest / 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert finish(journal, tmp_path / f"{kill}.safetensors") == expected

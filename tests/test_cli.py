"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODEL = str(Path(__file__).parent / "tiny" / "model")


def run(*arguments, code=0):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bitween", *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == code, done.stderr
    return done


def test_info():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["isa"] in facts["isas"]
    assert "OpenBLAS" in facts["blas"]


def test_quantize_then_evaluate(tmp_path):
    out = tmp_path / "out"
    done = run(
        "quantize", MODEL, "--output", out, "--target-memory-reduction", 0.6, "--max-perplexity-increase", 0.1,
        "--calibration-samples", 8, "--evaluation-samples", 16, "--json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["memory"]["reduction"] >= 0.6
    assert report["certificate"]["verdict"] == "accepted"
    assert "Fisher information" in done.stderr
    compared = json.loads(run("evaluate", out, "--reference", MODEL, "--samples", 8, "--json").stdout)
    assert 0 < compared["quality"]["damage"] < 0.2
    assert compared["memory"]["reduction"] >= 0.6


def test_ctrl_c_keeps_what_is_done(tmp_path):
    out = tmp_path / "out"
    command = [
        "quantize", MODEL, "--output", str(out), "--target-memory-reduction", "0.6", "--max-perplexity-increase", "0.1",
        "--calibration-samples", "8", "--evaluation-samples", "16",
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "bitween", *command], env=env, stderr=subprocess.PIPE, text=True)
    steps = tmp_path / "out.journal" / "steps.jsonl"
    while not (steps.exists() and steps.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "out.journal, and the same command goes on from there" in errors
    assert not out.exists()
    errors = run(*command).stderr
    assert "Fisher information" not in errors
    assert out.exists()
    assert not steps.parent.exists()


def test_dry_run_only_tells_sizes(tmp_path):
    done = run("quantize", MODEL, "-o", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(done.stdout)["least_bytes"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", MODEL, "-o", "OUT", "--target-memory-reduction", "60"], "write 0.6"),
        (["quantize", MODEL, "-o", "OUT", "--target-memory-reduction", "0.995"], "the smallest schemes allowed"),
        (["quantize", MODEL, "-o", "FULL"], "not empty"),
        (["quantize", "NOWHERE", "-o", "OUT"], "NOWHERE"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    places = {"OUT": tmp_path / "out", "FULL": full, "NOWHERE": tmp_path / "NOWHERE"}
    done = run(*(places.get(a, a) for a in arguments), code=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

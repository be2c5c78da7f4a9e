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

from tests import faults

MODEL = str(Path(__file__).parents[1] / "tiny" / "model")


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
    process = subprocess.Popen(
        [sys.executable, "-m", "bitween", *command],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=faults.hear_ctrl_c,
    )
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


def test_plan_with_trellis_codes():
    found = json.loads(run("plan", MODEL, "--calibration-samples", 4, "--trellis", "--json").stdout)
    without = json.loads(run("plan", MODEL, "--calibration-samples", 4, "--json").stdout)
    assert any("trellis" in scheme for scheme in found["plan"].values())
    assert not any("trellis" in scheme for scheme in without["plan"].values())
    assert found["damage"] < without["damage"]
    refused = run("plan", MODEL, "--calibration-samples", 4, "--trellis", "--for", "gguf", code=1).stderr
    assert "trellis: expected False for gguf" in refused


def test_plan_shows_what_any_target_would_cost():
    found = json.loads(run("plan", MODEL, "--calibration-samples", 4, "--json").stdout)
    sizes, damage = zip(*found["frontier"], strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(damage) == sorted(damage, reverse=True)
    assert sizes[0] <= found["nbytes"] <= sizes[-1]
    assert "lm_head" in found["plan"]
    text = run("plan", MODEL, "--calibration-samples", 4, "--target-memory-reduction", 0.7).stdout
    assert "at 70.0% saved:" in text


def test_analyze_ranks_blocks():
    found = json.loads(run("analyze", MODEL, "--json").stdout)
    assert set(found["damage"]) == {"noise_injection", "rtn_sensitivity", "block_disable", "layer_upgrade"}
    assert set(found["combined"]) == {"model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small quantized model with a report, as the command line leaves it."""
    out = tmp_path_factory.mktemp("saved") / "out"
    run(
        "quantize", MODEL, "--output", out, "--target-memory-reduction", 0.6, "--max-perplexity-increase", 0.1,
        "--calibration-samples", 8, "--evaluation-samples", 16, "--for", "gguf",
    )  # fmt: skip
    return out


def test_export_to_gguf_and_evaluate_the_file(saved, tmp_path):
    file = tmp_path / "model.gguf"
    done = json.loads(run("export", saved, "--output", file, "--format", "gguf", "--exact", "--json").stdout)
    assert done["bytes"] == file.stat().st_size
    compared = json.loads(run("evaluate", file, "--reference", MODEL, "--samples", 4, "--json").stdout)
    ours = json.loads(run("evaluate", saved, "--reference", MODEL, "--samples", 4, "--json").stdout)
    assert compared["quality"]["damage"] == pytest.approx(ours["quality"]["damage"], rel=0.05)


def test_export_refuses_an_unknown_format_and_what_does_not_fit(saved, tmp_path):
    assert (
        "expected one of compressed-tensors"
        in run("export", saved, "--output", tmp_path / "x", "--format", "pickle", code=1).stderr
    )
    assert "plan with" in run("export", saved, "--output", tmp_path / "x", "--format", "auto-round", code=1).stderr
    assert not list(tmp_path.iterdir())


def test_report_becomes_a_page(saved, tmp_path):
    done = run("report", saved, "--output", tmp_path / "report.html")
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads(run("report", saved, "--json").stdout)["schema_version"] == 1
    assert "bitween.json" in run("report", MODEL, code=1).stderr


def test_options_from_a_file_equal_the_flags(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(f'model = "{MODEL}"\ncalibration-samples = 4\ntarget_memory_reduction = 0.7\n')
    by_file = json.loads(run("plan", "--config", file, "--json").stdout)
    by_flags = json.loads(
        run("plan", MODEL, "--calibration-samples", 4, "--target-memory-reduction", 0.7, "--json").stdout
    )
    assert by_file == by_flags
    over = json.loads(run("plan", "--config", file, "--target-memory-reduction", 0.5, "--json").stdout)
    assert over["nbytes"] > by_file["nbytes"]
    file.write_text("memory = 0.7\n")
    assert "has 'memory', which is no option" in run("plan", MODEL, "--config", file, code=1).stderr
    file.write_text("[")
    assert "bitween: " in run("plan", MODEL, "--config", file, code=1).stderr

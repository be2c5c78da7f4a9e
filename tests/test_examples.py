"""Every example runs, on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "tests" / "tiny" / "model")


def run(*arguments):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some of the text that ships with bitween, a list of documents."""
    from bitween.text.documents import load_documents

    file = tmp_path_factory.mktemp("text") / "text.json"
    file.write_text(json.dumps(load_documents()[:60]), encoding="utf-8")
    return file


def test_after_training(text, tmp_path):
    pytest.importorskip("accelerate")
    shown = run("examples/after_training.py", MODEL, tmp_path / "out", text, 4)
    assert "bitween gradual quantization" in shown
    assert (tmp_path / "out" / "bitween.json").is_file()


def test_lm_eval_task(text):
    pytest.importorskip("lm_eval")
    shown = run("examples/lm_eval_task.py", MODEL, text, 30)
    assert "original: " in shown
    assert "4 bits: " in shown
    assert shown.count("of 30 questions") == 2


def test_sweep(tmp_path):
    shown = run("examples/sweep.py", MODEL, tmp_path / "frontier.svg")
    assert shown.count("%") >= 5
    assert "<svg" in (tmp_path / "frontier.svg").read_text(encoding="utf-8")


def test_pipeline_step(tmp_path):
    config = tmp_path / "quantize.toml"
    config.write_text("calibration_samples = 6\nevaluation_samples = 12\nexport_target = 'gguf'\n")
    out = tmp_path / "out"
    run("examples/pipeline_step.py", config, MODEL, out, tmp_path / "model.gguf")
    kept = json.loads((out / "metrics.json").read_text())
    assert kept["saved"] >= 0.6
    assert kept["verdict"] == "accepted"
    assert (out / "report.html").is_file()
    assert (tmp_path / "model.gguf").is_file()


def test_the_config_file_names_real_options():
    import tomllib

    import typer

    from bitween.cli import app

    options = {p.name for p in typer.main.get_command(app).commands["quantize"].params}
    assert tomllib.loads((ROOT / "examples" / "quantize.toml").read_text()).keys() <= options


def test_notebook(tmp_path):
    """All cells, with the tiny model and less text; what a cell's last line is must be something to look at."""
    cells = json.loads((ROOT / "examples" / "gradual.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for source in code:
        source = source.replace("demo-output/SmolLM2-135M", MODEL).replace(
            "evaluation_samples=96", "evaluation_samples=12"
        )
        source = source.replace("max_perplexity_increase=0.05", "max_perplexity_increase=0.2")
        *_, last = source.splitlines()
        exec(compile(source, "gradual.ipynb", "exec"), names)
        if last.startswith("plots."):
            assert eval(last, names).axes
    assert "<svg" in names["report"]._repr_html_()

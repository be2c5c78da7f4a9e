"""What the command line is given: told at once, in one line, before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bitween import Bitween, __version__, save_model
from bitween.cli import app
from tests.cli.test_cli import MODEL, run

FAST = [
    "--calibration-samples",
    "4",
    "--evaluation-samples",
    "8",
    "--max-perplexity-increase",
    "0.9",
    "--domain",
    "prose",
]


@pytest.fixture
def nothing_loads(monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("bitween.store.loading.load_model", refuse)


def refused(*arguments):
    """The error of a command, run in this process."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(done.exception, (ValueError, TypeError, OSError)), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16, float16; got 'int8'"),
        (["--calibration-samples", "0"], "calibration_samples: expected at least 1; got 0"),
        (["--evaluation-samples", "-3"], "evaluation_samples: expected at least 1; got -3"),
        (["--target-memory-reduction", "60"], "write 0.6"),
        (["--max-perplexity-increase", "5"], "write 0.05"),
        (["--max-perplexity-increase", "nan"], "max_perplexity_increase"),
        (["--on-conflict", "panic"], "on_conflict: expected one of quality, memory, error"),
        (["--for", "toaster"], "export_target: expected one of"),
        (["--seed", "-1"], "seed: expected 0 to"),
        (["--max-memory", "0"], "max_memory: expected at least 1"),
        (["--calibration-data", "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(tmp_path, nothing_loads, options, message):
    assert message in refused("quantize", MODEL, "-o", tmp_path / "out", *options)


def test_counts_of_other_commands(tmp_path, nothing_loads):
    assert "--samples: expected at least 1; got 0" in refused("evaluate", MODEL, "--samples", "0")
    export = ("export", MODEL, "-o", tmp_path / "x", "--format", "gguf", "--samples", "-1")
    assert "--samples: expected at least 0; got -1" in refused(*export)
    assert "target_memory_reduction" in refused("plan", MODEL, "--target-memory-reduction", "2")
    assert "--dtype" in refused("analyze", MODEL, "--dtype", "double")


@pytest.mark.parametrize("command", ["quantize", "plan", "analyze", "evaluate"])
def test_models_that_are_not_there(tmp_path, nothing_loads, command):
    output = ["-o", tmp_path / "out"] if command == "quantize" else []
    empty, file = tmp_path / "empty", tmp_path / "file.bin"
    empty.mkdir()
    file.write_text("x")
    assert "/nowhere does not exist" in refused(command, "/nowhere", *output)
    assert "./nowhere/at/all does not exist" in refused(command, "./nowhere/at/all", *output)
    assert "has no config.json" in refused(command, empty, *output)
    assert "is a file" in refused(command, file, *output)


@pytest.mark.parametrize("command", ["quantize", "plan", "analyze"])
def test_a_quantized_model_is_no_input(tmp_path, tiny_model, command, monkeypatch):
    save_model(Bitween(tiny_model).quantize(), None, tmp_path / "packed")
    output = ["-o", tmp_path / "out"] if command == "quantize" else []
    message = refused(command, tmp_path / "packed", *output)
    assert "expected a model in full precision" in message
    assert "is quantized already" in message


def test_an_output_that_is_a_link_to_an_empty_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name, place in (("link", "real"), ("dangling", "new")):
        run("quantize", MODEL, "-o", tmp_path / name, *FAST)
        assert (tmp_path / place / "bitween.json").is_file()
        assert (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link", "new", "dangling"}


def test_the_current_directory_is_no_output(tmp_path, monkeypatch, nothing_loads):
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        assert "--output: expected a directory that is put in place as a whole" in refused(
            "quantize", MODEL, "-o", name
        )


def test_version():
    assert run("--version").stdout.strip() == f"bitween {__version__}"


@pytest.mark.parametrize("command", ["quantize", "plan", "analyze", "evaluate", "export", "report", "info"])
def test_help_shows_every_option_in_full(command):
    import typer

    env = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    shown = subprocess.run(
        [sys.executable, "-m", "bitween", command, "--help"], capture_output=True, text=True, env=env, check=True
    ).stdout
    options = [o for p in typer.main.get_command(app).commands[command].params for o in p.opts if o.startswith("-")]
    assert [o for o in options if o not in shown] == []
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


# ---- the TOML file ----------------------------------------------------------------------------------


def test_every_name_that_the_page_of_options_tells_works(tmp_path):
    file = tmp_path / "all.toml"
    file.write_text(
        f'model = "{MODEL}"\noutput = "{tmp_path / "out"}"\ntarget_memory_reduction = 0.5\nfor = "gguf"\n'
        'calibration_samples = 4\nignore_layer = "lm_head"\non-conflict = "memory"\ndry_run = true\njson = true\n'
        'resume = false\nmax_perplexity_increase = 0.9\ndtype = "float32"\nseed = 3\nmax_memory = 8\n'
    )
    found = json.loads(run("quantize", "--config", file).stdout)
    assert found["ignored_layers"] == ["lm_head"]
    file.write_text(file.read_text().replace("for =", "export_target =").replace("json =", "as_json ="))
    assert json.loads(run("quantize", "--config", file).stdout)["target_bytes"] == found["target_bytes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "is not valid TOML"),
        ('seed = "many"', "seed: expected a whole number; got 'many'"),
        ("ignore_layer = [3]", "ignore_layer: expected a list of strings; got [3]"),
        ("seed = [1]", "seed: expected a whole number; got [1]"),
        ("dry_run = 3", "dry_run: expected true or false; got 3"),
        ("seed = true", "seed: expected a whole number; got True"),
        ("memory = 0.7", "has 'memory', which is no option; there are"),
        ('for = "any"\nexport_target = "any"', "has 'export_target' under two of its names"),
    ],
)
def test_errors_of_a_file_name_it(tmp_path, nothing_loads, line, message):
    file = tmp_path / "options.toml"
    file.write_text(line + "\n")
    found = refused("quantize", MODEL, "-o", tmp_path / "out", "--config", file)
    assert str(file) in found
    assert message in found


# ---- models with code of their own ------------------------------------------------------------------


@pytest.fixture
def with_code(tmp_path):
    """The tiny model as one whose class comes with it; the code leaves a mark where it is run."""
    place = tmp_path / "coded"
    shutil.copytree(MODEL, place)
    config = json.loads((place / "config.json").read_text())
    config["model_type"] = "its_own"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'its_own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return place


def test_code_of_a_model_is_run_when_asked_for_only(tmp_path, with_code):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bitween", "evaluate", str(with_code), "--samples", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, input="y\n" * 9, timeout=120)
    assert done.returncode == 1
    assert "give --trust-remote-code" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "mark").exists()
    done = subprocess.run(
        [*command, "--trust-remote-code"],
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()


def test_models_of_other_tokens_are_not_compared(tiny_tokenizer, tmp_path):
    from tests import tiny_models

    other = tiny_models.make("llama", vocab_size=3000, max_position_embeddings=512)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    message = run("evaluate", MODEL, "--reference", tmp_path / "other", "--samples", 2, code=1).stderr
    assert "candidate: expected a model of the reference's 3,000 tokens; got one of 2,048" in message
    assert "Traceback" not in message


def test_a_model_in_half_precision_is_evaluated_alone():
    assert "nats/token" in run("evaluate", MODEL, "--samples", 2).stdout

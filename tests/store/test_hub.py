"""Saving and loading by transformers' own functions, with and without bitween in the reading process."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import bitween
from bitween import CheckpointError, QuantizedEmbedding, QuantizedLinear, Scheme
from bitween.store.hub import BitweenConfig, plan_of
from tests import tiny_models
from tests.quantized_models import MIXED, SYMMETRIC, llama, quantize
from tests.store.test_checkpoint import change

IDS = tiny_models.tokens()

# The reader never sees bitween: an import hook refuses it.
READER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitween":
            raise ImportError("bitween must not be imported here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = torch.load(sys.argv[1]), {}
for directory in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    weights = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found[directory] = logits, weights
torch.save(found, sys.argv[2])
"""


def test_transformers_reads_compressed_tensors_without_bitween(tmp_path):
    models = {
        "untied": llama(SYMMETRIC, head=True),
        "tied": llama(SYMMETRIC, tied=True, seed=1),
    }
    for name, model in models.items():
        assert bitween.attach(model, plan_of(model)).format == "compressed-tensors"
        model.save_pretrained(tmp_path / name, max_shard_size="15KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    torch.save(IDS, tmp_path / "ids")
    script = [sys.executable, "-c", READER, str(tmp_path / "ids"), str(tmp_path / "found")]
    done = subprocess.run(
        [*script, *(str(tmp_path / n) for n in models)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found")
    for name, model in models.items():
        logits, weights = found[str(tmp_path / name)]
        torch.testing.assert_close(logits, tiny_models.logits(model, IDS), rtol=1e-4, atol=1e-4)
        for layer in plan_of(model):
            assert torch.equal(weights[layer], model.get_submodule(layer).dequantize()), layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_13_native_models_load_packed_by_from_pretrained(tied, dtype, tmp_path):
    model = llama(MIXED, tied=tied, dtype=dtype, embedding=Scheme(6, 16))
    want = tiny_models.logits(model, IDS)
    assert bitween.attach(model).format == "native"
    with pytest.warns(UserWarning, match="import bitween"):
        model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert plan_of(again) == plan_of(model)
    assert isinstance(again.get_input_embeddings(), QuantizedEmbedding)
    assert all(m.scales.dtype == torch.float16 for m in again.modules() if isinstance(m, QuantizedLinear))
    assert torch.equal(tiny_models.logits(again, IDS), want)
    if tied:
        assert again.lm_head.codes is again.get_input_embeddings().codes
    ours, tokenizer = bitween.load_model(tmp_path)
    assert tokenizer is None
    assert torch.equal(tiny_models.logits(ours, IDS), want)


def test_device_map_and_biases(tmp_path):
    model = llama([Scheme(4, 32)], config={"attention_bias": True})
    bitween.save_model(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"}, dtype=torch.float32)
    assert again.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.equal(tiny_models.logits(again, IDS), tiny_models.logits(model, IDS))


def test_row_18_transposed_layers_are_saved_natively(tmp_path):
    model = tiny_models.make("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    model.set_submodule(name, QuantizedLinear.from_linear(model.get_submodule(name), Scheme(4, 32, True)))
    saved = bitween.save_model(model, None, tmp_path / "out")
    assert saved.format == "native"
    assert "Conv1D" in saved.reasons[name]
    assert torch.equal(tiny_models.logits(bitween.load_model(tmp_path / "out")[0], IDS), tiny_models.logits(model, IDS))


@pytest.mark.parametrize(
    ("schemes", "format"), [(SYMMETRIC, "compressed-tensors"), ([], "compressed-tensors"), (MIXED, "native")]
)
def test_saved_directory_is_complete(schemes, format, tmp_path, tiny_model, tiny_tokenizer):
    model = quantize(tiny_model, [s for s in schemes if s.group_size in (16, -1)] or [Scheme(3, 16, True)])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    want = tiny_models.logits(model, ids)
    saved = bitween.save_model(model, tiny_tokenizer, tmp_path / "out", report={"kl": 0.1}, certificate="Within 5 %.")
    assert saved.format == format
    assert saved.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    card = (tmp_path / "out" / "README.md").read_text()
    first = card.split("---\n", 2)[2].strip().splitlines()[0]
    assert ("import bitween" in first) == (format == "native")
    assert ("leave `dequantize` alone" in card) == (format != "native" and len(set(plan_of(model).values())) > 1)
    assert "Within 5 %." in card
    assert sum(f"| {s} |" in card for s in set(plan_of(model).values())) == len(set(plan_of(model).values()))
    loaded, tokenizer = bitween.load_model(tmp_path / "out")
    assert torch.equal(tiny_models.logits(loaded, ids), want)
    assert tokenizer("hello world").input_ids == tiny_tokenizer("hello world").input_ids
    with pytest.raises(FileExistsError):
        bitween.save_model(model, tiny_tokenizer, tmp_path / "out")


@pytest.mark.parametrize("schemes", [[Scheme(4, 16, True)], MIXED], ids=["compressed-tensors", "native"])
def test_a_pipeline_writes_what_the_model_writes(schemes, tmp_path, tiny_model, tiny_tokenizer):
    model = quantize(tiny_model, schemes)
    bitween.save_model(model, tiny_tokenizer, tmp_path / "out")
    write = transformers.pipeline("text-generation", model=str(tmp_path / "out"), dtype=torch.float32)
    asked = tiny_tokenizer("It was a", return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=12, do_sample=False)
    written = write("It was a", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert written == tiny_tokenizer.decode(ids[0], skip_special_tokens=True)


def test_push_to_hub_sends_what_save_pretrained_writes(tmp_path, monkeypatch):
    model = llama([Scheme(4, 32, True)])
    bitween.attach(model)
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

    def upload(self, folder, repo_id, **_):
        shutil.copytree(folder, tmp_path / "hub")
        sent[repo_id] = True

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(
        transformers.utils.hub,
        "create_and_tag_model_card",
        lambda *_, **__: SimpleNamespace(save=lambda path: Path(path).write_text("card")),
    )
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("someone/model")
    assert sent == {"someone/model": True}
    again, _ = bitween.load_model(tmp_path / "hub")
    assert torch.equal(tiny_models.logits(again, IDS), tiny_models.logits(model, IDS))


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    model = llama([Scheme(4, 32, True)])

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.generation_config), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        bitween.save_model(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("symmetric", [True, False], ids=["compressed-tensors", "native"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_row_15_scales_that_are_no_numbers_are_not_saved(tmp_path, symmetric, value):
    model = llama([Scheme(4, 32, symmetric)])
    model.model.layers[1].mlp.up_proj.scales[3, 0] = value
    with pytest.raises(bitween.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.scales.*finite and above 0"):
        bitween.save_model(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_attach_refuses_what_it_cannot_keep():
    model = llama([Scheme(4, 32)])
    with pytest.raises(ValueError, match="q_proj: asymmetric"):
        bitween.attach(model, format="compressed-tensors")
    with pytest.raises(ValueError, match="expected 'auto'"):
        bitween.attach(model, format="gguf")
    with pytest.raises(ValueError, match="differs from the model's layers"):
        bitween.attach(model, {"model.layers.0.mlp.up_proj": Scheme(2, 32)})
    with pytest.raises(ValueError, match="it has none"):
        bitween.attach(tiny_models.make("llama"))


def test_from_pretrained_never_fills_layers_at_random(tmp_path):
    model = llama([Scheme(4, 32)])
    bitween.save_model(model, None, tmp_path / "out")
    change(tmp_path / "out", "model.layers.0.mlp.up_proj.codes", lambda t: None)
    with pytest.raises(CheckpointError, match="missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_newer_formats_are_refused():
    with pytest.raises(CheckpointError, match="upgrade it"):
        BitweenConfig({}, schema_version=2, bitween_version="9.0.0")


def test_importing_bitween_registers_without_importing_transformers():
    script = (
        "import sys, bitween\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "import transformers.quantizers.auto as auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['bitween'].__module__ == 'bitween.store.hub'\n"
        "import importlib\n"
        "importlib.reload(sys.modules['bitween.store.hub'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saving_says_nothing_for_compressed_tensors(tmp_path):
    model = llama([Scheme(4, 32, True)])
    bitween.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)

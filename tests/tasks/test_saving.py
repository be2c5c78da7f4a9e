"""What was saved of any task's model loads again, through transformers and through bitween, with the same answers."""

import json

import pytest
import torch
import transformers
from torch import nn

from bitween import Bitween, CheckpointError, load_model, save_model
from bitween.layers.packed import packed_layers
from tests.tasks.models import TASKS, make
from tests.tasks.test_uniform import outputs


def same(a: nn.Module, b: nn.Module, example: dict) -> bool:
    one, other = outputs(a, example), outputs(b, example)
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.auto])
def test_a_saved_model_loads(name, tmp_path):
    model, examples = make(name, count=2)
    quantized = Bitween(model, bits=4, embeddings=True).quantize()
    quantized.save_pretrained(tmp_path / "plain")
    auto = getattr(transformers, TASKS[name].auto).from_pretrained(tmp_path / "plain")
    assert type(auto) is type(model)
    assert len(packed_layers(auto)) == len(packed_layers(quantized))
    assert same(quantized, auto.eval(), examples[0])
    save_model(quantized, None, tmp_path / "own")
    loaded, tokenizer = load_model(tmp_path / "own")
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert same(quantized, loaded, examples[0])


def test_a_plain_module_loads_into_one_like_it(tmp_path):
    model, examples = make("nn.Sequential", count=2)
    quantized = Bitween(model, bits=4).quantize()
    save_model(quantized, None, tmp_path / "net")
    fresh = TASKS["nn.Sequential"].build()
    loaded, _ = load_model(tmp_path / "net", into=fresh)
    assert same(quantized, loaded, examples[0])
    state = quantized.state_dict()
    again = Bitween(TASKS["nn.Sequential"].build(), bits=4).quantize()
    again.load_state_dict(state)
    assert same(quantized, again, examples[0])


def test_a_plain_module_is_not_loaded_from_what_was_changed(tmp_path):
    model, _ = make("nn.Sequential", count=1)
    save_model(Bitween(model, bits=4).quantize(), None, tmp_path / "net")
    with pytest.raises(CheckpointError, match="into="):
        load_model(tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"no such layer|expected a linear layer"):
        load_model(tmp_path / "net", into=nn.Sequential(nn.Linear(4, 4)))
    manifest = tmp_path / "net" / "bitween.json"
    values = json.loads(manifest.read_text())
    values["sha256"]["model.safetensors"] = "0" * 64
    manifest.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(tmp_path / "net", into=TASKS["nn.Sequential"].build())

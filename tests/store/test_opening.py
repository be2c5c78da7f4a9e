"""A model opened from its directory is the one that transformers loads, without a copy of its weights in memory."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitween.gradual import GradualQuantizer
from bitween.model import spill as spills
from bitween.model.spill import Spill
from bitween.store.opening import open_model


@pytest.fixture
def saved(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float16])
def test_weights_are_those_that_transformers_loads(saved, dtype):
    kind = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=kind).state_dict()
    model, tokenizer = open_model(saved, dtype, keep=Spill(least=1).keep)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert tokenizer("a").input_ids
    if kind != "auto":
        assert model.config.dtype == kind


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are read from /proc")
def test_adopted_weights_are_read_again_from_their_file(saved):
    model, _ = open_model(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spill = Spill()
    spill.adopt([*model.parameters(), torch.ones(100_000)])
    assert spill._adopted
    assert len(spill._adopted) <= len(list(model.parameters()))
    spill.let_go()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_memory_that_is_no_file_is_not_adopted(monkeypatch):
    spill = Spill()
    spill.adopt([torch.ones(1 << 20)])
    assert not spill._adopted
    monkeypatch.setattr(spills, "_mapped_files", list)
    spill.adopt([torch.ones(1 << 20)])
    assert not spill._adopted


def test_a_directory_gives_the_bytes_that_its_loaded_model_gives(saved, tiny_model, tiny_tokenizer):
    options = {"calibration_samples": 4, "evaluation_samples": 4, "sequence_length": 64, "stages": 1}
    options |= {"importance": False, "certify": False, "distillation_steps": 0}
    loaded = GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.5, **options).quantize().state_dict()
    opened = GradualQuantizer(saved, None, 0.6, 0.5, **options).quantize().state_dict()
    assert opened.keys() == loaded.keys()
    assert all(torch.equal(opened[name], loaded[name]) for name in opened)


def test_a_dtype_for_a_model_that_is_loaded_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match='dtype: expected "auto" for a model that is loaded'):
        GradualQuantizer(tiny_model, tiny_tokenizer, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16; got 'int4'"):
        open_model("anywhere", "int4")


def test_a_shard_that_the_index_names_and_that_is_missing_is_told(saved):
    shutil.move(saved / "model.safetensors", saved / "model-00001-of-00002.safetensors")
    names = list(AutoModelForCausalLM.from_config(json_config(saved)).state_dict())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names[:-1], "model-00001-of-00002.safetensors")}
    index["weight_map"][names[-1]] = "model-00002-of-00002.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="model-00002-of-00002"):
        open_model(saved)


def json_config(directory):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)

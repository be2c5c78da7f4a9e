"""peft's LoRA on a quantized model: adapters learn, codes stay."""

import pytest
import torch

from bitween import Bitween

peft = pytest.importorskip("peft")


@pytest.fixture
def packed(tiny_model):
    return Bitween(tiny_model, bits=3, group_size=32).quantize(rtn=True)


@pytest.fixture
def ids(tiny_tokenizer):
    text = "The rain had stopped, and the lamps were lit along the quay where the boats lay. " * 2
    return tiny_tokenizer(text, return_tensors="pt").input_ids


def adapted(model):
    from bitween.adapters import lora_config

    torch.manual_seed(0)
    return peft.get_peft_model(model, lora_config(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def test_adapters_learn_and_codes_stay(packed, ids):
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model = adapted(packed)
    with torch.no_grad():
        first = model(ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * packed.config.num_hidden_layers
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 0.8 * first
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_adapters_are_saved_and_loaded(packed, ids, tmp_path):
    model = adapted(packed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        plain = model.unload()
        assert not torch.equal(plain(ids).logits, want)
        again = adapted(plain)
        again.load_adapter(tmp_path, "default")
        torch.testing.assert_close(again(ids).logits, want)


def test_merging_is_refused(packed):
    model = adapted(packed)
    with pytest.raises(TypeError, match=r"merge: expected a layer of plain numbers; got QuantizedLinear"):
        model.merge_and_unload()


def test_a_plain_config_and_all_linear_layers(packed, ids):
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules="all-linear"))
    found = {n for n, m in model.named_modules() if hasattr(m, "lora_A") and n.count("lora_") == 0}
    assert len(found) == 7 * packed.config.num_hidden_layers
    assert not any(name.endswith("lm_head") for name in found)
    assert model(ids).logits.isfinite().all()


def test_an_adapter_is_loaded_by_peft_alone(packed, ids, tmp_path):
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        want = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, want)
        plain = loaded.unload()
        plain.load_adapter(str(tmp_path / "adapter"))  # transformers' own way
        torch.testing.assert_close(plain(ids).logits, want)


def test_the_trainer_takes_a_loaded_model(packed, ids, tmp_path):
    import transformers

    import bitween

    bitween.save_model(packed, None, tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
    }
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), **options)
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 4
    found = transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert found.training_loss > 0


def test_saving_adapters_as_a_model_says_what_would_be_written(packed, tmp_path):
    import bitween

    with pytest.raises(ValueError, match=r"writes the adapters alone: save them so, and .* save_model\(model\.unload"):
        bitween.save_model(adapted(packed), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_learns_of_packed_layers_whatever_is_imported_first():
    import subprocess
    import sys

    for first, second in (("bitween", "peft"), ("peft", "bitween")):
        program = f"import {first}, {second}; import peft; print(peft.LoraConfig()._custom_modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "PackedLora" in done.stdout, done.stderr

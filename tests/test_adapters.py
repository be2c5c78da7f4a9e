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

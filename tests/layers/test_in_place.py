import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitween
from bitween.layers.in_place import PackedInPlace


class OffsetPositions(nn.Embedding):
    """Counts positions from two on, as OPT and BART do."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1])[None] + 2)


class Grouped(nn.Linear):
    """Two groups of inputs, each with half of the rows."""

    def forward(self, x):
        first, second = self.weight.chunk(2)
        return torch.cat([x[..., 0, :] @ first.T, x[..., 1, :] @ second.T], -1) + self.bias


SCHEME = bitween.Scheme(4, 16)


def packed(module):
    stored = bitween.quantize(module.weight.detach(), SCHEME)
    return PackedInPlace.of(module, stored, torch.float32), stored


def plain(module, stored):
    twin = copy.deepcopy(module)
    twin.weight.data = torch.as_tensor(stored.dequantize(torch.float32))
    return twin


@pytest.mark.parametrize("make", [lambda: OffsetPositions(40, 32), lambda: Grouped(32, 48)])
def test_computes_what_the_module_does_with_the_stored_numbers(make):
    torch.manual_seed(0)
    module = make()
    x = torch.zeros(3, 9, dtype=torch.long) if isinstance(module, nn.Embedding) else torch.randn(3, 2, 32)
    before = module(x)
    layer, stored = packed(module)
    expected = plain(module, stored)(x)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        assert isinstance(twin, type(module))
        assert "weight" not in dict(twin.named_parameters())
    assert torch.equal(module(x), before)  # the module itself is left alone
    assert "codes" not in dict(module.named_buffers())


def test_a_lookup_unpacks_its_own_rows_only(monkeypatch):
    layer, _ = packed(OffsetPositions(40, 32))
    monkeypatch.setattr(layer, "dequantize", lambda *_: pytest.fail("the whole table was unpacked"))
    assert layer(torch.zeros(2, 5, dtype=torch.long)).shape == (1, 5, 32)


def test_a_row_outside_the_table_is_an_error():
    layer, _ = packed(OffsetPositions(4, 32))
    with pytest.raises(IndexError):
        layer(torch.zeros(1, 9, dtype=torch.long))


def test_an_empty_one_takes_a_state():
    module = Grouped(32, 48)
    layer, _ = packed(module)
    empty = PackedInPlace.empty_like(module, SCHEME)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 32)
    assert torch.equal(empty(x), layer(x))
    assert PackedInPlace.empty_like(nn.LayerNorm(4), SCHEME) is None


def test_another_shape_is_refused():
    stored = bitween.quantize(torch.randn(8, 32), SCHEME)
    with pytest.raises(ValueError, match=r"expected the weight's shape \(48, 32\)"):
        PackedInPlace.of(Grouped(32, 48), stored, torch.float32)


def test_a_whole_object_is_saved_by_torch():
    layer, _ = packed(OffsetPositions(40, 32))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert torch.equal(torch.load(file, weights_only=False)(ids), layer(ids))

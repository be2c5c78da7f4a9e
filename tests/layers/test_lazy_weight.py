"""What model code gets that reads the weight of a packed layer."""

import pytest
import torch
from torch import nn

from bitween import QuantizedEmbedding, QuantizedLinear, Scheme
from bitween.layers.embedding import lookup_scale
from bitween.model.memory import model_bytes

SCHEME = Scheme(4, 16)


class Scaled(nn.Embedding):
    def __init__(self, *args, factor, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.factor.to(self.weight.dtype)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class Offset(nn.Embedding):
    def forward(self, mask, past):
        return super().forward(mask.cumsum(-1) + past)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_answers_with_what_is_asked(dtype):
    layer = QuantizedLinear.from_linear(nn.Linear(32, 48, dtype=dtype), SCHEME)
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (dtype, (48, 32), "cpu")
    assert torch.equal(weight @ torch.eye(32, dtype=dtype), layer.dequantize(dtype))
    assert torch.equal(weight[3:5], layer.dequantize(dtype)[3:5])
    assert torch.equal(weight.t().float(), layer.dequantize(dtype).t().float())
    assert layer.to(torch.float16).weight.dtype == torch.float16


def test_nothing_else_sees_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(32, 48, bias=False), SCHEME)
    assert not list(layer.parameters())
    assert sorted(layer.state_dict()) == ["codes", "scales", "zeros"]
    assert model_bytes(layer) == layer.weight_nbytes


def test_the_weight_is_not_written_to():
    layer = QuantizedLinear.from_linear(nn.Linear(32, 48), SCHEME)
    for change in (lambda w: w.mul_(2), lambda w: w.zero_(), lambda w: w.data.copy_(torch.zeros(48, 32))):
        with pytest.raises(TypeError, match="weight: expected to be read only"), torch.no_grad():
            change(layer.weight)


@pytest.mark.parametrize("factor", [1.0, 5.656854249, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_lookup_is_found_by_running_it(factor, dtype):
    table = Scaled(64, 32, padding_idx=0, factor=factor).to(dtype)
    assert lookup_scale(table) == pytest.approx(factor, rel=4 * torch.finfo(dtype).eps)
    packed = QuantizedEmbedding.from_embedding(table, Scheme(8, 16))
    ids = torch.arange(64)[None]
    torch.testing.assert_close(packed(ids), table(ids), atol=0.05 * factor, rtol=0.02)
    assert torch.equal(packed(ids), packed.dequantize(dtype)[ids] * packed.multiplier if factor != 1 else packed(ids))


def test_what_is_no_lookup_stays():
    assert lookup_scale(Shifted(64, 32)) is None
    assert lookup_scale(Offset(64, 32)) is None
    with pytest.raises(ValueError, match="multiplied by a number at most; got Shifted"):
        QuantizedEmbedding.from_embedding(Shifted(64, 32), SCHEME)

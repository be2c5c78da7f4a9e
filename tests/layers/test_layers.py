"""QuantizedLinear and QuantizedEmbedding as torch modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import bitween
from bitween import QuantizedEmbedding, QuantizedLinear, Scheme
from bitween.layers import tiles
from bitween.layers.decoding import decode
from bitween.scheme import BITS, GROUP_SIZES

SCHEMES = [Scheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (False, True)]


def make_linear(cols=130, rows=50, scheme=None, bias=True, seed=0):
    torch.manual_seed(seed)
    return QuantizedLinear.from_linear(nn.Linear(cols, rows, bias=bias), scheme or Scheme(4, 64))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cols", [1, 33, 130])
def test_torch_decoding_equals_the_core(scheme, cols):
    q = make_linear(cols, 6, scheme).quantized
    for dtype in (torch.float32, torch.bfloat16):
        found = decode(q.codes, q.scales, q.zeros, scheme, cols, dtype)
        assert torch.equal(found, q.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(130,), (3, 130), (2, 3, 130), (2, 1, 3, 1, 130), (0, 130)])
def test_forward_equals_the_dequantized_linear(dtype, shape):
    layer = make_linear()
    layer.mode = "exact"
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    want = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert y.dtype == dtype
    assert y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes(rows, dtype, monkeypatch):
    """Up to 16 rows are rounded on the fly, more never; each mode is QuantizedTensor's own."""
    monkeypatch.setattr(tiles, "cpu_has_bf16", lambda: False)
    layer = make_linear()
    x = torch.randn(rows, 130).to(dtype)
    want = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert layer.mode == "int16"
    wrong = {}
    for mode in ("exact", "int16", "int8"):
        assert bitween.set_matmul_mode(nn.ModuleList([layer, nn.Identity()]), mode) == 1
        y = layer(x)
        assert torch.equal(y, layer.quantized.matmul(x, layer.bias, mode=mode))
        y = layer.quantized.matmul(x, layer.bias, out=torch.empty(rows, layer.out_features), mode=mode)
        wrong[mode] = ((y.double() - want).norm() / want.norm()).item()
    assert wrong["exact"] < 1e-6
    assert wrong["int16"] < (5e-5 if rows <= 16 else 1e-6)
    assert (1e-3 < wrong["int8"] < 1e-2) if rows <= 16 else wrong["int8"] < 1e-6
    with pytest.raises(ValueError, match="mode: expected one of exact, int8, int16; got 'int4'"):
        layer.mode = "int4"
    assert layer.mode == "int8"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(17, 130), (3, 9, 130)])
@pytest.mark.parametrize("tile_weights", [1, 7 * 130, 1 << 22])
def test_many_bfloat16_rows_are_multiplied_in_tiles(shape, tile_weights, bias, monkeypatch):
    monkeypatch.setattr(tiles, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(tiles, "_TILE_WEIGHTS", tile_weights)
    layer, x = make_linear(bias=bias), torch.randn(shape).bfloat16()
    y = layer(x)
    weight, added = layer.dequantize(torch.bfloat16), layer.bias.bfloat16().double() if bias else None
    want = nn.functional.linear(x.double(), weight.double(), added)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=2**-8)  # product and sum may be rounded apart
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            assert torch.equal(layer(x), y)
    finally:
        torch.set_num_threads(threads)


def test_forward_takes_strided_inputs():
    layer = make_linear(64)
    layer.mode = "exact"
    x = torch.randn(5, 7, 128)
    want = nn.functional.linear(x[:, 1:4, ::2], layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x[:, 1:4, ::2]), want)


def test_gradients_reach_inputs_and_bias():
    layer = make_linear()
    layer.bias.requires_grad_(True)
    weight = layer.dequantize().requires_grad_(False)
    x = torch.randn(4, 6, 130, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    bias = layer.bias.detach().clone().requires_grad_(True)
    (layer(x) ** 2).sum().backward()
    (nn.functional.linear(twin, weight, bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-4)
    assert all(not b.requires_grad for b in layer.buffers())


def test_gradient_of_a_weight_larger_than_one_step(monkeypatch):
    monkeypatch.setattr(tiles, "_TILE_WEIGHTS", 1000)
    layer = make_linear()
    x = torch.randn(3, 130, requires_grad=True)
    grad = torch.randn(3, 50)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(), rtol=1e-4, atol=1e-5)


def test_adapter_on_a_frozen_layer_trains():
    torch.manual_seed(0)
    down, layer, up = nn.Linear(20, 64, bias=False), make_linear(64, 10, Scheme(2, 16)), nn.Linear(10, 20, bias=False)
    x = torch.randn(32, 20)
    target, optimizer = torch.randn(32, 20), torch.optim.Adam([*down.parameters(), *up.parameters()], 0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(up(layer(down(x))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_autocast_is_followed():
    layer, x = make_linear(), torch.randn(3, 130)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme("ternary", -1, True), Scheme(3, 16, True)], ids=str)
def test_state_dict_round_trip(scheme):
    layer = make_linear(scheme=scheme)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for assign in (False, True):
        file.seek(0)
        other = QuantizedLinear.empty(130, 50, scheme, bias=True)
        other.load_state_dict(torch.load(file), assign=assign)
        x = torch.randn(2, 130)
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        QuantizedLinear.empty(130, 50, Scheme(8, 64, scheme.symmetric), bias=True).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(5, 32, True)], ids=str)
def test_change_of_dtype_leaves_the_bytes_alone(scheme):
    layer = make_linear(scheme=scheme)
    before = layer.dequantize()
    for move in (nn.Module.bfloat16, nn.Module.float, nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        move(layer)
        assert layer.scales.dtype == torch.float16
        assert layer.codes.dtype == torch.uint8
        assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.bfloat16


def test_copies_are_independent_and_equal():
    layer = make_linear()
    x = torch.randn(2, 130)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        other.codes.zero_()
        assert not torch.equal(other(x), layer(x))


def test_other_devices_use_torch_operations():
    layer = QuantizedLinear.empty(130, 50, Scheme(3, 64), bias=True, device="meta")
    assert layer(torch.empty(2, 3, 130, device="meta")).shape == (2, 3, 50)
    table = QuantizedEmbedding.empty(100, 33, Scheme("ternary", 16), device="meta", dtype=torch.bfloat16)
    found = table(torch.empty(2, 5, dtype=torch.int64, device="meta"))
    assert found.shape == (2, 5, 33)
    assert found.dtype == torch.bfloat16


def test_conv1d_is_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 64)
    layer = QuantizedLinear.from_linear(conv1d, Scheme(8, 64))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), conv1d(x), rtol=0, atol=1e-2)
    assert (layer.in_features, layer.out_features) == (64, 40)


def test_sizes_and_names():
    layer = make_linear()
    assert layer.weight_nbytes == Scheme(4, 64).nbytes(50, 130) == layer.quantized.nbytes
    assert sorted(layer.state_dict()) == ["bias", "codes", "scales", "zeros"]
    assert "scheme='4b g64 asym'" in repr(layer)
    assert sorted(make_linear(scheme=Scheme(4, 64, True), bias=False).state_dict()) == ["codes", "scales"]


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme("ternary", 16), Scheme(3, -1, True)], ids=str)
def test_embedding(scheme):
    source = nn.Embedding(40, 70, padding_idx=3).to(torch.bfloat16)
    table = QuantizedEmbedding.from_embedding(source, scheme)
    ids = torch.randint(0, 40, (2, 9))
    assert torch.equal(table(ids), table.dequantize(torch.bfloat16)[ids])
    assert table(ids.int()).shape == (2, 9, 70)
    assert table.float()(ids).dtype == torch.float32
    assert table.padding_idx == 3
    assert table.weight_nbytes == scheme.nbytes(40, 70)
    other = QuantizedEmbedding.empty(40, 70, scheme)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(ids), table(ids))
    with pytest.raises(IndexError):
        table(torch.tensor([40]))
    with pytest.raises(ValueError, match="max_norm"):
        QuantizedEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0), scheme)


def test_head_tied_to_an_embedding():
    model = nn.ModuleDict({"table": QuantizedEmbedding.from_embedding(nn.Embedding(40, 70), Scheme(4, 64))})
    model["head"] = QuantizedLinear.tied_to(model["table"])
    model["head"].mode = "exact"
    x = torch.randn(3, 70)
    torch.testing.assert_close(model["head"](x), x @ model["table"].dequantize().T)
    assert sorted(model.state_dict()) == ["table.codes", "table.scales", "table.zeros"]
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        other["table"].codes.zero_()
        assert other["head"].codes is other["table"].codes
        torch.testing.assert_close(other["head"](x), x @ other["table"].dequantize().T)
    moved = copy.deepcopy(model).to("meta")
    assert moved["head"](x.to("meta")).device.type == "meta"


def test_compiles_to_plain_torch():
    layer = make_linear()
    layer.mode = "exact"
    x = torch.randn(3, 130)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match="x: expected dtype float32, float16 or bfloat16; got float64"):
        make_linear()(torch.randn(2, 130, dtype=torch.float64))


def test_scheme_choices_reach_the_quantizer():
    linear = nn.Linear(64, 8)
    with pytest.raises(ValueError, match="method"):
        QuantizedLinear.from_linear(linear, Scheme(4), method="nothing")
    assert torch.equal(
        QuantizedLinear.from_linear(linear, Scheme(4)).codes,
        torch.from_numpy(bitween.quantize(linear.weight, Scheme(4)).codes),
    )

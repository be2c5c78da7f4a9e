"""Trellis schemes through the package: sizes, a second decoder, products, rounding of a model, saving, bad input."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bitween
from bitween import Bitween, Scheme
from bitween.layers import packed_layers
from bitween.layers.decoding import decode
from bitween.rounding.trellis import trellis
from bitween.scheme import TRELLIS_BITS


def weights(rows=100, cols=200):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_stored_tiles_are_what_a_second_decoder_reads(bits):
    weight, scheme = weights(), Scheme.trellis(bits)
    stored = bitween.quantize(weight, scheme, method="trellis")
    assert stored.nbytes == scheme.nbytes(*weight.shape)
    values = stored.dequantize(torch.float32)
    parts = [torch.as_tensor(part) for part in (stored.codes, stored.scales, stored.zeros)]
    assert torch.equal(values, decode(*parts, scheme, weight.shape[1]))
    assert Scheme.parse(str(scheme)) == scheme
    rows = torch.tensor([3, 99, 17, 3])
    assert torch.equal(stored.dequantize(torch.float32, rows=rows), values[rows])
    part = stored.row_range(16, 64).dequantize(torch.float32)
    assert torch.equal(part, values[16:64])
    x = torch.randn(2, 3, 200)
    torch.testing.assert_close(stored.matmul(x), x @ values.T, atol=1e-4, rtol=1e-4)


def test_half_the_error_of_a_grid_at_equal_bits():
    weight = weights(128, 512)
    for bits, most in ((2, 0.077), (3, 0.020), (4, 0.0053)):
        coded = bitween.quantize(weight, Scheme.trellis(bits), method="trellis").dequantize(torch.float32)
        error = ((coded - weight) ** 2).mean().item()
        grid = bitween.quantize(weight, Scheme(bits, -1, True), method="clip").dequantize(torch.float32)
        assert error < most
        assert error < 0.75 * ((grid - weight) ** 2).mean().item()


@pytest.mark.parametrize("bits", [2, 2.5])
def test_a_model_loses_less_than_with_gptq_and_comes_back_from_disk(bits, tiny_model, tiny_tokenizer, tmp_path):
    options = {"group_size": 64, "calibration_samples": 12}
    packed = Bitween(tiny_model, tiny_tokenizer, bits=bits, **options).quantize(method="trellis")
    grid = Bitween(tiny_model, tiny_tokenizer, bits=2, **options).quantize(method="gptq+refine")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        reference = tiny_model(ids).logits.float()
        losses = [float(bitween.kl_divergence(reference, m(ids).logits.float()).mean()) for m in (packed, grid)]
        assert losses[0] < losses[1]
        assert {module.scheme for _, module in packed_layers(packed)} == {Scheme.trellis(bits)}
        bitween.save_model(packed, None, tmp_path / "saved")
        wanted = packed(ids).logits
        assert torch.equal(bitween.load_model(tmp_path / "saved")[0](ids).logits, wanted)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(ids).logits, wanted)


def test_bad_input():
    weight = weights(32, 64)
    with pytest.raises(ValueError, match=r"bits: expected one of 1, 1\.5"):
        Scheme.trellis(2.25)
    with pytest.raises(ValueError, match="width: expected 10 to 16"):
        Scheme.trellis(2, 9)
    with pytest.raises(ValueError, match="method: expected 'trellis' for"):
        bitween.quantize(weight, Scheme.trellis(3))
    with pytest.raises(ValueError, match="method: expected 'trellis' for"):
        bitween.quantize(weight, Scheme(3), method="trellis")
    with pytest.raises(ValueError, match="coding: expected"):
        Scheme(3, coding="lattice")
    with pytest.raises(ValueError, match="edges of tiles"):
        bitween.quantize(weight, Scheme.trellis(3), method="trellis").row_range(3, 20)
    for matrix in (np.zeros((32, 64), np.float32), np.full((32, 64), 1e-30, np.float32)):
        stored = bitween.quantize(matrix, Scheme.trellis(3), method="trellis")
        assert np.abs(stored.dequantize()).max() < 1e-4


def test_one_quantizer_serves_several_methods(tiny_model):
    """A method chosen once leaves no mark on the next."""
    quantizer = Bitween(tiny_model, bits=3, group_size=32)
    ids = torch.arange(3, 131).reshape(8, 16)
    coded = quantizer.quantize(method="trellis", calibration_data=ids)
    rounded = quantizer.quantize(method="rtn")
    assert {module.scheme for _, module in packed_layers(coded)} == {Scheme.trellis(3)}
    assert {module.scheme for _, module in packed_layers(rounded)} == {Scheme(3, 32)}


@pytest.mark.parametrize("bits", [2, 4])
def test_a_turned_scheme(bits):
    scheme, generator = Scheme.trellis(bits, 16, turned=True), torch.Generator().manual_seed(bits)
    weight = torch.randn(256, 128, generator=generator) * torch.rand(256, 1, generator=generator)
    weight[3, 5], weight[200] = 20, 0  # peaks are what turning is for
    inputs = torch.randn(400, 128, generator=generator) * torch.linspace(0.1, 3, 128)
    hessian = (inputs.T @ inputs / 400).numpy()
    result = trellis(weight, scheme, hessian)
    stored = result.quantized
    assert stored.nbytes == scheme.nbytes(256, 128)
    values = stored.dequantize(torch.float32)
    left = (weight - values).double().numpy()
    np.testing.assert_allclose(result.row_errors, np.einsum("ij,jk,ik->i", left, hessian, left), rtol=1e-3, atol=1e-9)
    plain, even = Scheme.trellis(bits, 16), np.eye(128, dtype=np.float32)  # bits can't move to columns that need them
    assert trellis(weight, scheme, even).row_errors.sum() < trellis(weight, plain, even).row_errors.sum()
    parts = [torch.as_tensor(part) for part in (stored.codes, stored.scales, stored.zeros)]
    torch.testing.assert_close(values, decode(*parts, scheme, 128), rtol=1e-6, atol=1e-6)
    assert Scheme.parse(str(scheme)) == scheme
    rows = torch.tensor([3, 255, 17, 3])
    assert torch.equal(stored.dequantize(torch.float32, rows=rows), values[rows])
    assert torch.equal(stored.row_range(128, 256).dequantize(torch.float32), values[128:])
    x = torch.randn(2, 3, 128, generator=generator)
    torch.testing.assert_close(stored.matmul(x), x @ values.T, atol=1e-4, rtol=1e-4)
    again = trellis(weight, scheme, None, importance=np.diag(hessian)).quantized.dequantize(torch.float32)
    assert ((again - weight) ** 2).mean() < 0.2 * (weight**2).mean()


def test_a_turned_scheme_refuses_what_it_cannot_hold():
    for arguments in ((2.5, 16, True), (2, 12, True)):
        with pytest.raises(ValueError, match="turned: expected"):
            Scheme.trellis(*arguments)
    with pytest.raises(TypeError, match="turned: expected True or False"):
        Scheme.trellis(2, 16, 1)
    scheme = Scheme.trellis(2, 16, turned=True)
    with pytest.raises(ValueError, match="multiples of 128"):
        scheme.nbytes(128, 100)
    for bad, message in ((torch.full((128, 128), torch.nan), "finite"), (torch.full((128, 128), 1e30), "scales up to")):
        with pytest.raises(ValueError, match=message):
            bitween.quantize(bad, scheme, method="trellis")
    assert torch.equal(
        bitween.quantize(torch.zeros(128, 128), scheme, method="trellis").dequantize(torch.float32).round(decimals=3),
        torch.zeros(128, 128),
    )


def test_bits_go_where_errors_cost_most():
    """One channel a hundred times as large as the rest, as in the later layers of every larger language model."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(256, 512, generator=generator)
    inputs = torch.randn(2000, 512, generator=generator) * torch.linspace(0.5, 1.5, 512)[torch.randperm(512)]
    inputs[:, 100] *= 100
    hessian = (inputs.T @ inputs / 2000).numpy()
    result = trellis(weight, Scheme.trellis(3), hessian)
    stored = result.quantized
    rates = torch.as_tensor(stored.zeros).int()
    assert stored.nbytes == Scheme.trellis(3).nbytes(256, 512)
    assert int(rates.sum()) == 3 * len(rates)
    assert int(rates[100 // 16]) == 5
    left = (weight - stored.dequantize(torch.float32)).double().numpy()
    np.testing.assert_allclose(result.row_errors, np.einsum("ij,jk,ik->i", left, hessian, left), rtol=1e-3)
    grid = bitween.quantize(weight, Scheme(3, 64), method="gptq+refine", hessian=hessian).dequantize(torch.float32)
    lost = (weight - grid).double().numpy()
    assert result.row_errors.sum() < 0.75 * np.einsum("ij,jk,ik->", lost, hessian, lost)
    beside = np.r_[96:100, 101:112]  # its neighbours in the tile are coded too
    assert (left[:, beside] ** 2).mean() < 0.03
    even = trellis(weight, Scheme.trellis(3), None).quantized
    assert set(torch.as_tensor(even.zeros).tolist()) == {3}


def test_effort_is_checked():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    for arguments, message in (
        ({"method": "gptq", "effort": "high"}, "effort: expected 'normal' for method 'gptq'"),
        ({"method": "trellis", "effort": "most"}, "effort: expected 'normal' or 'high'"),
        ({"method": "trellis", "turned": True}, 'turned: expected False, or True with effort="high"'),
    ):
        with pytest.raises(ValueError, match=message):
            Bitween(model, bits=2).quantize(**arguments)

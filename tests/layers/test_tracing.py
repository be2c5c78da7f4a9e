"""Packed layers written down to be run later: torch.jit.trace, torch.export, ONNX. Right, on other inputs too."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from bitween import QuantizedEmbedding, QuantizedLinear, Scheme, multiply_together

SCHEMES = [Scheme(1, 32, True), Scheme(1.58, 32), *(Scheme(bits, 32) for bits in (2, 3, 4, 5, 6, 8)), Scheme(3, -1)]


class Small(nn.Module):
    """An embedding, two layers on one input, and a head tied to the embedding."""

    def __init__(self, scheme):
        super().__init__()
        torch.manual_seed(0)
        self.table = QuantizedEmbedding.from_embedding(nn.Embedding(50, 72), scheme)
        self.up, self.gate = (QuantizedLinear.from_linear(nn.Linear(72, 72), scheme) for _ in range(2))
        self.head = QuantizedLinear.tied_to(self.table)

    def forward(self, ids):
        x = self.table(ids)
        up, gate = multiply_together([self.up, self.gate], x)
        return self.head(up * torch.sigmoid(gate))


def inputs(seed=1):
    return torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace(scheme, grad):
    model = Small(scheme).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, inputs())
        for seed in range(3):
            torch.testing.assert_close(traced(inputs(seed)), model(inputs(seed)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_export(scheme):
    model = Small(scheme).eval()
    exported = torch.export.export(model, (inputs(),)).module()
    torch.testing.assert_close(exported(inputs(2)), model(inputs(2)), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_onnx(scheme):
    pytest.importorskip("onnxscript", reason="needs the packages `onnx` and `onnxscript`")
    from onnx.reference import ReferenceEvaluator

    model, file = Small(scheme).eval(), io.BytesIO()
    program = torch.onnx.export(model, (inputs(),), dynamo=True, verbose=False)
    program.save(file)
    run = ReferenceEvaluator(program.model_proto)
    (got,) = run.run(None, {run.input_names[0]: inputs(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(inputs(2)), rtol=1e-3, atol=1e-3)

"""What can't be quantized is told before any work: the argument, what was expected and what came."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bitween import Bitween
from bitween.gradual import GradualQuantizer
from tests.tasks.models import make


class Dropping(nn.Module):
    """Dropout that no mode switches off."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x), 0.5, training=True)


class Silent(nn.Module):
    """An output without a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return {"done": bool(self.layer(x).sum() > 0)}


X = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))


def gradual(model, data, **options):
    options = {"max_damage": 0.1, **options}
    return GradualQuantizer(model, None, 0.5, calibration_data=data, **options)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(16)), X, "expected at least one weight matrix .* Sequential has none"),
        (Dropping(), X, "expected the same answer to the same input"),
        (Silent(), X, "expected an output with a tensor of numbers"),
        (nn.Linear(16, 4), torch.randn(20, 7), "expected inputs that Linear takes; example 0"),
        (nn.Linear(16, 4), X[:2], "expected at least 3 examples"),
        (nn.Linear(16, 4), [], "expected examples of the model's inputs; got none"),
        (nn.Linear(16, 4), ["text"], "item 0: expected a dict of tensors"),
        (nn.Linear(16, 4), None, "expected examples of the inputs of Linear"),
        (nn.Linear(16, 4), [{"picture": X[:1]}], "expected inputs of the model .input.; got 'picture'"),
    ],
)
def test_is_refused_at_once(model, data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gradual(model, data)


def test_no_module_at_all():
    with pytest.raises(TypeError, match="expected a torch module; got str"):
        Bitween("bert-base-uncased")


def test_a_task_without_labels_needs_another_budget():
    model, examples = make("BERT, sequence classes")
    with pytest.raises(ValueError, match="max_damage: expected a budget, since BertForSequenceClassification has no"):
        gradual(model, examples, max_damage=None)


def test_options_of_the_budget():
    layer = nn.Linear(16, 4)
    for options, message in (
        ({"max_damage": -1}, "max_damage: expected a number above 0"),
        ({"metric": 3, "max_metric_drop": 0.1}, "metric: expected a function"),
        ({"metric": len}, "max_metric_drop: expected together with metric"),
        ({"max_metric_drop": 0.1}, "metric: expected together with max_metric_drop"),
        ({"damage": "mse"}, "damage: expected"),
        ({"method": "signround"}, "method: expected one of"),
        ({"ignore_layers": ["nothing"]}, "ignore_layers"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            gradual(layer, X, **options)


def test_weights_that_are_computed_are_refused_with_the_way_out():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        Bitween(model)


def test_adapters_are_refused_with_the_way_out():
    peft = pytest.importorskip("peft")
    model, _ = make("BERT, sequence classes", count=1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        Bitween(adapted)


@pytest.mark.parametrize("given", [None, "good", [], float("nan"), {"accuracy": 0.9}, [[1.0, 2.0]]], ids=repr)
def test_a_metric_that_gives_no_numbers(given):
    with pytest.raises(ValueError, match="metric: expected a finite number, or one an example"):
        gradual(nn.Linear(16, 4), X, max_damage=None, metric=lambda model: given, max_metric_drop=0.1).quantize()


def test_a_basis_that_would_not_be_taken_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match='transforms: expected "none" with a model that runs as a whole'):
        Bitween(model, None, bits=4).quantize(method="rtn", transforms="auto", calibration_data=None)

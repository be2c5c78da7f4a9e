"""Patterns that fit no layer."""

import pytest

from bitween import Bitween
from bitween.gradual import GradualQuantizer
from tests import tiny_models


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.0.mlp.upproj", "model.layers.0.mlp.up_proj"),
        ("q_proj", "self_attn.q_proj"),
        ("*.lm_haed", "lm_head"),
    ],
)
def test_ignore_layers_that_match_nothing_name_the_nearest(pattern, near):
    model = tiny_models.make("llama")
    with pytest.raises(ValueError, match=f"ignore_layers: .*{near}.*got"):
        Bitween(model).quantize(ignore_layers=["lm_head", pattern])
    with pytest.raises(ValueError, match=f"ignore_layers: .*{near}.*got"):
        GradualQuantizer(model, None, calibration_data=tiny_models.tokens(), ignore_layers=pattern)


def test_what_stays_anyway_may_be_named():
    Bitween(tiny_models.make("gpt2")).quantize(ignore_layers=["transformer.wpe", "*c_fc"])

"""Every recognised family against transformers' own forward pass."""

from __future__ import annotations

import pytest
import torch

import bitween
from bitween import QuantizedLinear, Scheme, _core
from bitween.decode import attach
from bitween.decode.families import FAMILIES
from tests import tiny_models
from tests.decode import steps

# The order of sums differs; a rounded number may fall to its neighbour in each of 3 blocks.
BOUNDS = {torch.float32: 5e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
PROMPT = tiny_models.tokens(1, 9)
STEPS = [tiny_models.tokens(1, n, seed=n) for n in (1, 1, 3, 1, 1, 5, 1)]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("family", steps.FAMILIES)
def test_family(family, dtype):
    theirs, ours, taken = steps.both_ways(steps.make(family, dtype), PROMPT, STEPS)
    assert taken == len(STEPS)
    narrow = family in steps.MIXTURES and dtype is not torch.float32
    assert (steps.typical_miss if narrow else steps.miss)(theirs, ours) < BOUNDS[dtype]


def test_every_family_is_tested():
    models = {type(steps.make(family).model).__name__ for family in steps.FAMILIES}
    assert models == set(FAMILIES)


@pytest.mark.parametrize("isa", bitween.info()["isas"])
@pytest.mark.parametrize("family", steps.FAMILIES)
def test_every_instruction_set(family, isa):
    own = bitween.info()["isa"]
    model = steps.make(family)
    _core.set_isa(isa)
    try:
        theirs, ours, _ = steps.both_ways(model, PROMPT, STEPS)
    finally:
        _core.set_isa(own)
    assert steps.miss(theirs, ours) < BOUNDS[torch.float32]


@pytest.mark.parametrize("family", steps.FAMILIES)
def test_any_number_of_threads_gives_the_same_bits(family):
    model, results = steps.make(family, torch.bfloat16), []
    threads = bitween.get_num_threads()
    try:
        for n in (1, 2, 8):
            bitween.set_num_threads(n)
            results.append(steps.both_ways(model, PROMPT, STEPS)[1])
    finally:
        bitween.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 1e4,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_of_every_kind(rope):
    model = steps.make("llama", max_position_embeddings=12, rope_parameters=rope)
    theirs, ours, taken = steps.both_ways(model, PROMPT, STEPS)  # beyond 12 positions
    assert taken == len(STEPS)
    assert steps.miss(theirs, ours) < BOUNDS[torch.float32]


@pytest.mark.parametrize("mode", ["exact", "int16", "int8"])
@pytest.mark.parametrize("scheme", [Scheme.trellis(2.5), Scheme(4, 64), Scheme(2, 32)], ids=str)
def test_schemes_and_modes(scheme, mode):
    model = tiny_models.make("llama", hidden_size=64)
    method = "trellis" if scheme.coding == "trellis" else "rtn"
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.layers.set_submodule(name, QuantizedLinear.from_linear(module, scheme, method=method))
    attach(model)
    bitween.set_matmul_mode(model, mode)
    theirs, ours, taken = steps.both_ways(model, PROMPT, STEPS)
    assert taken == len(STEPS)
    assert steps.miss(theirs, ours) < (0.02 if mode == "int8" else BOUNDS[torch.float32])


def test_plain_layers_among_packed_ones():
    model = steps.make("llama", schemes=[Scheme(4, 32)])
    wanted = model.model.layers[1].mlp
    wanted.up_proj = torch.nn.Linear(32, 48, bias=True)
    wanted.down_proj = torch.nn.Linear(48, 32, bias=False)
    theirs, ours, taken = steps.both_ways(model, PROMPT, STEPS)
    assert taken == len(STEPS)
    assert steps.miss(theirs, ours) < BOUNDS[torch.float32]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations(activation):
    theirs, ours, taken = steps.both_ways(steps.make("llama", hidden_act=activation), PROMPT, STEPS)
    assert taken == len(STEPS)
    assert steps.miss(theirs, ours) < BOUNDS[torch.float32]

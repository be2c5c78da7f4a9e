"""Equivalent transforms: the same logits, on every family that allows them; a reason on every other."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitween.model.blocks import inspect
from bitween.model.experts import unfolded
from bitween.transforms import apply, group_range_error, plan_transforms
from bitween.transforms.operators import Diagonal, PerHead, hadamard, orthogonal, rotation
from bitween.transforms.scaling import choose_scales
from tests.tiny_models import logits, make, tokens

ALL = ("fold", "rotate", "heads", "scale")


def transformed(model, steps=ALL, untie="auto", **options):
    """Logits before and after, the report and the plan; steps as asked for."""
    model = unfolded(model)
    layout = inspect(model)
    plan = plan_transforms(model, layout, steps, untie=untie)
    before = logits(model, tokens())
    report = apply(model, layout, plan, **options)
    return before, logits(model, tokens()), report, plan


def gap(before, after):
    return ((before - after).abs().max() / before.abs().max()).item()


def outlier(weight):
    """Largest absolute value relative to the root mean square, by rows."""
    return (weight.abs().amax(1) / weight.square().mean(1).sqrt()).max().item()


# ---- operators ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 200), kind=st.sampled_from(["hadamard", "random"]), seed=st.integers(0, 9))
def test_rotations_are_orthogonal(size, kind, seed):
    turn = rotation(size, kind, torch.Generator().manual_seed(seed))
    matrix = turn.right(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    x = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose(turn.right(x), x @ matrix, atol=1e-12)


def test_hadamard_rotations_spread_one_channel_over_all():
    turn = rotation(576, "hadamard", torch.Generator().manual_seed(0))
    assert [factor.shape[0] for factor in turn.factors] == [9, 64]
    one = torch.zeros(1, 576, dtype=torch.float64)
    one[0, 17] = 1
    assert turn.right(one).abs().max() < 0.125 + 1e-9  # no entry beyond a 64th's root
    whole = rotation(128, "hadamard", torch.Generator().manual_seed(0))
    assert torch.allclose(whole.right(torch.eye(128, dtype=torch.float64)).abs(), torch.tensor(128.0).double() ** -0.5)


def test_operators_equal_dense_matrices():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    blocks = torch.stack([orthogonal(4, generator) for _ in range(3)])
    assert torch.allclose(PerHead(blocks).right(x), x @ torch.block_diag(*blocks))
    d = torch.rand(12, generator=generator, dtype=torch.float64)
    assert torch.allclose(Diagonal(d).right(x), x @ d.diag())
    with pytest.raises(ValueError, match="power of two; got 12"):
        hadamard(12)
    with pytest.raises(ValueError, match='"hadamard" or "random"; got \'fourier\''):
        rotation(12, "fourier", generator)


# ---- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3", "granite", "lfm2"])
def test_all_steps_keep_the_logits(family, kind):
    model = make(family, tie_word_embeddings=False)
    old = copy.deepcopy(model.state_dict())
    before, after, report, _ = transformed(model, rotation_kind=kind)
    assert report.steps == ALL
    assert report.skipped == {}
    assert gap(before, after) < 2e-5
    assert (report.folded, report.rotated, report.head_rotated, report.scaled) == (7, 23, 3, 3)
    new = model.state_dict()
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert {name for name in changed if new[name].ndim > 1} == {name for name in new if new[name].ndim > 1}
    assert all((model.get_submodule(norm.name).weight == 1).all() for norm in plan_of(model).norms)


def plan_of(model):
    return plan_transforms(model, inspect(model), ALL)


@pytest.mark.parametrize("step", ALL)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_each_step_alone_keeps_the_logits(family, step):
    before, after, report, _ = transformed(make(family), steps=[step])
    assert step in report.steps
    assert gap(before, after) < 2e-5


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_heads_of_every_grouping(heads):
    query, key_value = heads
    model = make("llama", num_attention_heads=query, num_key_value_heads=key_value, attention_bias=True)
    before, after, report, plan = transformed(model, steps=["heads", "scale"])
    assert gap(before, after) < 2e-5
    assert {pair.heads for pair in plan.rotated_pairs} == {(query, key_value, 8)}
    before, after, report, plan = transformed(model, steps=["scale"])
    assert report.scaled == 6
    assert gap(before, after) < 2e-5


def test_gemma_with_its_gain_convention_and_scaled_embedding():
    model = make("gemma")
    before, after, report, plan = transformed(model, untie=True)
    assert report.steps == ALL
    assert gap(before, after) < 2e-5
    assert all(norm.offset == 1 and (norm.weight == 0).all() for norm in plan.norms)


@pytest.mark.parametrize("family", ["phi3", "mamba"])
def test_what_fits_is_done_where_not_everything_does(family):
    before, after, report, _ = transformed(make(family, tie_word_embeddings=False))
    assert report.steps == ("fold", "rotate")
    assert "one by one" in report.skipped["heads"]
    assert gap(before, after) < 2e-5


@pytest.mark.parametrize(
    ("family", "steps", "reason"),
    [
        ("gemma2", ("fold", "heads", "scale"), "post_attention_layernorm works on a layer's output before it is added"),
        ("gemma3_text", ("fold", "heads", "scale"), "post_attention_layernorm works on a layer's output before"),
        ("gpt2", (), "transformer.h.0.ln_1: LayerNorm is no root-mean-square norm with a gain"),
        ("opt", ("heads", "scale"), "LayerNorm is no root-mean-square norm"),
        ("cohere", ("heads", "scale"), "CohereLayerNorm is no root-mean-square norm"),
        ("olmo2", ("fold", "heads", "scale"), "q_proj reads the residual stream without a norm"),
        ("mixtral", ("fold", "heads"), "model.layers.0 computes more than its input plus the outputs of its layers"),
        ("nanochat", ("heads",), "what enters the first block is not model.embed_tokens times a number"),
    ],
)
def test_families_that_cannot_be_rotated_say_why(family, steps, reason):
    before, after, report, _ = transformed(make(family, tie_word_embeddings=False))
    assert report.steps == steps
    assert reason in report.skipped["rotate"]
    assert gap(before, after) < 2e-5


def test_a_multiplier_on_the_residual_is_noticed():
    model = make("granite", residual_multiplier=0.5)
    reason = plan_transforms(model, inspect(model)).skipped["rotate"]
    assert reason.startswith("model.layers.0.post_attention_layernorm does not read the sum of the block's input")


def test_half_precision_models_change_by_rounding_only():
    model = make("llama", dtype=torch.bfloat16)
    before, after, report, _ = transformed(model)
    assert report.steps == ALL
    assert next(model.parameters()).dtype == torch.bfloat16
    assert 1e-4 < report.logit_change < 0.1
    assert gap(before.float(), after.float()) < 0.1


def test_the_same_seed_gives_the_same_model():
    models = [make("llama") for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.manual_seed(seed * 17)
        transformed(model, seed=seed)
    first, second, third = (model.lm_head.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# ---- what they are for ----------------------------------------------------------------------------


def test_rotation_spreads_outlier_channels():
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data[:, 5] *= 30
        layer.mlp.down_proj.weight.data[7] *= 30
    before = outlier(model.model.layers[1].self_attn.q_proj.weight)
    transformed(model, steps=["rotate"])
    assert outlier(model.model.layers[1].self_attn.q_proj.weight) < 0.6 * before


@pytest.mark.parametrize("use_energy", [False, True])
def test_scaling_lowers_the_error_it_was_given(use_energy):
    model = make("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight.data *= torch.logspace(-1, 1, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(2))]
    energy = torch.rand(48, generator=torch.Generator().manual_seed(3)) ** 4 + 1e-3
    name = "model.layers.0.mlp.down_proj"
    plain = group_range_error(down.weight.detach(), energy if use_energy else torch.ones(48), 16)
    old = down.weight.detach().clone()

    def error(weight, importance):
        return group_range_error(weight, importance, 16)

    _, _, report, _ = transformed(model, steps=["scale"], error=error, energy={name: energy} if use_energy else None)
    factors = (down.weight / old).detach()[0]
    now = group_range_error(down.weight.detach(), (energy if use_energy else torch.ones(48)) / factors.square(), 16)
    choice = report.scales[name]
    assert now / plain == pytest.approx(choice.error, rel=1e-3)
    assert choice.error < 0.9
    assert (choice.activation > 0) == use_energy


def test_group_range_error_follows_rounding_errors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 70, generator=generator) * torch.logspace(-1, 1, 70)
    importance = torch.rand(70, generator=generator)

    def rounding(w, x):
        total = 0.0
        for start in range(0, 70, 16):
            group = w[:, start : start + 16]
            low, step = group.amin(1, True), (group.amax(1, True) - group.amin(1, True)) / 15
            back = ((group - low) / step).round() * step + low
            total += ((back - group).square() @ x[start : start + 16]).sum().item()
        return total

    scales = torch.logspace(0.5, -0.5, 70)
    predicted = group_range_error(weight * scales, importance / scales**2, 16) / group_range_error(
        weight, importance, 16
    )
    real = rounding(weight * scales, importance / scales**2) / rounding(weight, importance)
    assert predicted == pytest.approx(real, rel=0.25)


def test_no_scaling_where_none_helps():
    weight = torch.ones(4, 64) * torch.tensor([-1.0, 1.0]).repeat(32)
    scales, choice = choose_scales(weight, None, group_range_error, lambda values: values)
    assert (scales == 1).all()
    assert choice.error == 1


# ---- tied embeddings ------------------------------------------------------------------------------


def test_untying_is_priced_and_decided_by_bytes():
    model = make("llama", tie_word_embeddings=True, num_hidden_layers=3)
    plan = plan_transforms(model, inspect(model))
    assert (plan.untie.extra_weights, plan.untie.extra_bytes) == (97 * 32, 97 * 32)
    inner = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert plan.untie.allowed_bytes == inner // 16
    assert not plan.untie.decided
    assert "rotate" not in plan.steps
    assert "one weight; would untie" in plan.skipped["rotate"]
    assert "3,104 bytes more" in plan.skipped["rotate"]
    assert plan_transforms(model, inspect(model), table_bits=2.0).untie.decided
    assert "rotate" in plan_transforms(model, inspect(model), untie=True).steps
    assert plan_transforms(model, inspect(model), untie=False, table_bits=0.1).untie.decided is False
    apart = make("llama")
    assert plan_transforms(apart, inspect(apart)).untie is None


def test_a_tied_model_keeps_its_tie_where_it_is_not_rotated():
    model = make("llama", tie_word_embeddings=True)
    before, after, report, plan = transformed(model, untie=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.layout.tied
    assert "model.norm" not in {norm.name for norm in plan.norms}
    assert gap(before, after) < 2e-5


def test_an_untied_model_saves_and_loads(tmp_path):
    model = make("llama", tie_word_embeddings=True)
    before, after, report, _ = transformed(model, untie=True)
    assert report.untied_weights == 97 * 32
    assert not report.layout.tied
    assert model.config.tie_word_embeddings is False
    assert gap(before, after) < 2e-5
    model.tie_weights()  # as a caller might; nothing is left to tie
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits(again, tokens()), after)


# ---- nothing lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_failed_check_puts_everything_back(monkeypatch, tied):
    model = make("llama", tie_word_embeddings=tied)
    layout = inspect(model)
    plan = plan_transforms(model, layout, ALL, untie=True)
    old = copy.deepcopy(model.state_dict())
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    module = importlib.import_module("bitween.transforms.apply")  # the package has a function of this name

    def wrong(edits, pair, kind, generator):  # the sink's side is forgotten
        edits[pair.source].rows.append(Diagonal(torch.full((16,), 2.0)))

    monkeypatch.setattr(module, "_rotate_heads", wrong)
    with pytest.raises(ValueError, match="expected the same logits after the transforms; got a change of"):
        apply(model, layout, plan)
    assert all(torch.equal(old[name], value) for name, value in model.state_dict().items())
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert model.config.tie_word_embeddings is tied
    assert inspect(model).tied is tied


def test_weights_that_leave_the_dtype_are_refused_before_anything_changes():
    model = make("llama", dtype=torch.float16)
    model.model.layers[0].input_layernorm.weight.data *= 1000
    model.model.layers[0].self_attn.q_proj.weight.data *= 1000
    layout = inspect(model)
    old = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"q_proj: expected finite weights after the transforms"):
        apply(model, layout, plan_transforms(model, layout, ["fold"]))
    assert all(torch.equal(old[name], value) for name, value in model.state_dict().items())


def test_planning_changes_nothing():
    model = make("llama", dtype=torch.bfloat16)
    model.train()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    plan_transforms(model, inspect(model))
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments():
    model = make("llama")
    layout = inspect(model)
    with pytest.raises(ValueError, match="steps: expected some of fold, rotate, heads, scale; got 'spin'"):
        plan_transforms(model, layout, ["rotate", "spin"])
    with pytest.raises(ValueError, match="untie: expected \"auto\", True or False; got 'maybe'"):
        plan_transforms(model, layout, untie="maybe")
    with pytest.raises(ValueError, match='"hadamard" or "random"; got \'givens\''):
        apply(model, layout, plan_transforms(model, layout), rotation_kind="givens")


def test_a_layout_of_other_modules_is_refused():
    """That of a model with stacks of experts describes a copy, and changes of the copy would miss the model."""
    model = make("mixtral", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="layout: expected that of the model itself"):
        plan_transforms(model, inspect(model))
    copy = unfolded(model)
    layout = inspect(copy)
    plan = plan_transforms(copy, layout)
    with pytest.raises(ValueError, match="layout: expected that of the model itself"):
        apply(model, layout, plan)

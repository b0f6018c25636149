"""What is trained, its gradients and its moments lie end to end, and nobody notices."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapters.find import adapter_layers
from minilora.adapters.layers import AdapterLayer
from minilora.runs.flat import ALIGNMENT, CHUNK, Flat, Learning, flat_norm
from minilora.runs.optimizer import learning
from tests.models import bases, examples, four_bit, long, randn, seeds, tiny_model
from tests.tolerance import assert_maths, assert_precision
from tests.training import adapted, random_rows, trained, weights

ORDINARY = Learning(1.0, 0.0)
EVERYTHING = {"use_dora": True, "bias": "all", "modules_to_save": ("norm",), "trainable_token_indices": (3, 5)}


def lora(dtype=torch.bfloat16, base=lambda model: model, **config):
    """An adapter in float32 on a base in another dtype."""
    model = base(tiny_model(dtype=dtype, num_hidden_layers=2))
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **config}))
    return model


def flat_of(model, **config):
    return Flat(model, learning(model, ml.TrainConfig(**config)))


def factors(model):
    """Each layer with its adapter."""
    layers = adapter_layers(model).values()
    return [(layer, layer.adapters["default"]) for layer in layers if isinstance(layer, AdapterLayer)]


def owners(model):
    """Storages, and the names of the parameters in them."""
    found = {}
    for name, p in model.named_parameters():
        found.setdefault(p.untyped_storage().data_ptr(), set()).add(name)
    return list(found.values())


# --- views ---


@examples(0.4)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6), seeds)
def test_parameters_keep_their_numbers_and_are_views_of_one_buffer(shapes, seed):
    model = nn.ParameterList(nn.Parameter(randn(seed + i, *shape)) for i, shape in enumerate(shapes))
    before = [p.detach().clone() for p in model]
    flat = Flat(model, {name: ORDINARY for name, _ in model.named_parameters()})
    (segment,) = flat.segments
    assert all(torch.equal(p, value) for p, value in zip(model, before, strict=True))
    assert all(p.storage_offset() % ALIGNMENT == 0 for p in model if p.numel())
    segment.values.detach().mul_(2)
    assert all(torch.equal(p, 2 * value) for p, value in zip(model, before, strict=True))
    assert_maths(flat_norm([segment.values]), 2 * torch.cat([value.flatten() for value in before]).norm())


def test_gradients_add_up_in_their_buffer_and_are_put_there_again_when_somebody_took_them_away():
    model = adapted(is_fresh=True)
    flat = flat_of(model)
    (segment,) = flat.segments
    for _ in range(2):
        flat.zero_grad()
        for times in (1, 2):
            sum((p * p).sum() for p in trained(model).values()).backward()
            assert_maths(segment.gradient, times * 2 * segment.values)
        model.zero_grad()


def swapped(model):
    """As those do who evaluate with an average of the weights, and then go on."""
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = torch.zeros_like(p)
    for name, p in model.named_parameters():
        p.data = own[name]


@pytest.mark.parametrize("change", [swapped, lambda model: model.double().float()])
def test_numbers_that_are_put_in_a_parameter_s_place_are_trained_on(change):
    def outcome(between):
        model = lora(torch.float32)
        ml.train(model, random_rows(0, 6), ml.TrainConfig(batch_size=2), on_step=lambda record: between(model) and None)
        return weights(model)

    assert torch.equal(outcome(change), outcome(lambda model: None))


@pytest.mark.parametrize(
    ("config", "segments"),
    [
        ({}, 1),
        ({"weight_decay": 0.1}, 2),  # matrices; biases, magnitudes and norms
        ({"loraplus_lr_ratio": 4}, 2),  # A; B and all vectors
        ({"loraplus_lr_ratio": 4, "weight_decay": 0.1}, 3),
    ],
)
def test_there_are_as_many_segments_as_ways_to_learn(config, segments):
    model = lora(torch.float32, **EVERYTHING)
    flat = flat_of(model, **config)
    assert len(flat.segments) == segments
    assert {name for segment in flat.segments for name in segment.parameters} == set(trained(model))


def test_tied_parameters_lie_there_once_and_stay_tied():
    model = tiny_model("llama-bias-tied-wide-heads")
    flat = flat_of(model)
    (segment,) = flat.segments
    assert len(segment.parameters) == len({id(p) for p in model.parameters()})
    flat.release()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- the norm ---


def test_the_norm_of_many_numbers_is_as_exact_as_that_of_few():
    """PyTorch's own sum of as many squares is off by more than a thousandth."""
    many = torch.full((200 * CHUNK,), 1.1)
    exact = many.double().norm()
    assert_precision(flat_norm([many]), flat_norm([many[:CHUNK]]) * 200**0.5, exact)
    assert abs(torch.linalg.vector_norm(many) - exact) > 1e-3 * exact


# --- the cast ---


@examples(0.3)
@given(bases, st.booleans())
def test_within_a_step_adapters_have_their_factors_in_the_computation_s_dtype_and_after_it_none(base, has_dora):
    model = lora(base=base, use_dora=has_dora)
    flat = flat_of(model)
    for _ in range(2):
        with flat.cast():
            for _, adapter in factors(model):
                for copied, factor in zip(adapter.cast, (adapter.lora_A, adapter.lora_B), strict=True):
                    assert copied.dtype == torch.bfloat16
                    assert torch.equal(copied, factor.to(torch.bfloat16))
            assert len({copied.untyped_storage().data_ptr() for _, each in factors(model) for copied in each.cast}) == 1
        assert {adapter.cast for _, adapter in factors(model)} == {None}
        for segment in flat.segments:
            segment.values.detach().add_(0.3)


def test_nothing_is_cast_that_has_the_dtype_already_or_is_not_trained_whole():
    same, half, idle = adapted(dtype=torch.float32), lora(), lora()
    for name, p in half.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_B" in name)
    ml.attach(idle, ml.LoraConfig(r=2), name="second")
    for model in (same, half):
        with flat_of(model).cast():
            assert {adapter.cast for _, adapter in factors(model)} == {None}
    with flat_of(idle).cast():
        assert {adapter.cast for _, adapter in factors(idle)} == {None}
        assert all(layer.adapters["second"].cast for layer, _ in factors(idle))


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, *long({}, {"lora_dropout": 0.3}, {"init_lora_weights": "pissa"})]
)
@pytest.mark.parametrize("base", [lambda model: model, four_bit], ids=["dense", "four bits"])
def test_a_run_comes_to_the_same_bits_as_one_that_casts_at_each_use(base, config, monkeypatch):
    def run():
        model = lora(base=base, **config)
        ml.train(model, random_rows(3, 6), ml.TrainConfig(batch_size=2, learning_rate=0.1, recompute="mlp"))
        return weights(model)

    once = run()
    monkeypatch.setattr(Flat, "cast", lambda flat: contextlib.nullcontext())
    assert torch.equal(once, run())


# --- after a run ---


@pytest.mark.parametrize(
    "build", [lora, lambda: lora(base=four_bit, **EVERYTHING), lambda: tiny_model(num_hidden_layers=2)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_after_a_run_the_model_is_as_plain_as_before(build, fails):
    model = build()
    before = owners(model)

    def check(record):
        assert owners(model) != before
        if fails:
            raise InterruptedError

    with pytest.raises(InterruptedError) if fails else torch.enable_grad():
        ml.train(model, random_rows(1, 4), ml.TrainConfig(batch_size=2), check)
    assert owners(model) == before
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in trained(model).values())
    assert {adapter.cast for _, adapter in factors(model)} <= {None}


def test_a_copy_that_is_made_in_the_midst_of_a_run_is_a_model_of_its_own():
    model, copies = adapted(), []
    ml.train(model, random_rows(2, 4), ml.TrainConfig(batch_size=1), lambda record: copies.append(copy.deepcopy(model)))
    assert torch.equal(weights(copies[-1]), weights(model))
    assert not torch.equal(weights(copies[0]), weights(model))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_has_no_part_in_the_loss_has_the_gradient_0(decay):
    model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "idle": nn.Linear(2, 2, bias=False)})
    before = model["idle"].weight.detach().clone()
    config = ml.TrainConfig(learning_rate=0.1, weight_decay=decay, max_steps=3)
    ml.train(model, [torch.ones(2)] * 4, config, loss=lambda model, rows: (model["used"](torch.stack(rows)).sum(), 4))
    assert torch.equal(model["idle"].weight, before) == (decay == 0)

import functools
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora import training
from minilora.adapter import adapter_layers
from minilora.runs.evaluate import held_out_loss, measure_forgetting
from minilora.runs.loop import warmup_steps
from minilora.runs.settings import COUNTS, RunConfig
from minilora.testing.compare import assert_maths, assert_parity
from tests.models import FAMILIES, bases, examples, long, seeds, set_dropout_step, tiny_model
from tests.training import (
    adapted,
    assert_same_gradient,
    gradients,
    number,
    one_step,
    plain_gradients,
    plain_loss,
    random_rows,
    stop_after,
    weights,
)

families = st.sampled_from(sorted(FAMILIES))
few = examples(0.3)
small = functools.partial(adapted, layers=2)


# --- law 8: the loss is a sum over labelled tokens divided by their number ---


@examples(0.5)
@given(families, seeds, st.sampled_from([(8, 1), (1, 8), (2, 4), (3, 3)]))
def test_any_micro_batches_give_the_gradient_of_the_mean_over_labelled_tokens(family, seed, cut):
    rows = random_rows(seed, 8)
    record, found = one_step(adapted(family), rows, batch_size=cut[0], gradient_accumulation_steps=cut[1], seed=seed)
    assert_same_gradient(found, plain_gradients(adapted(family), rows))
    assert_maths(number(record["loss"]), plain_loss(adapted(family), rows))


# --- the step ---


def warmup_of(warmup, total):
    """As flags give it: a number of steps, or hundredths of all."""
    return (warmup, warmup) if isinstance(warmup, int) else (float(warmup), math.ceil(warmup * total))


def rate_of_step(config, total, step):
    return training.learning_rate(step, total, config.learning_rate, warmup_steps(config, total), config.lr_scheduler)


@given(
    st.integers(1, 200),
    st.integers(1, 30) | st.integers(0, 99).map(lambda hundredths: Fraction(hundredths, 100)),
    st.sampled_from(["cosine", "linear", "constant"]),
)
@example(100, Fraction(7, 100), "linear")  # 0.07 * 100 is more than 7
def test_the_learning_rate_rises_linearly_and_falls_as_its_scheduler_says(total, warmup, scheduler):
    given_warmup, steps = warmup_of(warmup, total)
    config = ml.TrainConfig(learning_rate=0.5, warmup_steps=given_warmup, lr_scheduler=scheduler)
    found = number([rate_of_step(config, total, step) for step in range(total)])
    x = (torch.arange(total, dtype=torch.float64) - steps) / max(1, total - steps)
    fall = {"cosine": torch.cos(x * math.pi / 2) ** 2, "linear": 1 - x, "constant": torch.ones_like(x)}[scheduler]
    rise = (torch.arange(total, dtype=torch.float64) + 1) / max(1, steps)
    expected = 0.5 * torch.where(torch.arange(total) < steps, rise, fall)
    assert_maths(found, expected)
    assert (found > 0).all()


@few
@given(seeds, st.sampled_from([1e-3, 0.1, 1e3]))
def test_a_gradient_longer_than_the_limit_is_cut_to_it_and_its_own_norm_is_reported(seed, limit):
    rows = random_rows(seed, 4)
    free, whole = one_step(small(), rows)
    norm = free["grad_norm"]
    assert_maths(number(norm), whole.norm())
    clipped, cut = one_step(small(), rows, max_grad_norm=limit)
    assert clipped["grad_norm"] == norm
    assert_maths(cut, whole * min(1, limit / (norm + 1e-6)))  # PyTorch adds 1e-6


def test_the_weights_follow_adamw_written_out():
    rows, model = random_rows(3, 8), small()
    config = ml.TrainConfig(learning_rate=0.01, weight_decay=0.1, batch_size=2, epochs=2, warmup_steps=2)
    state = {"w": weights(model), "m": 0, "v": 0}

    def check(record):
        k, g, rate = record["step"], gradients(model), rate_of_step(config, 8, record["step"] - 1)
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["v"] = 0.999 * state["v"] + 0.001 * g**2
        m, v = state["m"] / (1 - 0.9**k), state["v"] / (1 - 0.999**k)
        state["w"] = state["w"] - rate * (m / (v.sqrt() + 1e-8) + 0.1 * state["w"])
        assert record["learning_rate"] == rate
        assert_maths(weights(model), state["w"])

    assert ml.train(model, rows, config, check).steps == 8


# --- what a run changes ---


@few
@given(families, st.sampled_from([torch.float32, torch.bfloat16]), bases)
def test_training_leaves_every_bit_of_the_base_and_changes_every_tensor_of_the_adapter(family, dtype, base):
    """And every bit of another adapter, which acts but is not trained."""
    model = base(tiny_model(family, dtype=dtype))
    for name in ("kept", "trained"):
        ml.attach(model, ml.LoraConfig(r=3, lora_alpha=6), name=name)
    ml.set_adapter(model, ["kept", "trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".trained." in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = {name for name in before if ".trained.lora_" in name}
    learned = set()

    def see(record):
        learned.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)

    ml.train(model, random_rows(6, 6), ml.TrainConfig(learning_rate=0.01, weight_decay=0.1, batch_size=2), see)
    assert learned == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in expected), name
        assert parameter.grad is None, name


def test_a_run_prints_nothing_and_leaves_the_model_ready_for_use(capfd):
    model, ids = small(lora_dropout=0.5), torch.ones(1, 3, dtype=torch.long)
    ml.train(model, random_rows(8, 4))
    assert capfd.readouterr() == ("", "")
    assert not any(module.training for module in model.modules())
    model.train()
    assert not torch.equal(model(ids), model(ids))


# --- dropout ---


@pytest.mark.parametrize("dropout", [0.4, 0.0])  # without it the seed says only the order of the rows
def test_what_is_learned_follows_from_the_seed_and_no_global_random_state(dropout):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    def run(number, seed):
        model, rows = small(dtype=torch.float32, lora_dropout=dropout), random_rows(10, 4)
        random.seed(number), np.random.seed(number), torch.manual_seed(number)  # noqa: NPY002
        before = state()
        ml.train(model, rows, ml.TrainConfig(batch_size=2, eval_steps=1, seed=seed), held_out=rows)
        assert state() == before
        return weights(model)

    assert torch.equal(run(1, seed=3), run(2, seed=3))
    assert not torch.equal(run(1, seed=3), run(1, seed=4))


def test_a_loss_of_ones_own_reads_each_held_out_row_once_and_only_as_many_as_there_are():
    asked = []

    class Held:  # random access only: no index is an error
        def __len__(self):
            return 3

        def __getitem__(self, index):
            asked.append(index)
            return torch.tensor([float(index)])

    def loss(model, rows):
        return sum(model(row).square().sum() for row in rows), len(rows)

    ml.train(torch.nn.Linear(1, 1), [torch.ones(1)], None, None, Held(), loss=loss)
    assert sorted(asked) == [0, 1, 2]


def test_a_loss_that_raises_leaves_the_random_state_of_pytorch_as_it_was():
    def fail(model, rows):
        torch.rand(1)
        raise ValueError("no loss")

    model, before = torch.nn.Linear(2, 2), torch.get_rng_state()
    with pytest.raises(ValueError, match="no loss") as error:  # whose traceback keeps the frames of the run
        ml.train(model, [1, 2], loss=fail)
    assert torch.equal(torch.get_rng_state(), before), error.traceback


def test_seed_step_layer_and_adapter_each_have_a_mask_of_their_own():
    model = small(lora_dropout=0.5, name="a")
    ml.attach(model, ml.LoraConfig(lora_dropout=0.5), name="b")
    model.train()
    q, k = (adapter_layers(model)[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")

    def mask(seed=1, step=2, layer=q, name="a"):
        set_dropout_step(model, seed, step)
        return layer.adapters[name].dropout(torch.ones(5, 24)).flatten().tolist()

    assert mask() == mask()
    assert set(mask()) == {0.0, 2.0}
    assert len({tuple(m) for m in (mask(), mask(seed=2), mask(step=3), mask(layer=k), mask(name="b"))}) == 5


@few
@given(st.integers(1, 3), seeds)
def test_no_two_micro_batches_of_a_run_share_a_mask(accumulation, seed):
    model = small(lora_dropout=0.5)
    keys = []
    layer = next(iter(adapter_layers(model).values()))
    layer.register_forward_pre_hook(lambda module, inputs: keys.append(int(module.adapters["default"].dropout.seed)))
    config = ml.TrainConfig(batch_size=2, gradient_accumulation_steps=accumulation, epochs=2, seed=seed)
    ml.train(model, random_rows(11, 7), config)
    assert len(keys) == len(set(keys)) == 8


# --- stopping ---


@examples(0.4)
@given(st.integers(1, 4))
def test_a_run_stops_after_the_step_whose_callback_says_so(step):
    model, whole, rows = small(), small(), random_rows(12, 4)
    config = ml.TrainConfig(batch_size=1)
    result = ml.train(model, rows, config, stop_after(step))
    assert (result.steps, result.total_steps, result.finished) == (step, 4, step == 4)
    after = []
    ml.train(whole, rows, config, lambda record: after.append(weights(whole)))
    assert torch.equal(weights(model), after[step - 1])


def break_loss(model):
    model.model.layers[1].mlp.up_proj.base.weight.data[1, 1] = math.nan


def break_gradient(model):
    factor = model.model.layers[1].self_attn.v_proj.adapters["default"].lora_B
    factor.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(
    ("break_", "limit"), [(break_loss, 1.0), (break_gradient, 1.0), *long((break_loss, 0), (break_gradient, 0))]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(break_, limit):
    rows, model = random_rows(13, 6), small()
    kept = {}

    def break_after_two_steps(record):
        if record["step"] == 2:
            break_(model)
            kept["weights"] = weights(model)

    config = ml.TrainConfig(batch_size=1, gradient_accumulation_steps=2, max_grad_norm=limit)
    with pytest.raises(ml.TrainingError) as error:
        ml.train(model, rows, config, break_after_two_steps)
    assert str(error.value).startswith("step 3: ")
    named = [row.source for row in rows if f"{row.source}," in str(error.value) or f"{row.source}." in str(error.value)]
    assert len(named) == 2
    assert torch.equal(weights(model).nan_to_num(), kept["weights"].nan_to_num())


def test_the_norm_of_many_numbers_loses_no_digits():
    weight = torch.nn.Parameter(torch.zeros(2**24))
    weight.grad = torch.rand(2**24, generator=torch.Generator().manual_seed(0))
    expected = weight.grad.double().norm()  # one float32 sum is off by 5e-4
    found = training.update(torch.optim.SGD([weight], lr=0.0), torch.zeros(()), count=1, max_grad_norm=0)
    assert_parity(torch.tensor(found.grad_norm), expected)


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_with_any_optimizer_the_weights_stay_where_the_gradient_is_not_finite(is_fused, is_finite):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=is_fused)
    factor = 1.0 if is_finite else math.inf
    step = training.train_step(torch.nn.Module(), optimizer, [None], lambda *_: (factor * weight.sum(), 1))
    assert math.isfinite(step.grad_norm) == is_finite
    assert torch.equal(weight, torch.ones(3)) != is_finite


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ml.Example([1, 61, 2], [-100, -100, 2], "a:3"), "'a:3' holds token 61; the model has tokens 0 to 60"),
        (ml.Example([1, 2], [-100, 99], "a:3"), "'a:3' holds token 99; the model has tokens 0 to 60"),
        (ml.Example([1, 2, 3], [1, 2], "a:3"), "'a:3' has 2 labels for 3 tokens"),
        ({"text": "the cat"}, "found the row {'text': 'the cat'}, need an ml.Example"),
    ],
)
def test_rows_that_the_model_cannot_learn_are_refused_by_their_source(row, message):
    rows = random_rows(14, 2)
    in_held_out = functools.partial(ml.train, dataset=rows)
    for look in (ml.train, lambda model, rows: in_held_out(model, held_out=rows), held_out_loss, measure_forgetting):
        with pytest.raises(ml.DataError, match=re.escape(message)):
            look(small(), [*rows, row])


def test_no_examples_are_refused_and_a_model_of_another_kind_needs_a_loss():
    with pytest.raises(ml.DataError, match="no examples"):
        ml.train(small(), [])
    with pytest.raises(ml.TrainingError, match=r"Linear: .* give loss="):
        ml.train(torch.nn.Linear(2, 2), random_rows(14, 2))


# --- evaluation on the way ---


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 7]), (None, [7])])
def test_evaluations_come_every_so_many_steps_and_after_the_last_and_change_nothing(every, expected):
    rows, held_out, records = random_rows(15, 7), random_rows(16, 3), []
    model, alone = small(lora_dropout=0.4), small(lora_dropout=0.4)
    ml.train(alone, rows, ml.TrainConfig(batch_size=1))

    def check(record):
        if "eval_loss" in record:
            records.append(record["step"])
            assert record["eval_loss"] == held_out_loss(model, held_out)

    ml.train(model, rows, ml.TrainConfig(batch_size=1, eval_steps=every), check, held_out)
    assert records == expected
    assert torch.equal(weights(model), weights(alone))


# --- the configuration ---


POSITIVE = ("learning_rate", "epochs")


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        *((ml.TrainConfig, name, 0) for name in COUNTS.split()),
        *((ml.TrainConfig, name, -1) for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed")),
        *((ml.TrainConfig, name, value) for name in POSITIVE for value in (0, -1.0, math.inf, math.nan)),
        (ml.TrainConfig, "seed", 2**32),
        *((ml.TrainConfig, "warmup_steps", value) for value in (1.5, math.inf, math.nan)),
        *((RunConfig, "eval_split", value) for value in (-1, 1, math.nan)),
        (ml.DataConfig, "max_length", 0),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(cls, name, value):
    with pytest.raises(ml.ConfigError, match=re.escape(f"{name} is {value!r}, need")):
        cls(**{name: value})

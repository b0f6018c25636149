"""The laws of the loss and of accumulation: what is right passes, and each mistake is found and named."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli import selftest
from minilora.testing import (
    CheckFailure,
    MaskedLogits,
    MicroBatches,
    assert_maths,
    check_accumulation,
    check_loss_masking,
    laws,
    on_numpy,
    reference,
)
from minilora.testing.compare import Bounded, worst
from minilora.testing.data_laws import GROUPS, ROWS
from minilora.testing.implementations import accumulated_gradient, masked_loss
from minilora.testing.laws import FAR
from minilora.testing.mutants_data import weight_changed
from tests.models import either, matrix

CPU = torch.device("cpu")
masks = st.lists(st.sampled_from("x."), min_size=2, max_size=5).map("".join)


# --- the oracles ---


@given(st.integers(0, 99), masks, masks)
def test_the_gradient_of_the_loss_is_the_slope_of_the_loss(seed, first, second):
    case = MaskedLogits((first, second.ljust(len(first), ".")[: len(first)]), 3, seed=seed)
    direction, step = np.random.default_rng(seed).standard_normal(case.logits.shape), 1e-5
    ahead, behind = (reference.masked_loss(case.logits + s * direction, case.labels) for s in (step, -step))
    slope = (reference.masked_loss_gradient(case.logits, case.labels) * direction).sum()
    if not np.isnan(ahead):
        assert_maths((ahead - behind) / (2 * step), Bounded(slope, np.asarray(1e-8)))


def test_the_loss_is_the_logarithm_of_a_product_of_probabilities():
    case = MaskedLogits((".x.x", "xx.."), 4)
    chance, (b, t) = 1.0, (np.array([0, 0, 1]), np.array([0, 2, 0]))
    for z, label in zip(case.logits[b, t], case.labels[b, t + 1], strict=True):
        chance *= np.exp(z[label]) / np.exp(z).sum()
    assert_maths(reference.masked_loss(case.logits, case.labels), -np.log(chance) / 3)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_gradient_of_a_step_is_the_slope_of_the_loss_of_all_its_rows(groups):
    case = MicroBatches(groups)
    rows = sum(map(len, groups))
    ((x, labels),) = case.batches((tuple(range(rows)),))
    for index in np.ndindex(case.W.shape):
        step = np.zeros(case.W.shape)
        step[index] = 1e-5
        ahead, behind = (reference.masked_loss(x @ (case.W + s * step).T, labels) for s in (1, -1))
        found = reference.accumulated_gradient(case.W, list(case.batches()))[index]
        assert_maths((ahead - behind) / 2e-5, Bounded(found, np.asarray(1e-8)))


@pytest.mark.parametrize("case", [*map(MaskedLogits, ROWS), *map(MicroBatches, GROUPS)], ids=str)
def test_the_formula_of_the_mistakes_gives_the_right_result_where_there_is_none(case, monkeypatch):
    monkeypatch.setattr(type(case.places), "wrong", lambda self: {"none": self.right})
    assert_maths(case.wrong_gradients()["none"], case.gradient.value)


def test_every_known_mistake_is_far_from_the_right_result_in_some_case():
    told, known = set(), set()
    for case in [*map(MaskedLogits, ROWS), *map(MicroBatches, GROUPS)]:
        for cause, wrong in case.wrong_gradients().items():
            known.add(cause)
            if worst(wrong, case.gradient).ratio > FAR:
                told.add(cause)
    assert told == known


# --- what is right ---


our_loss, our_step = (functools.partial(function, torch.device("cpu")) for function in (selftest.loss, selftest.step))


def numpy_loss(logits, labels):
    z, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
    z = z - z.max(-1, keepdims=True)
    losses = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return losses[targets != -100].sum() / (targets != -100).sum()


@either
@pytest.mark.parametrize("loss_fn", [our_loss, on_numpy(numpy_loss), lambda z, y: masked_loss(z.float(), y)])
def test_a_right_loss_passes(loss_fn):
    assert len(check_loss_masking(loss_fn)) > 5


@either
def test_a_right_step_passes():
    assert len(check_accumulation(our_step)) == 4


@pytest.mark.parametrize("result", [0.0, float("nan"), ValueError("no labels")])
def test_a_loss_without_labels_may_be_0_or_nan_or_an_error(result):
    def loss_fn(logits, labels):
        if isinstance(result, Exception):
            raise result
        return result

    laws("loss_masking")["no_labels"].check(loss_fn)


# --- mistakes, each planted by hand ---


def losses(logits, labels):
    """-log p of each label, 0 where there is none."""
    z, targets = logits[:, :-1], labels[:, 1:]
    found = z.logsumexp(-1) - z.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0, found)


def number(labels):
    return (labels[:, 1:] != -100).sum()


def row_means(logits, labels):
    return (losses(logits, labels).sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).mean()


def with_mask(logits, labels, mask):
    return (losses(logits, labels) * mask).sum() / (mask & (labels[:, 1:] != -100)).sum()


LOSSES = {
    "nothing is shifted": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "the shift is made twice": lambda z, y: masked_loss(z[:, :-1], y[:, 1:]),
    "the shift goes the wrong way": lambda z, y: F.cross_entropy(z[:, 1:].flatten(0, 1), y[:, :-1].flatten()),
    "the label mask is one position late": lambda z, y: with_mask(z, y, y[:, :-1] != -100),
    "the label mask is one position early": lambda z, y: with_mask(z, y, F.pad(y[:, 2:] != -100, (0, 1))),
    "positions without a label, such as padding": lambda z, y: masked_loss(z, y.clamp(min=0)),
    "token 0 is taken for padding": lambda z, y: masked_loss(z, y.where(y != 0, -100)),
    "it is the mean of the means of the rows": row_means,
    "divided by all positions but the last": lambda z, y: losses(z, y).mean(),
    "divided by all positions instead of": lambda z, y: losses(z, y).sum() / y.numel(),
    "the sum of the losses is not divided": lambda z, y: losses(z, y).sum(),
    "divided by the number of labels twice": lambda z, y: losses(z, y).sum() / number(y) ** 2,
    "divided by the number of rows": lambda z, y: losses(z, y).sum() / len(y),
    "the labels are counted before the shift": lambda z, y: losses(z, y).sum() / (y != -100).sum(),
    "the labels are rolled": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.roll(-1, 1).flatten()),
    "the rows are shifted as one": lambda z, y: F.cross_entropy(z.flatten(0, 1)[:-1], y.flatten()[1:]),
    "the loss has the wrong sign": lambda z, y: -masked_loss(z, y),
}


@matrix(3, cause=LOSSES)
def test_a_mistake_of_a_loss_is_named_by_value_and_by_gradient(cause):
    for name in ("value", "gradient"):
        with pytest.raises(CheckFailure, match=r"to repeat:\n.*import MaskedLogits, laws\n") as failure:
            laws("loss_masking")[name].check(LOSSES[cause])
        assert any(cause in each for each in failure.value.causes), failure.value
        with pytest.raises(CheckFailure):
            laws("loss_masking")[name].check(LOSSES[cause], failure.value.case)


def underflowing(logits, labels):
    chance = logits[:, :-1].softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.where(labels[:, 1:] == -100, 0, -chance.log()).sum() / number(labels)


UNNAMED = {  # the law that finds it
    "no gradient": ("gradient", lambda z, y: masked_loss(z.detach(), y)),
    "a gradient where no label follows": ("gradient", lambda z, y: masked_loss(z, y) + z[y == -100].sum() * 1e-30),
    "16 bits inside": ("value", lambda z, y: masked_loss(z.bfloat16(), y)),
    "smoothed labels": (
        "value",
        lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), label_smoothing=1e-3),
    ),
    "logits without labels": ("masked", lambda z, y: masked_loss(z, y) + 1e-3 * z.max()),
    "the last logits": ("shift", lambda z, y: masked_loss(z, y) + 1e-3 * z[:, -1].max()),
    "the width of the rows": ("padding", lambda z, y: masked_loss(z, y) * (1 + 1e-3 * (y.size(1) > 6))),
    "the order of the rows": ("padding", lambda z, y: masked_loss(z, y) + 1e-3 * z[0].sum()),
    "empty rows": (
        "empty_rows",
        lambda z, y: torch.stack([masked_loss(a[None], b[None]) for a, b in zip(z, y, strict=True)]).mean(),
    ),
    "one label": ("one_label", lambda z, y: masked_loss(z, y) * (1 + 1e-3 * (number(y) == 1))),
    "a loss of nothing": ("no_labels", lambda z, y: masked_loss(z, y).nan_to_num(1.0)),
    "small probabilities": ("huge", underflowing),
    "a clamped loss": ("huge", lambda z, y: losses(z, y).clamp(max=100).sum() / number(y)),
    "16-bit logits": ("16-bit", lambda z, y: masked_loss(z.to(torch.float8_e4m3fn).to(z.dtype), y)),
    "rows of many labels": ("unequal", row_means),
}


@pytest.mark.parametrize("mistake", UNNAMED)
def test_each_law_of_the_loss_finds_what_breaks_it(mistake):
    name, loss_fn = UNNAMED[mistake]
    with pytest.raises(CheckFailure):
        laws("loss_masking")[name].check(loss_fn)
    laws("loss_masking")[name].check(masked_loss)


def backward_of(loss):
    def step_fn(W, micro_batches):
        W = W.clone().requires_grad_()
        loss(W, [(x @ W.T, labels) for x, labels in micro_batches]).backward()
        return W.grad

    return step_fn


def total(batches):
    return sum(number(labels) for _, labels in batches)


def sums(batches):
    return sum(losses(z, y).sum() for z, y in batches)


def means(batches):
    return [losses(z, y).sum() / number(y).clamp(min=1) for z, y in batches]


STEPS = {
    "it is the mean of the means of the micro-batches": lambda W, b: sum(means(b)) / len(b),  # litgpt's
    "it is the mean of the means of the rows": lambda W, b: (
        sum(row_means(z, y) * len(y) for z, y in b) / sum(len(y) for _, y in b)
    ),
    "the means of the micro-batches are added": lambda W, b: sum(means(b)),
    "divided by the number of micro-batches, too": lambda W, b: sums(b) / total(b) / len(b),
    "divided by the number of micro-batches twice": lambda W, b: sum(means(b)) / len(b) ** 2,
    "the number of micro-batches instead of the labels": lambda W, b: sums(b) / len(b),
    "divided by the labels of the last micro-batch": lambda W, b: sums(b) / number(b[-1][1]),
    "that of the last micro-batch only": lambda W, b: means(b)[-1],
    "the last micro-batch only, divided by all labels": lambda W, b: sums(b[-1:]) / total(b),
    "that of the first micro-batch only": lambda W, b: means(b)[0],
    "the sum of the losses is not divided": lambda W, b: sums(b),
    "the labels are counted before the shift": lambda W, b: sums(b) / sum((y != -100).sum() for _, y in b),
    "positions without a label": lambda W, b: (
        sum(losses(z, y.clamp(min=0)).sum() for z, y in b) / sum(y[:, 1:].numel() for _, y in b)
    ),
}


@matrix(3, cause=STEPS)
def test_a_mistake_of_accumulation_is_named(cause):
    with pytest.raises(CheckFailure, match="import MicroBatches, laws") as failure:
        check_accumulation(backward_of(STEPS[cause]))
    assert any(cause in each for each in failure.value.causes), failure.value


@pytest.mark.parametrize(
    ("law", "loss"),
    [
        ("split", lambda W, b: sums(b) / total(b) * (1 + 1e-3 * (len(b) == 1))),
        ("split", lambda W, b: sum(means(b)) / len(b)),
        ("empty", lambda W, b: sums(b) / total(b) * (1 + 1e-3 * any(number(y) == 0 for _, y in b))),
        ("empty", lambda W, b: sum(means(b)) / len(b)),
        ("single", lambda W, b: sums(b) / (total(b) if len(b) > 1 else 1)),
    ],
)
def test_each_law_of_accumulation_finds_what_breaks_it(law, loss):
    with pytest.raises(CheckFailure):
        laws("accumulation")[law].check(backward_of(loss))


def test_a_step_that_changes_the_weight_is_found():
    with pytest.raises(CheckFailure, match="W, which is only read"):
        check_accumulation(functools.partial(weight_changed, accumulated_gradient))


def test_a_loss_that_is_not_shifted_is_not_taken_for_other_mistakes():
    for law in ("value", "gradient", "one_label", "empty_rows"):
        with pytest.raises(CheckFailure) as failure:
            laws("loss_masking")[law].check(LOSSES["nothing is shifted"])
        assert failure.value.causes == ("nothing is shifted: logits at t are compared with the label at t",), law


def test_a_loss_in_bits_is_named():
    with pytest.raises(CheckFailure) as failure:
        check_loss_masking(lambda z, y: masked_loss(z, y) / np.log(2))
    assert failure.value.causes == ("the result is 1.4427 times the right one (log₂, not ln)",)

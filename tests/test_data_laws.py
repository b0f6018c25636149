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
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.compare import Bounded
from minilora.testing.data_laws import GROUPS
from minilora.testing.implementations import masked_loss
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


def counts(labels):
    """How many labels each row has."""
    return (labels[:, 1:] != -100).sum(1)


def number(labels):
    return counts(labels).sum()


def row_means(logits, labels):
    return (losses(logits, labels).sum(1) / counts(labels).clamp(min=1)).mean()


LOSSES = {
    "logits at t are compared with the label at t": lambda z, y: (
        losses(F.pad(z, (0, 0, 0, 1)), F.pad(y, (1, 0), value=-100)).sum() / (y != -100).sum()
    ),
    "the last position of a row predicts the first label of the next": lambda z, y: F.cross_entropy(
        z.flatten(0, 1)[:-1], y.flatten()[1:]
    ),
    "positions without a label are learned as token 0": lambda z, y: losses(z, y.clamp(min=0)).mean(),
    "token 0 is taken for padding": lambda z, y: losses(z, y.where(y != 0, -100)).sum() / number(y.where(y != 0, -100)),
    "it is the mean of the means of the rows": lambda z, y: (
        (losses(z, y).sum(1) / counts(y).clamp(min=1)).sum() / (counts(y) > 0).sum()
    ),
    "the sum is divided by all positions": lambda z, y: losses(z, y).sum() / y.numel(),
    "the sum is not divided": lambda z, y: losses(z, y).sum(),
    "the labels are counted before the shift": lambda z, y: losses(z, y).sum() / (y != -100).sum(),
}


@matrix(3, cause=LOSSES)
def test_a_mistake_of_a_loss_is_named_by_value_and_by_gradient(cause):
    for name in ("value", "gradient"):
        with pytest.raises(CheckFailure, match=r"to repeat:\n.*import MaskedLogits, laws\n") as failure:
            laws("loss_masking")[name].check(LOSSES[cause])
        assert cause in failure.value.causes
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
    "it is the mean of the means of the micro-batches": lambda W, b: sum(means(b)) / sum(number(y) > 0 for _, y in b),
    "the gradient is that of the last micro-batch": lambda W, b: means(b)[-1],
    "the labels are counted before the shift": lambda W, b: sums(b) / sum((y != -100).sum() for _, y in b),
}


@matrix(3, cause=STEPS)
def test_a_mistake_of_accumulation_is_named(cause):
    with pytest.raises(CheckFailure, match="import MicroBatches, laws") as failure:
        check_accumulation(backward_of(STEPS[cause]))
    assert failure.value.causes == (cause,)


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
        check_accumulation(CATALOGUE["accumulation"]["the weight that was given is changed"])

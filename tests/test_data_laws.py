"""The laws of the loss and of accumulation, and their oracles: what is right passes."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import llama
from minilora.data import Example, collate
from minilora.testing import (
    MaskedLogits,
    MicroBatches,
    assert_maths,
    check_accumulation,
    check_loss_masking,
    laws,
    on_numpy,
    reference,
)
from minilora.testing.compare import Bounded
from minilora.testing.data_laws import GROUPS, padded
from minilora.testing.implementations import loss_sum, masked_loss
from minilora.training import adamw, train_step
from tests.models import either

CPU = torch.device("cpu")
masks = st.lists(st.sampled_from("x."), min_size=2, max_size=5).map("".join)


# --- the oracles ---


@given(st.integers(0, 99), masks, masks)
def test_the_gradient_of_the_loss_is_the_slope_of_the_loss(seed, first, second):
    case = MaskedLogits((first, second.ljust(len(first), ".")[: len(first)]), 3, seed=seed)
    direction, step = np.random.default_rng(seed).standard_normal(case.logits.shape), 1e-5
    ahead, behind = (reference.masked_loss(case.logits + s * direction, case.labels) for s in (step, -step))
    slope = (case.gradient.value * direction).sum()
    if not np.isnan(ahead):
        assert_maths(reference.masked_loss(case.logits, case.labels), case.loss)
        assert_maths((ahead - behind) / (2 * step), Bounded(slope, np.asarray(1e-8)))


@pytest.mark.parametrize("groups", GROUPS)
def test_the_gradient_of_a_step_is_the_slope_of_the_loss_of_all_its_rows(groups):
    case = MicroBatches(groups)
    x, labels = padded([row for rows in case.rows for row in rows])
    for index in np.ndindex(case.W.shape):
        step = np.zeros(case.W.shape)
        step[index] = 1e-5
        ahead, behind = (reference.masked_loss(x @ (case.W + s * step).T, labels) for s in (1, -1))
        assert_maths((ahead - behind) / 2e-5, Bounded(case.gradient.value[index], np.asarray(1e-8)))


# --- what is right ---


def our_loss(logits, labels):
    """The loss of logits in the place of hidden states."""
    batch = collate([Example([0] * len(row), row) for row in labels.tolist()], CPU)
    rows = logits.flatten(0, 1).index_select(0, batch.label_positions)
    return llama.cross_entropy(rows, batch.labels, nn.Identity()) / len(batch.labels)


def our_step(W, micro_batches):
    """The gradient of one step of `train_step`, of a model that is its head W alone."""
    head, batches = nn.Linear(W.size(1), W.size(0), bias=False, dtype=W.dtype), []
    head.weight.data.copy_(W)
    for x, labels in micro_batches:
        batch = collate([Example([0] * len(row), row) for row in labels.tolist()], CPU)
        batches.append(replace(batch, tokens=x.flatten(0, 1)))
    decoder = Mock(side_effect=lambda hidden, lengths, checkpointing: hidden)
    train_step(
        Mock(model=decoder, get_output_embeddings=lambda: head), adamw(head.parameters()), batches, max_grad_norm=0
    )
    return torch.zeros_like(W) if head.weight.grad is None else head.weight.grad


def numpy_loss(logits, labels):
    z, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
    z = z - z.max(-1, keepdims=True)
    losses = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return losses[targets != -100].sum() / (targets != -100).sum()


@either
@pytest.mark.parametrize("loss_fn", [our_loss, on_numpy(numpy_loss), lambda z, y: masked_loss(z.float(), y)])
def test_a_right_loss_passes(loss_fn):
    assert len(check_loss_masking(loss_fn)) == 5


def step_of_a_rank(W, micro_batches, all_reduce, rank, world_size):
    """The gradient of a step whose options have no defaults; each rank's is divided by the count of all."""
    count = all_reduce(torch.tensor(sum(int((labels[:, 1:] != -100).sum()) for _, labels in micro_batches)))
    grad = torch.zeros_like(W)
    for x, labels in micro_batches:
        leaf = W.clone().requires_grad_()
        (loss_sum(x @ leaf.T, labels) / count).backward()
        grad += leaf.grad
    return all_reduce(grad)


@either
@pytest.mark.parametrize("step_fn", [our_step, step_of_a_rank])
def test_a_right_step_passes(step_fn):
    assert len(check_accumulation(step_fn)) == 2


@pytest.mark.parametrize("result", [0.0, float("nan"), ValueError("no labels")])
def test_a_loss_without_labels_may_be_0_or_nan_or_an_error(result):
    def loss_fn(logits, labels):
        if isinstance(result, Exception):
            raise result
        return result

    laws("loss_masking")["no_labels"].check(loss_fn)

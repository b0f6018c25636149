"""The law that a step trains all that is meant to be trained: what is right passes, and each mistake is named."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora as ml
from minilora.testing import CheckFailure, check_trains_everything
from tests.models import tiny_model

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def model_of(**changes):
    layers = {"first": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "last": nn.Linear(4, 1)}
    return nn.Sequential(*{**layers, **changes}.values())


def stepper(model, parameters=None, forward=None, lr=0.1):
    optimizer = torch.optim.SGD(list(parameters or model.parameters()), lr)

    def step():
        (forward or model)(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_a_step_that_trains_everything_passes_with_statistics_of_batch_norms():
    model = model_of()
    assert check_trains_everything(model, stepper(model)).comparisons == 6


def test_our_training_of_an_adapter_passes_though_a_has_no_gradient_at_first():
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=2, target_modules="all-linear"))
    rows = [ml.Example([1, 2, 3, 4], [-100, 2, 3, 4])] * 4
    check_trains_everything(model, lambda: ml.train(model, rows, ml.TrainConfig(max_steps=2, learning_rate=0.1)))


class Copied(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach().clone(), self.bias)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x) + 0 * self.experts[1](x)


class Recomputed(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def refused(match, model, step=None, trained=None):
    with pytest.raises(CheckFailure, match=match) as failure:
        check_trains_everything(model, step or stepper(model), trained)
    return str(failure.value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (Copied(4, 4), r"0\.weight: unchanged; no gradient came to it: .* or uses a copy"),
        (Recomputed(4, 4), r"0\.bias: unchanged; no gradient came to it: .*checkpointing"),
        (Experts(), r"0\.experts\.1\.weight: unchanged; its gradient was exactly 0: .*no token reached it"),
    ],
)
def test_what_no_gradient_reaches_is_named(layer, cause):
    assert "2.weight" not in refused(cause, model_of(first=layer))


def test_what_the_optimizer_lacks_and_what_rounding_swallows_are_named():
    model = model_of()
    refused("2.weight: unchanged; its gradient was not 0: the optimizer", model, stepper(model, model[0].parameters()))
    refused("rounded away in torch.float32", model, stepper(model, lr=1e-30))


def test_what_is_frozen_what_is_not_meant_and_what_is_tied_are_named():
    model = model_of()
    model[0].weight.requires_grad_(False)
    refused("0.weight: unchanged; it is frozen", model, trained=["0.weight", "0.bias"])
    refused("2.bias: changed; it requires a gradient", model, trained=["0.bias"])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    refused("1.weight: changed; it is tied: one tensor with 0.weight", tied, trained=["0.weight", "0.bias", "1.bias"])


def test_weight_decay_alone_is_no_training():
    model = model_of(first=Experts())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()

    refused(r"0\.experts\.1\.weight: changed only by weight decay or momentum; its gradient was", model, step)


def test_an_optimizer_that_steps_in_the_backward_pass_passes():
    model = model_of()

    def descend(parameter):
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(descend)
    check_trains_everything(model, lambda: model(X).square().sum().backward())


def test_a_base_that_is_written_to_and_numbers_that_are_not_finite_are_named():
    model = model_of()
    model[0].requires_grad_(False)
    model[1].register_parameter("tied", model[0].weight)  # which is not why it changes
    step = stepper(model)

    def merging():
        step()
        model[0].weight.data += 0.1

    refused("0.weight: changed; it is frozen, and something wrote to it", model, merging)
    refused("2.weight: not finite", model, stepper(model, lr=float("inf")))


def test_arrays_of_another_library_pass_and_are_refused():
    arrays = {"W": np.ones(3), "A": np.ones(2)}

    def step():
        arrays["A"] = arrays["A"] - 0.1

    check_trains_everything(lambda: arrays, step, trained=["A"])
    refused("W: unchanged; no step wrote to it", lambda: arrays, step, trained=["W", "A"])
    refused("A: changed; it is not meant to be trained", lambda: arrays, step, trained=["W"])


def test_names_that_the_model_does_not_have_and_none_are_errors():
    model = model_of()
    with pytest.raises(ValueError, match=r"the model has no 'x'; it has 0\.weight"):
        check_trains_everything(model, stepper(model), trained=["x"])
    with pytest.raises(ValueError, match="trained: found no name"):
        check_trains_everything(lambda: {"W": np.ones(1)}, stepper(model))

"""What a solution of exercise A2 must do."""

from __future__ import annotations

import math
import statistics
from types import ModuleType

import torch

REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.5, -2.0, 3.0, 0.25]]


def check_advantages(answer: ModuleType) -> None:
    """Each row is compared with itself, and a row of equal rewards has zeros."""
    found = answer.advantages(torch.tensor([*REWARDS, [1.0] * 4], dtype=torch.float64))
    assert isinstance(found, torch.Tensor), f"found {type(found).__name__}, need a tensor"
    assert found.shape == (4, 4), f"the shape is {tuple(found.shape)}, need (4, 4)"
    assert found.isfinite().all(), f"rewards {[1.0] * 4}: found {found[-1].tolist()}. What is 0/0?"
    for row, values in zip([*REWARDS, [1.0] * 4], found.tolist(), strict=True):
        mean, std = statistics.mean(row), statistics.stdev(row)
        for reward, value in zip(row, values, strict=True):
            need = (reward - mean) / (std + 1e-6)
            assert math.isclose(value, need, rel_tol=1e-6, abs_tol=1e-9), (
                f"rewards {row}: the advantage of {reward:g} is {value:.4f}, need {need:.4f}. Whom is it compared with?"
            )


def check_policy_loss(answer: ModuleType) -> None:
    """The gradient is -advantage / n for each answer, groups of equal rewards have none, and rewards get none."""
    log_probs = torch.linspace(-3, -0.1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    loss = answer.policy_loss(log_probs, rewards)
    assert isinstance(loss, torch.Tensor), f"policy_loss returns {type(loss).__name__}, need a tensor"
    assert loss.shape == (), f"the shape is {tuple(loss.shape)}, need a single number"
    loss.backward()
    assert log_probs.grad is not None, "no gradient reaches the log-probabilities"
    assert rewards.grad is None, "a gradient flows through the rewards. Which factor is a constant?"
    for row, slopes in zip(REWARDS, log_probs.grad.tolist(), strict=True):
        mean, std = statistics.mean(row), statistics.stdev(row)
        for reward, slope in zip(row, slopes, strict=True):
            right = -(reward - mean) / (std + 1e-6) / 12
            assert not math.isclose(slope, -right, rel_tol=1e-6), (
                f"rewards {row}: does a good answer become more likely, or less likely, when your loss falls?"
            )
            assert math.isclose(slope, right, rel_tol=1e-6), (
                f"rewards {row}: the gradient of the answer with reward {reward:g} is {slope:.5f}, need {right:.5f}. "
                "With whom is an answer compared, and over what is the loss a mean?"
            )
    log_probs.grad = None
    answer.policy_loss(log_probs, torch.tensor([[1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0]]).double()).backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all(), "a group of equal rewards makes the gradient NaN. What was divided by what?"
    assert not log_probs.grad[:2].any(), "a group of equal rewards says nothing about what to change: need gradient 0"

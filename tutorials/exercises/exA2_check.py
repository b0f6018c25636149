"""What a solution of exercise A2 must do."""

from __future__ import annotations

import math
import statistics
from types import ModuleType

import torch

REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.5, -2.0, 3.0, 0.25]]


def check_leave_one_out(answer: ModuleType) -> None:
    """Each answer is compared with the others of its row, and only with them."""
    found = answer.leave_one_out(torch.tensor([*REWARDS, [1.0] * 4], dtype=torch.float64))
    assert isinstance(found, torch.Tensor), f"found {type(found).__name__}, need a tensor"
    assert found.shape == (4, 4), f"the shape is {tuple(found.shape)}, need (4, 4)"
    for row, values in zip([*REWARDS, [1.0] * 4], found.tolist(), strict=True):
        for i, value in enumerate(values):
            need = advantage(row, i)
            why = " Is the answer one of the others?" if math.isclose(value, need * 3 / 4) else ""
            assert math.isclose(value, need, rel_tol=1e-6, abs_tol=1e-9), (
                f"rewards {row}: the advantage of {row[i]:g} is {value:.4f}, need {need:.4f}.{why}"
            )


def advantage(row: list[float], i: int) -> float:
    """The reward of answer i, less the mean of the others."""
    return row[i] - statistics.mean(row[:i] + row[i + 1 :])


def check_policy_loss(answer: ModuleType) -> None:
    """The gradient is -advantage / n for each answer, and rewards get none."""
    log_probs = torch.linspace(-3, -0.1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    loss = answer.policy_loss(log_probs, rewards)
    assert isinstance(loss, torch.Tensor), f"policy_loss returns {type(loss).__name__}, need a tensor"
    assert loss.shape == (), f"the shape is {tuple(loss.shape)}, need a single number"
    loss.backward()
    assert log_probs.grad is not None, "no gradient reaches the log-probabilities"
    assert rewards.grad is None, "a gradient flows through the rewards. Which factor is a constant?"
    for row, slopes in zip(REWARDS, log_probs.grad.tolist(), strict=True):
        for i, (reward, slope) in enumerate(zip(row, slopes, strict=True)):
            right = -advantage(row, i) / 12
            assert not math.isclose(slope, -right, rel_tol=1e-6), (
                f"rewards {row}: does a good answer become more likely, or less likely, when your loss falls?"
            )
            assert math.isclose(slope, right, rel_tol=1e-6), (
                f"rewards {row}: the gradient of the answer with reward {reward:g} is {slope:.5f}, need {right:.5f}. "
                "With whom is an answer compared, and over what is the loss a mean?"
            )

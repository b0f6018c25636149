"""What a solution of exercise A1 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch

PAIRS = [(-3.0, -5.0, -4.0, -4.5), (-9.0, -2.0, -3.0, -2.5), (-7.0, -7.0, -7.0, -7.0)]  # in the order of the arguments


def check_log_prob(answer: ModuleType) -> None:
    """The sum is that of loops over the tokens of the answer, and a gradient reaches the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.tensor([3, 0, 1, 2, 0, 3])
    each = [math.log(logits[t].softmax(0)[token].item()) for t, token in enumerate(tokens[1:].tolist())]
    late = [math.log(logits[t].softmax(0)[token].item()) for t, token in enumerate(tokens.tolist())]
    for first in (1, 3, 5):
        found, need = answer.log_prob(logits, tokens, first), sum(each[first - 1 :])
        assert isinstance(found, torch.Tensor), f"log_prob returns {type(found).__name__}, need a tensor"
        wrong = {". Which row of the logits saw the first token of the answer?": sum(late[first:])}
        if first > 1:
            wrong[". Does the prompt count?"] = sum(each)
        if found.dim() == 0 and not math.isclose(found.item(), need, rel_tol=1e-9):
            why = next((why for why, value in wrong.items() if math.isclose(found.item(), value, rel_tol=1e-9)), "")
            raise AssertionError(f"answer from place {first} of 6: you say {found:.4f}, loops say {need:.4f}{why}")
        assert found.dim() == 0, f"the shape is {tuple(found.shape)}, need a single number"
    assert answer.log_prob(logits, tokens, 2).requires_grad, "no gradient can reach the logits"


def check_dpo(answer: ModuleType) -> None:
    """`dpo` and its gradient equal the formula, it is finite for any margin, and the reference is a constant."""
    beta = 0.3
    arguments = [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*PAIRS, strict=True)]
    found = answer.dpo(*arguments, beta)
    assert isinstance(found, torch.Tensor), f"dpo returns {type(found).__name__}, need a tensor"
    assert found.shape == (3,), f"the shape is {tuple(found.shape)}, need one loss for each of the 3 pairs"
    assert math.isclose(found[2].item(), math.log(2)), (
        f"where policy and reference agree the loss is {found[2]:.6f}, not log 2: nothing has been learned yet"
    )
    for pair, loss in zip(PAIRS, found.tolist(), strict=True):
        margin = (pair[0] - pair[2]) - (pair[1] - pair[3])
        expected = math.log1p(math.exp(-beta * margin))
        alone = math.log1p(math.exp(-beta * (pair[0] - pair[1])))
        assert not math.isclose(loss, alone, rel_tol=1e-9) or math.isclose(loss, expected), (
            "of four numbers in a pair, how many does your loss depend on?"
        )
        assert math.isclose(loss, expected, rel_tol=1e-9), (
            f"policy: chosen {pair[0]}, rejected {pair[1]}; reference: {pair[2]}, {pair[3]}; β = {beta}: "
            f"the loss is {loss:.6f}, need {expected:.6f}. Should it grow or fall with the margin?"
        )
    found.sum().backward()
    slopes = [-beta / (1 + math.exp(beta * ((c - rc) - (r - rr)))) for c, r, rc, rr in PAIRS]
    for name, argument, sign in (("chosen", arguments[0], 1), ("rejected", arguments[1], -1)):
        assert argument.grad is not None, f"no gradient reaches the {name} answers; only the reference is a constant"
        for i, slope in enumerate(slopes):
            assert math.isclose(argument.grad[i].item(), sign * slope, rel_tol=1e-9), (
                f"policy and reference: {PAIRS[i]}: the gradient of the {name} answer is {argument.grad[i]:.6f}, not "
                f"{sign * slope:.6f}. The loss is right there, but a model learns from its gradient"
            )
    assert all(argument.grad is None for argument in arguments[2:]), (
        "a gradient reaches the reference. What is a constant here?"
    )
    far = answer.dpo(*(torch.tensor([value]) for value in (-5000.0, 0.0, 0.0, 0.0)), beta)
    assert math.isclose(far.item(), 1500, rel_tol=1e-5), (
        f"for a margin of -5000 the loss is {far.item()}, not 1500: what is σ of a large "
        "negative number in float32, and what is its logarithm?"
    )


def check_dpo_per_token(answer: ModuleType) -> None:
    """Each answer's change is divided by its own length, and the gradient with it; the reference is a constant."""
    beta, lengths = 0.5, [(2, 8), (5, 5), (40, 3)]
    policy = torch.tensor([pair[:2] for pair in PAIRS], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([pair[2:] for pair in PAIRS], dtype=torch.float64, requires_grad=True)
    found = answer.dpo_per_token(policy, reference, torch.tensor(lengths), beta)
    assert isinstance(found, torch.Tensor), f"dpo_per_token returns {type(found).__name__}, need a tensor"
    assert found.shape == (3,), f"the shape is {tuple(found.shape)}, need one loss for each of the 3 pairs"
    found.sum().backward()
    for i, ((c, r, of_c, of_r), (m, n)) in enumerate(zip(PAIRS, lengths, strict=True)):
        margin = (c - of_c) / m - (r - of_r) / n
        case = f"policy {c}, {r}; reference {of_c}, {of_r}; {m} and {n} tokens; β = {beta}: the loss is {found[i]:.6f}"
        right = math.log1p(math.exp(-beta * margin))
        together = math.log1p(math.exp(-beta * ((c - of_c) - (r - of_r)) / (m + n)))
        assert not math.isclose(found[i].item(), together, rel_tol=1e-9) or math.isclose(together, right), (
            f"{case}. You divide the whole margin by one number. Does a short answer then count as much as a long one?"
        )
        assert math.isclose(found[i].item(), right, rel_tol=1e-9), (
            f"{case}, need {right:.6f}. What has changed, and by how many tokens is each change shared?"
        )
        slope = -beta / (1 + math.exp(beta * margin))
        need = (slope / m, -slope / n)
        assert policy.grad is not None, "no gradient reaches the policy; only the reference is a constant"
        assert all(map(math.isclose, policy.grad[i].tolist(), need)), f"{case}, which is right, but its gradient is not"
    assert reference.grad is None, "a gradient reaches the reference. What is a constant here?"

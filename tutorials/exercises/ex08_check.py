"""What a solution of exercise 8 must do."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

from minilora.nf4 import NF4Linear

MODEL = {"q": (24, 24), "k": (8, 24), "gate": (40, 24), "down": (24, 40), "odd": (5, 7)}


def check_trained_bytes(answer: ModuleType) -> None:
    """The bytes are those of tensors after a real step of AdamW."""
    for shapes, r in (([(6, 4)], None), ([(6, 4), (3, 9)], 2), ([(8, 8)], 1)):
        weights = [nn.Parameter(torch.ones(shape), requires_grad=r is None) for shape in shapes]
        factors = [nn.Parameter(torch.ones(r, size)) for shape in shapes for size in shape] if r else []
        need = sum(weight.nbytes for weight in weights) * (4 if r is None else 1)
        need += sum(tensor.nbytes for tensor in after_a_step(factors)) if r else 0
        found = answer.trained_bytes(list(shapes), r)
        assert found == need, f"weights {shapes}, rank {r}: you count {found} bytes, and tensors take {need}"


def after_a_step(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Parameters, gradients and moments."""
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *(parameter.grad for parameter in parameters), *moments]


def check_micro_batches(answer: ModuleType) -> None:
    """The number fits, divides the rows, and no smaller one does."""
    for rows, row_bytes, fixed, budget in (
        (8, 10, 100, 180),
        (8, 10, 100, 179),
        (12, 7, 50, 80),
        (6, 10, 95, 100),
        (7, 1, 0, 6),
    ):
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and fixed + rows // n * row_bytes <= budget]
        found = answer.micro_batches(rows, row_bytes, fixed, budget)
        case = f"{rows} rows of {row_bytes} bytes and {fixed} beside them, into {budget}"
        if not fitting:
            assert found is None, f"{case}: you say {found}, and one row alone is too much"
            continue
        assert found is not None, f"{case}: you say None, and it can be done"
        assert rows % found == 0, f"{case}: {rows} rows cannot be divided into {found} equal parts"
        assert found in fitting, (
            f"{case}: with {found} micro-batches a part has {fixed + rows // found * row_bytes} bytes"
        )
        assert found == min(fitting), f"{case}: {found} fit, and so do fewer"


def check_ranks(answer: ModuleType) -> None:
    """The ranks use the budget that packed weights and a real optimizer leave, as far as the rule allows."""
    free = bytes_of(MODEL, dict.fromkeys(MODEL, 0))
    step = bytes_of(MODEL, dict.fromkeys(MODEL, 1)) - free
    one_more = bytes_of(MODEL, dict.fromkeys(MODEL, 0) | {"q": 1}) - free
    for budget in (
        free + 3 * step,
        free + 3 * step - 1,
        free + 2 * step + one_more,
        free + 1000,
        free + 1,
        free + 9999,
        free - 1,
    ):
        found = answer.ranks(dict(MODEL), budget)
        case = f"a budget of {budget:,} bytes, {free:,} of them for the weights"
        assert isinstance(found, dict), f"{case}: ranks returns {type(found).__name__}, need a dict: name -> rank"
        assert found.keys() == MODEL.keys(), f"{case}: the ranks are {found}, need one for each of {[*MODEL]}"
        assert min(found.values()) >= 0, f"{case}: the ranks are {found}; where the weights do not fit, need 0"
        used, right = bytes_of(MODEL, found), expected(budget)
        assert used <= max(budget, free), (
            f"{case}: tensors for {found} take {used:,}. What is in memory for each number of A and B after a step of "
            "AdamW? And for each number of a weight, with its scales?"
        )
        assert found == right, (
            f"{case}: {found} takes {used:,}, and with a better use of the budget it is {bytes_of(MODEL, right):,}. "
            "Could all linears have one rank more? If not, could one of them, in their order, after one that could "
            "not as well? Or do you count more bytes than there are?"
        )


def expected(budget: int) -> dict[str, int]:
    """The ranks, by trying."""
    r = 0
    while bytes_of(MODEL, dict.fromkeys(MODEL, r + 1)) <= budget:
        r += 1
    found = dict.fromkeys(MODEL, r)
    for name in MODEL:
        more = found | {name: r + 1}
        found = more if bytes_of(MODEL, more) <= budget else found
    return found


def bytes_of(shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> int:
    """The bytes of packed weights, and of A and B with what a step of AdamW leaves."""
    packed = [NF4Linear.quantize(torch.ones(shape)) for shape in shapes.values()]
    trained = [nn.Parameter(torch.ones(ranks[name], size)) for name, shape in shapes.items() for size in shape]
    optimizer = torch.optim.AdamW(trained)
    sum(parameter.sum() for parameter in trained).backward()
    optimizer.step()
    held = [tensor for layer in packed for tensor in layer.parameters()]
    for parameter in trained:
        state = optimizer.state[parameter]
        held += [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    return sum(tensor.nbytes for tensor in held)

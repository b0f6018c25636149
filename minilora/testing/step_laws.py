"""The law of a training step: it changes all that is meant to be trained, and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from minilora.testing.laws import CheckFailure, Report

__tracebackhide__ = True  # pytest shows the line that calls this module
STATEMENT = "a step changes every parameter that is meant to be trained, and nothing else"
Read = Callable[[], Mapping[str, Any]]


def check_trains_everything(
    model: nn.Module | Read, step: Callable[[], Any], trained: Iterable[str] | None = None, steps: int = 2
) -> Report:
    """Check that training steps change every parameter that is meant to be trained, and nothing else.

    Two steps, because LoRA's A has no gradient in the first one, where B = 0.

    Args:
        model: any module; or, for other libraries, a function that returns its arrays by name.
        step: one step on a batch: forward, backward and an optimizer step whose learning rate is not 0.
        trained: names of what is meant to be trained, as `named_parameters` has them; by default what requires a
            gradient. For arrays it must be given.
        steps: how many steps are made.

    Raises:
        CheckFailure: something kept its value, changed without being meant to, or is not finite; each with its cause
            as far as it shows.
        ValueError: `trained` is missing, empty, or has a name that the model does not have.
    """
    # a shared parameter under each of its names
    parameters = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    before = snapshot(model)
    if trained is None:
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    meant = set(trained or ())
    if unknown := sorted(meant - set(before)):
        raise ValueError(f"trained: the model has no {unknown[0]!r}; it has {', '.join(before)}")
    if not meant:
        raise ValueError("trained: found no name; accepted are one or more")
    with watched(parameters) as gradients:
        for _ in range(steps):
            step()
    after = snapshot(model)
    problems = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            problems.append(f"{name}: gone after the step")
        elif not np.isfinite(new).all() and np.isfinite(old).all():
            problems.append(f"{name}: not finite after the step")
        elif name in meant and np.array_equal(old, new):
            problems.append(f"{name}: unchanged; {why_unchanged(parameters.get(name), gradients.get(name))}")
        elif name in meant and gradients.get(name) is False:
            reason = why_unchanged(parameters.get(name), gradients.get(name))
            problems.append(f"{name}: changed only by weight decay or momentum; {reason}")
        elif name not in meant and not np.array_equal(old, new, equal_nan=True):
            problems.append(f"{name}: changed; {why_changed(parameters, name)}")
    if problems:
        lines = [f"trains-everything: {len(problems)} of {len(before)} tensors are wrong", f"  law: {STATEMENT}"]
        raise CheckFailure("\n".join(lines + [f"  {problem}" for problem in problems]), "trains-everything", None)
    return Report("trains-everything", STATEMENT, 0.0, len(before))


def snapshot(model: nn.Module | Read) -> dict[str, Any]:
    """Return copies of all parameters and buffers, except the statistics of batch norms."""
    if not isinstance(model, nn.Module):
        return {name: np.array(array) for name, array in model().items()}
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] not in norms}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return {name: (own.double() if own.is_floating_point() else own).numpy() for name, own in copies.items()}


@contextmanager
def watched(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, bool]]:
    """Note of each parameter that gets a gradient whether any was other than 0."""
    seen: dict[str, bool] = {}

    def note(name: str, own: torch.Tensor) -> None:
        # None where an optimizer steps in the backward pass
        seen[name] = seen.get(name, False) or own.grad is None or bool(own.grad.any())

    with ExitStack() as hooks:
        for name, parameter in parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(partial(note, name)))
        yield seen


def why_unchanged(parameter: nn.Parameter | None, has_gradient: bool | None) -> str:
    """Say what is known of a tensor that was not trained."""
    if parameter is None:
        return "no step wrote to it"
    if not parameter.requires_grad:
        return "it is frozen: requires_grad is False"
    if has_gradient is None:
        return (
            "no gradient came to it: the forward pass does not use it, or uses a copy, or the graph is cut "
            "(no_grad, detach, checkpointing of inputs that require no gradient)"
        )
    if not has_gradient:
        return "its gradient was exactly 0: no token reached it, or what multiplies it is 0"
    return (
        "its gradient was not 0: the optimizer does not have it, its learning rate is 0, the step was skipped, "
        f"or the change is rounded away in {parameter.dtype}"
    )


def why_changed(parameters: Mapping[str, nn.Parameter], name: str) -> str:
    """Say what is known of a tensor that changed though it is not meant to."""
    parameter = parameters.get(name)
    if parameter is None:
        return "it is not meant to be trained"
    if not parameter.requires_grad:
        return (
            "it is frozen, and something wrote to it in place: a merge, or an optimizer that has it with weight decay"
        )
    others = [other for other, tensor in parameters.items() if tensor is parameter and other != name]
    if others:
        return f"it is tied: one tensor with {others[0]}"
    return "it requires a gradient, though it is not named as trained"

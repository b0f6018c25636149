"""The kernel of a step, whose end does not wait for the device."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from minilora import training
from minilora.definition import kernel
from minilora.training import Step, parameters_of


@kernel(of=training.update)
def update(optimizer: Optimizer, total: Tensor, count: int, max_grad_norm: float) -> Step:
    """Let the fused optimizer find out on the device whether to step: it reads `found_inf`."""
    if not count or not optimizer.defaults.get("fused") or total.device.type == "mps":  # where it is not read
        return training.update.function(optimizer, total, count, max_grad_norm)
    parameters = parameters_of(optimizer)
    gradients = [parameter.grad for parameter in parameters]
    torch._foreach_div_(gradients, count)
    mean = total / count
    norm = training.total_norm(gradients)
    is_finite = mean.isfinite() & norm.isfinite()
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm.where(is_finite, 0))  # 0: not at all
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # or later steps would read it
    return Step(mean, norm)

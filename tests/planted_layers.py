"""Wrong layers that once kept every law, and others thought of before the laws that refuse them.

Each is a right layer of `minilora.testing.implementations` that goes wrong in one situation. Except for `PLAIN`, no
other one, here or in the catalogue, fails only in comparisons in which it fails.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minilora.testing.implementations import LoRALayer, merge
from minilora.testing.layer_mistakes import (
    DoRALayer,
    Wrong,
    adapted,
    base,
    delta,
    dora,
    drop,
    factor,
    lora,
    plus_bias,
    with_factor,
    with_update,
)

HALF = (torch.float16, torch.bfloat16)


def scale_of_lora(self, x):
    return base(self, x) + delta(self, drop(self, x)) / len(self.A) ** 0.5


def constant(self, x):
    """Return y without a gradient of A and B."""
    return base(self, x) + delta(self, drop(self, x)).detach()


def when(situation, wrong=base, right=lora):
    return right(lambda self, x: wrong(self, x) if situation(self, x) else self(x))


def gradient_times(name, times):
    def wrong(self, x):
        own = self.get_parameter(name)
        return with_tensors(self, x, **{name: own.detach() + times(self, x) * (own - own.detach())})

    return lora(wrong)


def with_tensors(self, x, **tensors):
    return torch.func.functional_call(self, tensors, x)


def kept(self, name, make):
    """Return what `make` gave at the first call."""
    values = vars(self).setdefault("kept", {})
    if name not in values:
        values[name] = make()
    return values[name]


def calls(self):
    vars(self)["calls"] = vars(self).get("calls", 0) + 1
    return vars(self)["calls"]


def packed(tensor):
    """Return the numbers in storage from the first one on, as a kernel reads them that expects contiguous tensors."""
    begin = tensor.storage_offset()
    return (
        torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride(), begin) if tensor.numel() else tensor
    )


def is_token(x):
    return x.ndim == 3 and x.shape[1] == 1


def only(update, mask):
    return update * mask.to(update)


def overwriting(*tensors, **options):
    layer = LoRALayer(*tensors, **options)
    layer.A.register_hook(lambda gradient: gradient if layer.A.grad is None else gradient - layer.A.grad)
    return layer


WORKSPACES = {}  # that all layers of a process share


class InAWorkspace(torch.autograd.Function):
    """x W, whose gradients read x where a later call has written its own."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.kept, ctx.W = WORKSPACES.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(x), W.detach()
        return x @ W

    @staticmethod
    def backward(ctx, dy):
        x = ctx.kept.reshape(-1, ctx.kept.shape[-1])
        return dy @ ctx.W.T, x.T @ dy.reshape(-1, dy.shape[-1])


class OfOneBackwardPass(torch.autograd.Function):
    """x W, which keeps x for the first backward pass only."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.kept, ctx.W = x.detach(), W.detach()
        return x @ W

    @staticmethod
    def backward(ctx, dy):
        x, ctx.kept = ctx.kept.reshape(-1, ctx.kept.shape[-1]), torch.zeros_like(ctx.kept)
        return dy @ ctx.W.T, x.T @ dy.reshape(-1, dy.shape[-1])


def multiplied_by(function):
    return with_update(lambda self, x: self.scale * function.apply(F.linear(drop(self, x), self.A), self.B.T))


def in_blocks(self, x):
    """Compute 256 rows at a time, and forget dropout of the rows that are left over."""
    rows = x.reshape(-1, x.shape[-1])
    whole = len(rows) // 256 * 256 or len(rows)
    updates = [delta(self, drop(self, rows[:whole])), delta(self, rows[whole:])]
    return base(self, x) + torch.cat(updates).view(*x.shape[:-1], -1)


def in_an_output(self, x):
    """Return y in a tensor that a later call overwrites."""
    y = self(x)
    return y if torch.is_grad_enabled() else kept(self, (y.shape, y.dtype), y.clone).copy_(y)


def with_trained_weight(make):
    """Return a maker of layers that train a copy of W too."""

    def wrong(W, *rest, **options):
        weight = nn.Parameter(W.detach().clone())
        layer = Wrong(make(W, *rest, **options), lambda self, x: self(x) + F.linear(x, weight - weight.detach()))
        layer.register_parameter("weight", weight)
        return layer

    return wrong


def merged_once(self, x):
    if self.training:
        return self(x)
    return F.linear(x, kept(self, "merged", lambda: adapted(self).detach()), self.b)


def start_at_the_adapted_norm(W, b, A, B, alpha, magnitude=None):
    magnitude = merge(W, A, B, alpha / len(A)).norm(dim=1) if magnitude is None else magnitude
    return LoRALayer(W, b, A, B, alpha, use_dora=True, magnitude=magnitude)


class FrozenByEvaluation(LoRALayer):
    def train(self, mode=True):
        if not mode:
            self.A.requires_grad_(False)
        return super().train(mode)


class MergingAgain(LoRALayer):
    """eval() merges, also a second time; train() takes all of it back."""

    def __init__(self, W, *tensors, **options):
        super().__init__(W.clone(), *tensors, **options)
        self.merges = 0

    def train(self, mode=True):
        more = -self.merges if mode else 1
        self.merges += more
        self.W += more * self.scale * (self.B @ self.A).detach()
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) if self.training else F.linear(x, self.W, self.b)


class TrainReturnsNothing(LoRALayer):
    def train(self, mode=True):
        super().train(mode)


class Unregistered(nn.Module):
    """A module that keeps a layer in a list, where `parameters()` does not find it."""

    def __init__(self, *tensors, **options):
        super().__init__()
        self.layers = [LoRALayer(*tensors, **options)]

    def forward(self, x):
        return self.layers[0].train(self.training)(x)


class TrainedScale(LoRALayer):
    def __init__(self, *tensors, **options):
        super().__init__(*tensors, **options)
        self.s = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return base(self, x) + self.s.to(x) * delta(self, drop(self, x))


def same_mask(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return self(x)


def changed_input(self, x):
    y = self(x)
    return y if torch.is_grad_enabled() else (x.mul_(1.5), y)[1]


def inference_tensors(self, x):
    return with_tensors(self, x, W=kept(self, "W", lambda: self.W.clone()))


def cached_by_B(self, x):
    if self.training:
        return self(x)
    cached = kept(self, "merged", dict)
    key = self.B.detach().double().numpy().tobytes()
    return F.linear(x, cached.setdefault(key, (self.W + self.scale * self.B @ self.A).detach()), self.b)


def contiguous_dy(self, x):
    y = self(x)
    if y.requires_grad:
        y.register_hook(packed)
    return y


def last_token(self, x):
    update = delta(self, drop(self, x))
    return base(self, x) + only(update, torch.arange(x.shape[1])[:, None] == x.shape[1] - 1)


REVIEW = {  # that somebody found to pass
    "A of the first call, by reference": lora(lambda self, x: with_tensors(self, x, A=kept(self, "A", lambda: self.A))),
    "dA doubled in 16 bits": gradient_times("A", lambda self, x: 2 if x.dtype in HALF else 1),
    "the scale with three digits": with_update(
        lambda self, x: delta(self, drop(self, x)) * (round(self.scale, 3) / self.scale)
    ),
    "x clipped at 30": with_update(lambda self, x: delta(self, drop(self, x.clamp(-30, 30)))),
    "no small update": when(lambda self, x: (self.scale * self.B @ self.A).abs().max() < 1e-3),
    "NaN taken for 0": lora(lambda self, x: self(x.nan_to_num())),
    "no update under autocast": when(lambda self, x: torch.is_autocast_enabled("cpu")),
    "W read as if it were contiguous": lora(lambda self, x: with_tensors(self, x, W=packed(self.W))),
    "dA of the second backward pass alone": overwriting,
    "no update of features from 512 on": with_update(
        lambda self, x: delta(self, drop(self, only(x, torch.arange(x.shape[-1]) < 512)))
    ),
    "x overwritten under no_grad": lora(changed_input),
}
REVIEW_DORA = {
    "m without a gradient in training": with_factor(
        lambda self: factor(self).detach() if self.training else factor(self)
    ),
    "B = 0 gives the base, whatever m is": when(lambda self, x: not self.B.any(), right=dora),
}
OWN = {
    "no dA where x needs no gradient": gradient_times("A", lambda self, x: int(x.requires_grad)),
    "the same dropout mask in all calls": lora(same_mask),
    "no dropout under no_grad": when(
        lambda self, x: not torch.is_grad_enabled(), lambda self, x: base(self, x) + delta(self, x)
    ),
    "no dropout of a single token": when(lambda self, x: is_token(x), lambda self, x: base(self, x) + delta(self, x)),
    "dropout of at most a half": lora(
        lambda self, x: base(self, x) + delta(self, F.dropout(x, min(self.p, 0.5), self.training))
    ),
    "no dropout below a tenth": lora(
        lambda self, x: base(self, x) + delta(self, drop(self, x) if self.p >= 0.1 else x)
    ),
    "train() returns nothing": TrainReturnsNothing,
    "A and B that parameters() does not have": Unregistered,
    "A read as if it were contiguous": lambda W, b, A, B, alpha: (
        lambda x: F.linear(x, W, b) + alpha / len(A) * F.linear(F.linear(x, packed(A)), B)
    ),
    "dy read as if it were contiguous": lora(contiguous_dy),
    "in inference mode the last token's update alone": when(
        lambda self, x: torch.is_inference_mode_enabled() and x.ndim == 3, last_token
    ),
    "no gradient where x has four dimensions": when(lambda self, x: x.ndim == 4, constant),
    "no gradient where x is a vector": when(lambda self, x: x.ndim == 1, constant),
    "no update of outputs from 512 on": with_update(
        lambda self, x: only(delta(self, drop(self, x)), torch.arange(len(self.W)) < 512)
    ),
    "in evaluation mode a merged weight that only a change of B renews": lora(cached_by_B),
    "a copy of W from the first call in inference mode": when(
        lambda self, x: torch.is_inference_mode_enabled() or "kept" in vars(self), inference_tensors
    ),
    "A frozen by eval()": FrozenByEvaluation,
    "no dx of the update in 16 bits": when(
        lambda self, x: x.dtype in HALF, lambda self, x: base(self, x) + delta(self, drop(self, x.detach()))
    ),
    "no bias in inference mode": when(
        lambda self, x: torch.is_inference_mode_enabled(), lambda self, x: F.linear(x, self.W) + delta(self, x)
    ),
    "float32 from 16 bits under no_grad": when(
        lambda self, x: not torch.is_grad_enabled(), lambda self, x: self(x).float()
    ),
    "the scale is trained": TrainedScale,
    "a dropout mask for all rows of a sequence": when(
        lambda self, x: x.ndim == 3,
        lambda self, x: base(self, x) + delta(self, x * drop(self, torch.ones_like(x[:, :1]))),
    ),
    "dB in two calls counted once": lora(
        lambda self, x: self(x) if calls(self) == 1 else with_tensors(self, x, B=self.B.detach())
    ),
    "what is kept for gradients is overwritten by the next call": multiplied_by(InAWorkspace),
    "no dB in a second backward pass of one graph": multiplied_by(OfOneBackwardPass),
    "where B = 0 the base alone": when(lambda self, x: not self.B.any()),
    "a batch of one sequence loses a dimension": lora(
        lambda self, x: self(x).squeeze(0) if x.ndim == 3 and x.shape[1] > 1 else self(x)
    ),
    "no dropout of rows that are left over": lora(in_blocks),
    "an output that the next call overwrites": lora(in_an_output),
    "small numbers of x are 0": with_update(lambda self, x: delta(self, drop(self, only(x, x.abs() > 1e-2)))),
}
OWN_RSLORA = {
    "the scale of LoRA in training": when(lambda self, x: self.training, scale_of_lora),
    "the scale of LoRA under no_grad": when(lambda self, x: not torch.is_grad_enabled(), scale_of_lora),
}
OWN_DORA = {
    "the norm of the first call in training": with_factor(
        lambda self: (
            self.m / kept(self, "norm", lambda: adapted(self).norm(dim=1).detach()) if self.training else factor(self)
        )
    ),
    "the norm is at least 1e-6": with_factor(lambda self: self.m / adapted(self).norm(dim=1).detach().clamp(min=1e-6)),
    "no dm in 16 bits": with_factor(lambda self: factor(self).detach() if self.m.dtype in HALF else factor(self)),
    "a gradient through the norm in training": with_factor(
        lambda self: self.m / adapted(self).norm(dim=1) if self.training else factor(self)
    ),
    "m of the first evaluation": with_factor(
        lambda self: (
            factor(self)
            if self.training
            else kept(self, "m", lambda: self.m.detach().clone()) / adapted(self).norm(dim=1).detach()
        )
    ),
    "the bias of a single token is multiplied": when(
        lambda self, x: is_token(x),
        lambda self, x: factor(self) * plus_bias(self, base(self, x) + delta(self, x)),
        dora,
    ),
    "no m in inference mode": when(
        lambda self, x: torch.is_inference_mode_enabled(),
        lambda self, x: F.linear(x, merge(self.W, self.A, self.B, self.scale), self.b),
        dora,
    ),
    "half the scale in the norm under no_grad": with_factor(
        lambda self: (
            factor(self)
            if torch.is_grad_enabled()
            else self.m / merge(self.W, self.A, self.B, self.scale / 2).norm(dim=1)
        )
    ),
}
PLAIN = {  # that the failure itself describes, so that `catalogue` has no name for them
    "dropout is applied in evaluation mode": with_update(  # karpathy/nanoGPT#240
        lambda self, x: delta(self, F.dropout(x, self.p))
    ),
    "one dropout mask is used for all rows": with_update(
        lambda self, x: delta(self, x * drop(self, x.new_ones(x.shape[-1])))
    ),
    "a vector becomes a matrix of one row": lora(lambda self, x: self(torch.atleast_2d(x))),
    "the base weight is trained": with_trained_weight(LoRALayer),
    "the weight merged in the first evaluation is kept": lora(merged_once),
    "merged at each eval(), also at a second one": MergingAgain,
}
PLAIN_DORA = {
    "the base weight is trained": with_trained_weight(DoRALayer),
    "the magnitude starts at ‖W + s·B A‖": start_at_the_adapted_norm,
    "the norm of the first call is kept": with_factor(
        lambda self: self.m / kept(self, "norm", lambda: adapted(self).norm(dim=1).detach())
    ),
}
PLANTED = {
    "lora": REVIEW | OWN | PLAIN,
    "rslora": OWN_RSLORA | PLAIN,
    "dora": REVIEW_DORA | OWN_DORA | PLAIN_DORA,
}
CAUSES = {  # what the message may name; a failure in some modes only names them as well
    "merged at each eval(), also at a second one": "the update is added twice",
    "no bias in inference mode": "the bias is missing",
    "the scale of LoRA in training": "the scale is α/r in spite of use_rslora",
    "the scale of LoRA under no_grad": "the scale is α/r in spite of use_rslora",
    "m without a gradient in training": "the magnitude is not trained",
    "a gradient through the norm in training": "the gradient goes through the norm",
    "m of the first evaluation": "the magnitude is not trained",
    "no m in inference mode": "DoRA is LoRA: there is no magnitude and no norm",
}

"""Mistakes that show only in rare calls, such as a second one or one without gradients: each is refused.

Each is an implementation that is right elsewhere; `catalogue` has the mistakes that have a name.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.testing import CheckFailure, check, check_kernel, check_trains_everything
from minilora.testing.catalogue import dequantize_whole_blocks
from minilora.testing.implementations import (
    Linear4bit,
    double_dequantize,
    double_quantize,
    loss_sum,
    masked_loss,
    merge,
    nf4_dequantize,
    nf4_quantize,
    render_chat,
)
from minilora.testing.layer_mistakes import with_formula
from tests.models import randn
from tests.planted_layers import with_trained_weight
from tests.test_chat_laws import with_tools
from tests.test_kernel_laws import inputs, softmax, with_slope
from tests.test_sequence_laws import PACKED, VOCABULARY, decoder


def doubled_where(condition):
    """A 4-bit linear whose output is doubled where a condition holds."""
    return with_formula(Linear4bit, lambda self, x: self(x) * (2 if condition(x) else 1))


class Unweighted(torch.autograd.Function):
    """A loss that makes its gradient in the forward pass, and ignores what comes from above."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = masked_loss(leaf, labels)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
        return loss.detach()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0], None


def changing_labels(logits, labels):
    loss = masked_loss(logits, labels)
    labels[labels == -100] = 0
    return loss


def rendered(is_learned):
    """Render as `render_chat`; `is_learned` of the messages, the number of one and that of a token in it."""

    def render(messages):
        parts = [(n, i, token) for n, own in enumerate(messages) for i, token in enumerate(render_chat([own])[0])]
        return [token for _, _, token in parts], [i > 0 and bool(is_learned(messages, n, i)) for n, i, _ in parts]

    return render


def of_reply(messages, n, token=0):
    return messages[n]["role"] == "assistant"


def roles_behind(messages):
    return [*(message["role"] for message in messages[1:]), ""]


def with_arguments(kept):
    """Render calls of tools with some of their arguments."""

    def changed(call):
        return {**call, "function": {**call["function"], "arguments": kept(call["function"]["arguments"])}}

    return lambda messages: with_tools(
        [{**m, "tool_calls": [*map(changed, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]
    )


def unlearning(unlearned):
    return lambda messages: with_tools(messages, unlearned=lambda message, word: word == unlearned)


def learning(word):
    def render(messages):
        tokens, flags = with_tools(messages)
        return tokens, [flag or token == word for token, flag in zip(tokens, flags, strict=True)]

    return render


def seeing(sees):
    """Documents, the tokens of which see those before them in other documents, too, where `sees` is true of both."""

    def run(documents):
        logits = PACKED[0](documents)
        for i, own in enumerate(documents):
            before = [z.mean() for z, other in zip(logits[:i], documents, strict=False) if sees(other, own)]
            logits[i] = logits[i] + sum(before)
        return logits

    return run, VOCABULARY, PACKED[2]


def decoding(changed):
    """Greedy decoding in which each step sees what `changed` makes of the prompt and of the tokens behind it."""
    logits = decoder("")[1]

    def generate(prompts, new):
        answers = []
        for prompt in prompts:
            tokens = []
            while len(tokens) < new:
                tokens.append(int(logits(changed(prompt, tokens))[-1].argmax()))
            answers.append(tokens)
        return answers

    return generate, *decoder("")[1:]


def sharing(reused, at_least=1):
    """Decoding that reads the beginning of a prompt from an earlier one that begins alike, so many tokens of it."""
    earlier = []

    def changed(prompt, tokens):
        for other in earlier:
            alike = next((i for i, pair in enumerate(zip(other, prompt, strict=False)) if pair[0] != pair[1]), 0)
            if alike >= at_least:
                return [*other[: reused(alike)], *prompt[reused(alike) :], *tokens]
        if prompt not in earlier:
            earlier.append(prompt)
        return [*prompt, *tokens]

    return decoding(changed)


def forgetting(lengths, kept):
    """Decoding in which new tokens behind so many tokens see the last few of them only."""
    return decoding(
        lambda prompt, tokens: (prompt + tokens)[-kept if tokens and len(prompt + tokens) in lengths else 0 :]
    )


def in_place(quantize):
    """A function that changes the numbers that it quantizes."""

    def wrong(numbers, *rest):
        result = quantize(numbers, *rest)
        numbers.detach().sub_(numbers.mean())
        return result

    return wrong


def with_whole_blocks(self, x):
    W = dequantize_whole_blocks(self.packed, self.absmax, self.shape, 64)
    return F.linear(x, W.to(x.dtype), self.b)


WORKSPACES = {}


def dequantized_in_a_workspace(*given):
    weight = nf4_dequantize(*given)
    return WORKSPACES.setdefault(weight.shape, weight).copy_(weight)


RARE = {
    "linear4bit": {
        "a dense copy of the weight is trained": with_trained_weight(Linear4bit),
        "double quantization is ignored": lambda W, b, double_quant=False: Linear4bit(W, b),
        "each row is taken for whole blocks": with_formula(Linear4bit, with_whole_blocks),  # bitsandbytes on AVX512
        "the input gets no gradient": with_formula(Linear4bit, lambda self, x: self(x.detach())),  # bitsandbytes
        "under no_grad": doubled_where(lambda x: not torch.is_grad_enabled()),
        "for x (B, 1, in)": doubled_where(lambda x: x.ndim == 3 and x.size(1) == 1),
        "with more than 512 features": doubled_where(lambda x: x.size(-1) > 512),
        "in the gradient of bfloat16": with_formula(
            Linear4bit, lambda self, x: self(2 * x - x.detach()) if x.dtype == torch.bfloat16 else self(x)
        ),
    },
    "double_quant": {
        "small absmaxes are clipped": (lambda absmax: double_quantize(absmax.clamp(min=1e-3)), double_dequantize),
        "the absmaxes are changed": (in_place(double_quantize), double_dequantize),  # bitsandbytes#1863
    },
    "merge": {
        "W is changed": lambda W, *rest: W.copy_(merge(W.clone(), *rest)),
        "the scale is rounded": lambda W, A, B, scale: merge(W, A, B, round(scale, 3)),
        "W itself where B = 0": lambda W, A, B, scale: merge(W, A, B, scale) if B.any() else W,
        "a view of W where B = 0": lambda W, A, B, scale: merge(W, A, B, scale) if B.any() else W.detach()[:],
    },
    "nf4": {
        "a workspace is returned": (nf4_quantize, dequantized_in_a_workspace),
        "W is changed": (in_place(nf4_quantize), nf4_dequantize),
        "blocks have 64 weights, whatever block_size is": (lambda W, _: nf4_quantize(W, 64), nf4_dequantize),
    },
    "loss_masking": {
        "the gradient from above is ignored": Unweighted.apply,
        "behind 64 tokens": lambda logits, labels: masked_loss(logits[:, :64], labels[:, :64]),
        "labels are changed": changing_labels,
        "labels at the first place of a block of 64": lambda logits, labels: masked_loss(
            logits, labels.masked_fill((labels % 64 == 0) & (labels > 0), -100)
        ),
        "a running sum in bfloat16": lambda logits, labels: (
            loss_sum(logits, labels).clamp(max=8192 if logits.dtype == torch.bfloat16 else None)
            / (labels[:, 1:] != -100).sum()
        ),
        "under no_grad": lambda logits, labels: (masked_loss if torch.is_grad_enabled() else loss_sum)(logits, labels),
    },
    "chat_mask": {
        "the second of two replies in a row": rendered(  # huggingface/trl#3224
            lambda m, n, i: of_reply(m, n) and not (n and of_reply(m, n - 1))
        ),
        "empty replies": rendered(lambda m, n, i: of_reply(m, n) and m[n]["content"]),
        "a user's turn at the end": rendered(lambda m, n, i: of_reply(m, n) or n == len(m) - 1),
        "a system message in the middle": rendered(lambda m, n, i: of_reply(m, n) or (n and m[n]["role"] == "system")),
        "unknown roles": rendered(lambda m, n, i: m[n]["role"] not in ("user", "system")),
        "behind an assistant at the beginning": rendered(lambda m, n, i: of_reply(m, n) or of_reply(m, 0)),
        "a reply that equals an earlier one": rendered(lambda m, n, i: of_reply(m, n) and m[n] not in m[:n]),
        "the first of two questions is lost": lambda messages: render_chat(
            [
                own
                for own, role in zip(messages, roles_behind(messages), strict=True)
                if own["role"] != "user" or role != "user"
            ]
        ),
        "replies of more than 100 tokens": rendered(lambda m, n, i: of_reply(m, n) and i <= 100),
        "what is behind 256 tokens is cut off": lambda messages: [each[:256] for each in render_chat(messages)],
    },
    "chat_tools": {
        "the end token of a call": lambda messages: with_tools(
            messages, unlearned=lambda message, word: word == "[/]" and "tool_calls" in message
        ),
        "the second of two calls": lambda messages: with_tools(
            [{**m, "tool_calls": m["tool_calls"][:1]} if "tool_calls" in m else m for m in messages]
        ),
        "all arguments but the first": with_arguments(lambda given: dict([*given.items()][:1])),
        "arguments that are no texts": with_arguments(lambda given: {k: v for k, v in given.items() if type(v) is str}),
        "all but the first of a list": with_arguments(
            lambda given: {k: v[:1] if isinstance(v, list) else v for k, v in given.items()}
        ),
        "numbers in a list or alone are not learned": lambda messages: with_tools(
            messages, unlearned=lambda message, word: word.isdecimal() and "tool_calls" in message
        ),
        "the name of the second argument is not learned": unlearning("Qj"),
        "the last words of a reply are not learned": unlearning("is"),
        "the first words of a question are lost": lambda messages: with_tools(
            [{**messages[0], "content": messages[0]["content"].split()[-1]}, *messages[1:]]
        ),
        "the unit of a result is lost": lambda messages: with_tools(
            [{**m, "content": m["content"].split()[0]} if m["role"] == "tool" else m for m in messages]
        ),
        "the unit of a result is learned": learning("degrees"),
        "the first words of a question are learned": learning("warm"),
    },
    "packing": {
        "equal documents": seeing(lambda other, own: other == own and len(own) > 3),
        "behind more than 384 tokens": seeing(lambda other, own: len(other) > 384),
    },
    "generation": {
        "prompts of more than 128 tokens": (
            lambda prompts, new: decoder("")[0]([prompt[-128:] for prompt in prompts], new),
            *decoder("")[1:],
        ),
        "a token too many of a prompt that begins alike": sharing(lambda alike: alike + 1, at_least=16),
        "whole blocks of a prompt that begins alike": sharing(lambda alike: -(-alike // 16) * 16, at_least=9),
        "new tokens from 350 to 410": forgetting(range(350, 411), 250),
        "new tokens behind 256 tokens": forgetting(range(256, 350), 128),
        "new tokens behind 384 tokens": forgetting(range(384, 500), 256),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in RARE for name in RARE[kind]])
def test_what_is_wrong_in_rare_calls_only_is_refused(kind, name):
    with pytest.raises(CheckFailure):
        check(RARE[kind][name], kind)


# --- steps ---


class Adapted(nn.Module):
    """A linear layer with an adapter, behind a batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4).requires_grad_(False).eval()
        self.W, self.A, self.B = randn(0, 6, 4), nn.Parameter(randn(1, 2, 4)), nn.Parameter(torch.zeros(6, 2).double())

    def forward(self, x):
        return F.linear(self.norm(x.float()).double(), self.W + self.B.to(self.A) @ self.A)


def stepping(model, optimizer, *, zero=True, between=lambda: None, after=lambda: None, sign=1, skips=None):
    calls = []

    def step():
        calls.append(None)
        loss = sign * loss_of(model)
        loss.backward()
        between()
        if len(calls) != skips:
            optimizer.step()
        after()
        if zero:
            optimizer.zero_grad()

    return step


def loss_of(model):
    return (model(randn(2, 16, 4)) - randn(3, 16, 6)).square().mean()


A_00 = randn(1, 2, 4)[0, :1]


def half_put_back(model):
    model.B.data[3:] = 0


STEPS = {  # of a model and an optimizer
    "gradients are never zeroed": lambda model, own: stepping(model, own, zero=False),
    "the loss is ascended": lambda model, own: stepping(model, own, sign=-1),
    "a gradient is ascended": lambda model, own: stepping(model, own, between=lambda: model.A.grad.neg_()),
    "the last row of B": lambda model, own: stepping(model, own, after=lambda: model.B.data[-1:].zero_()),
    "one number of A": lambda model, own: stepping(model, own, after=lambda: model.A.data[0, :1].copy_(A_00)),
    "half of B's rows": lambda model, own: stepping(model, own, after=lambda: half_put_back(model)),
    "the second step is skipped": lambda model, own: stepping(model, own, skips=2),
    "a gradient is zeroed": lambda model, own: stepping(model, own, between=lambda: model.A.grad.zero_()),
    "statistics of a frozen norm": lambda model, own: stepping(model.train(), own),
    "the dtype": lambda model, own: stepping(
        model,
        torch.optim.SGD([model.A, model.B], 0.01),
        after=lambda: setattr(model.B, "data", model.B.data.half()),
    ),
}


def adapted(step_of):
    model = Adapted()
    optimizer = torch.optim.AdamW([model.A, model.B], 0.01, weight_decay=0.1)
    return check_trains_everything(model, step_of(model, optimizer), loss=lambda: loss_of(model).item())


def test_a_right_step_of_an_adapter_passes():
    assert adapted(stepping).checked


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_wrong_in_part_is_refused(name):
    with pytest.raises(CheckFailure):
        adapted(STEPS[name])


# --- kernels ---


def rule(p, dy):
    return p * (dy - (p * dy).sum(-1, keepdim=True))


def keeping_the_first():
    kept = {}
    return lambda x, W: softmax(x, W - W.detach() + kept.setdefault(W.shape, W.detach().clone()))


def with_a_workspace():
    workspace = torch.empty(8, 32)

    def kernel(x, W):
        return softmax(x, W) if torch.is_grad_enabled() else workspace.copy_(softmax(x, W))

    return kernel


def with_a_gradient_in_a_workspace():
    workspace = torch.empty(8, 16)

    def kernel(x, W):
        own = x.view_as(x)
        if own.requires_grad:
            own.register_hook(workspace.copy_)
        return softmax(own, W)

    return kernel


def with_one_backward_pass():
    seen = set()

    def slope(p, dy):
        dz = 0 * dy if p.data_ptr() in seen else rule(p, dy)
        seen.add(p.data_ptr())
        return dz

    return with_slope(slope)


def by_powers(x, W):
    e = (x @ W).exp()
    return e / e.sum(-1, keepdim=True)


KERNELS = {
    "the second call": keeping_the_first,
    "the result of the call before": with_a_workspace,
    "the gradient of the call before": with_a_gradient_in_a_workspace,
    "a second backward pass": with_one_backward_pass,
    "under no_grad": lambda: lambda x, W: softmax(x * (1 if torch.is_grad_enabled() else 2), W),
    "strides": lambda: lambda x, W: softmax(torch.as_strided(x, (8, 16), (16, 1)), W),
    "overflow": lambda: by_powers,
    "large numbers": lambda: lambda x, W: softmax(x.clamp(-8, 8), W),
    "small numbers": lambda: lambda x, W: softmax(torch.where(x.abs() < 1e-3, 0.9 * x, x), W),
    "strides of the gradient": lambda: with_slope(lambda p, dy: rule(p, dy if dy.is_contiguous() else 0 * dy)),
    "the gradient is changed": lambda: with_slope(lambda p, dy: rule(p, dy.mul_(2)) / 2),
    "the gradient of one tensor only": lambda: lambda x, W: softmax(x, W if x.requires_grad else 1.0 * W.detach()),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_is_wrong_in_rare_calls_is_refused(name):
    with pytest.raises(CheckFailure):
        check_kernel(KERNELS[name](), softmax, inputs(0, torch.float32))

"""The law of kernels: right ones pass, however they round; wrong ones and those that break the call are refused."""

import pytest
import torch

from minilora.testing import CheckFailure, check_kernel
from tests.models import randn

SEEDS = range(30)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def softmax(x, W):
    return (x @ W).softmax(-1)


def in_parts(x, W):
    return (x[:, :8] @ W[:8] + x[:, 8:] @ W[8:]).softmax(-1)


def by_the_log_sum(x, W):
    z = x @ W
    return (z - z.logsumexp(-1, keepdim=True)).exp()


def in_blocks(x, W):
    """Each block has its own maximum, as in online softmax."""
    blocks = (x @ W).split(16, dim=-1)
    most = torch.stack([z.amax(-1, keepdim=True) for z in blocks])
    terms = [(z - own).exp() * (own - most.amax(0)).exp() for z, own in zip(blocks, most, strict=True)]
    return torch.cat(terms, -1) / sum(term.sum(-1, keepdim=True) for term in terms)


def mean_loss(x, W):
    return torch.nn.functional.cross_entropy(x @ W, torch.arange(len(x)))


def mean_loss_by_the_log_sum(x, W):
    z = x @ W
    return (z.logsumexp(-1) - z.diagonal()).mean()


class Backward(torch.autograd.Function):
    """Softmax with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, W, slope):
        p = softmax(x, W)
        ctx.save_for_backward(x, W, p)
        ctx.slope = slope
        return p

    @staticmethod
    def backward(ctx, dy):
        x, W, p = ctx.saved_tensors
        dz = ctx.slope(p, dy)
        return dz @ W.T, x.T @ dz, None


def with_slope(slope):
    return lambda x, W: Backward.apply(x, W, slope)


WRONG = {
    "the scores are divided by the root of K": lambda x, W: softmax(x / x.size(1) ** 0.5, W),
    "columns are normalized": lambda x, W: (x @ W).softmax(0),
    "the last input is left out": lambda x, W: softmax(x[:, :-1], W[:-1]),
    "blocks are normalized by themselves": lambda x, W: torch.cat([z.softmax(-1) for z in (x @ W).split(16, -1)], -1),
    "the gradient lacks its sum": with_slope(lambda p, dy: p * dy),
    "the gradient is doubled": with_slope(lambda p, dy: 2 * p * (dy - (p * dy).sum(-1, keepdim=True))),
    "the sum of the gradient is that of all rows": with_slope(lambda p, dy: p * (dy - (p * dy).sum() / len(p))),
    "the inputs are rounded to 11 bits": lambda x, W: softmax(x.half().to(x.dtype), W.half().to(x.dtype)),
}


def inputs(seed, dtype):
    return [randn(seed + i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate([(8, 16), (16, 32)])]


def refused(kernel, definition, dtype):
    """The failures of a kernel for all seeds."""
    failures = []
    for seed in SEEDS:
        try:
            check_kernel(kernel, definition, inputs(seed, dtype))
        except CheckFailure as failure:
            failures.append(str(failure))
    return failures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "definition"),
    [
        (in_parts, softmax),
        (by_the_log_sum, softmax),
        (in_blocks, softmax),
        (mean_loss_by_the_log_sum, mean_loss),
    ],
)
def test_a_right_kernel_passes_in_whatever_order_it_sums(kernel, definition, dtype):
    assert refused(kernel, definition, dtype) == []


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_exceeds_the_bound_tenfold_and_in_bfloat16_too(wrong):
    failures = refused(WRONG[wrong], softmax, torch.float32)
    assert len(failures) == len(SEEDS)
    assert min(float(failure.rpartition("error/bound ")[2]) for failure in failures) > 10
    if "rounded" not in wrong:
        assert len(refused(WRONG[wrong], softmax, torch.bfloat16)) == len(SEEDS)


def changing(x, W):
    with torch.no_grad():
        W.mul_(2)
    return softmax(x, W / 2)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda x, W: softmax(x, W.detach()), "the gradient of tensor 1: wrong.*found no gradient"),
        (lambda x, W: softmax(x, W).detach(), "the gradient of tensor 0: wrong.*found no gradient"),
        (changing, "tensor 1, which is only read: wrong"),
        (lambda x, W: softmax(x.mul_(2), W), "RuntimeError: a leaf Variable that requires grad"),
        (lambda x, W: softmax(x, W).double(), "the dtype of the result: wrong"),
        (lambda x, W: softmax(x, W)[:1], r"the shape is \(1, 32\), expected \(8, 32\)"),
    ],
)
def test_what_breaks_the_call_fails_the_check_and_leaves_the_inputs(kernel, said):
    given = inputs(0, torch.float32)
    with pytest.raises(CheckFailure, match=f"(?s)kernel-mine: .*{said}"):
        check_kernel(kernel, softmax, given, "mine")
    assert all(map(torch.equal, given, inputs(0, torch.float32)))


def test_a_gradient_that_the_definition_does_not_have_is_not_asked_for():
    x, W = inputs(0, torch.float32)
    check_kernel(by_the_log_sum, softmax, [x, W.detach()])
    check_kernel(lambda x, W: by_the_log_sum(x, W.detach()), lambda x, W: softmax(x, W.detach()), [x, W])
    with torch.no_grad():
        check_kernel(by_the_log_sum, softmax, [x, W])


def test_zeros_are_in_one_tensor_at_a_time_as_well():
    def with_a_slope_at_0(x, gate):
        return torch.where(x >= 0, x, 0) * gate

    with pytest.raises(CheckFailure, match="the gradient of tensor 0 for zeros in tensor 0"):
        check_kernel(
            with_a_slope_at_0,
            lambda x, gate: x.relu() * gate,
            [randn(0, 3, 4).requires_grad_(), randn(1, 3, 4).requires_grad_()],
        )


@pytest.mark.parametrize(("reason", "is_accepted"), [("non-empty donated buffers", True), ("freed", False)])
def test_a_graph_of_one_backward_pass_is_accepted_only_if_it_was_compiled(reason, is_accepted):
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.saved = x.exp()
            return ctx.saved.clone()

        @staticmethod
        def backward(ctx, dy):
            if ctx.saved is None:
                raise RuntimeError(reason)
            saved, ctx.saved = ctx.saved, None
            return dy * saved

    tensors = (randn(3, 4).requires_grad_(),)
    if is_accepted:
        check_kernel(Exp.apply, torch.exp, tensors)
    else:
        with pytest.raises(CheckFailure, match="RuntimeError: freed"):
            check_kernel(Exp.apply, torch.exp, tensors)

"""No second derivative is 0 in silence."""

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.lora.functional import dora_stretch, lora_branch, lora_linear
from minilora.model import ops
from minilora.model.attention import block_attention
from minilora.once import once_differentiable
from tests.models import four_bit, randn, randomize_adapters_, tiny_model, token_ids
from tests.tolerance import assert_maths

FUNCTIONS = {
    "linear": (lambda x, A, B: lora_linear(x, randn(9, 5, 4), None, A, B, 2.0), [(3, 4), (2, 4), (5, 2)]),
    "branch": (lambda x, A, B: lora_branch(x, A, B, 2.0), [(3, 4), (2, 4), (5, 2)]),
    "stretch": (dora_stretch, [(3, 5), (5,)]),
    "norm": (lambda x, weight: ops.rms_norm(x, weight, 1e-6), [(3, 4), (4,)]),
    "swiglu": (ops.swiglu, [(3, 4), (3, 4)]),
    "attention": (lambda q, k, v: block_attention(q, k, v, [3], [3], None), [(3, 2, 4), (3, 1, 4), (3, 1, 4)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_penalty_on_the_gradient_behind_a_sum_is_refused(name):
    function, shapes = FUNCTIONS[name]
    inputs = [randn(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    first, *_ = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    for ask in (lambda y: y.backward(), lambda y: torch.autograd.grad(y, inputs, allow_unused=True)):
        with pytest.raises(ml.TrainingError, match="no second derivative"):
            ask(first.square().sum())


@pytest.mark.parametrize(("base", "use_dora"), [(lambda model: model, False), (four_bit, True)])
def test_so_it_is_in_a_model(base, use_dora):
    model = base(tiny_model(num_hidden_layers=1))
    ml.attach(model, ml.LoraConfig(r=2, use_dora=use_dora), dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(token_ids(0, 1, 5)).logsumexp(-1).sum()
    gradients = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(ml.TrainingError, match="no second derivative"):
        sum(each.square().sum() for each in gradients).backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a batch of backward passes
def test_transformed_functions_have_their_first_derivative_and_no_other():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    ml.attach(model, ml.LoraConfig(r=2, target_modules=["0", "2"], task_type=None), dtype=torch.float64)
    randomize_adapters_(model, 0)
    x = randn(0, 3, 4).requires_grad_()

    def total(x):
        return model(x).sum()

    (expected,) = torch.autograd.grad(total(x), x)
    assert_maths(torch.func.grad(total)(x.detach()), expected)
    assert_maths(torch.func.jacrev(lambda x: model(x).flatten())(x.detach()).sum(0), expected)
    with pytest.raises(ml.TrainingError, match="no second derivative"):
        torch.autograd.functional.hessian(total, x.detach())


def test_a_constant_gradient_has_the_derivative_that_it_has():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            return (2 * dy,)

    x = randn(0, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)
    assert not gradient.requires_grad

"""The functions with a backward pass of their own refuse a second derivative, and have the first under transforms."""

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.adapters.functional import dora_stretch, lora_branch, lora_linear
from minilora.models import ops
from minilora.models.attention import block_attention
from minilora.quant.linear import NF4Linear
from tests.models import randn, randomize_adapters_
from tests.tolerance import assert_maths

FUNCTIONS = {
    "linear": (lambda x, A, B: lora_linear(x, randn(9, 5, 4), None, A, B, 2.0), [(3, 4), (2, 4), (5, 2)]),
    "four bits": (NF4Linear.quantize(randn(9, 2, 64)), [(1, 64)]),
    "branch": (lambda x, A, B: lora_branch(x, A, B, 2.0), [(3, 4), (2, 4), (5, 2)]),
    "stretch": (dora_stretch, [(3, 5), (5,)]),
    "norm": (lambda x, weight: ops.rms_norm(x, weight, 1e-6), [(3, 4), (4,)]),
    "swiglu": (ops.swiglu, [(3, 4), (3, 4)]),
    "attention": (lambda q, k, v: block_attention(q, k, v, [3], [3], None), [(3, 2, 4), (3, 1, 4), (3, 1, 4)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name):
    function, shapes = FUNCTIONS[name]
    inputs = [randn(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    first, *_ = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a batch of backward passes
def test_transformed_functions_have_their_first_derivative():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    ml.attach(model, ml.LoraConfig(r=2, target_modules=["0", "2"], task_type=None), dtype=torch.float64)
    randomize_adapters_(model, 0)
    x = randn(0, 3, 4).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert_maths(torch.func.grad(lambda x: model(x).sum())(x.detach()), expected)
    assert_maths(torch.func.jacrev(lambda x: model(x).flatten())(x.detach()).sum(0), expected)

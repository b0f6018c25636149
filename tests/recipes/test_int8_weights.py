"""Weights in int8: the bound of their error, PyTorch's product beside the definition, and a decoder."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.testing.compare import assert_precision
from recipes.int8_weights import (
    Int8Linear,
    decode_in_int8,
    error_bound,
    int8_linear,
    int8_linear_on_cpu,
    main,
    quantize_rows,
)
from tests.models import examples, randn, seeds, tiny_model, token_ids

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.integers(1, 40)


def weight(seed, out, inner, dtype, outlier=0.0):
    """A weight whose rows have different sizes, one of them zero."""
    W = randn(seed, out, inner) * torch.logspace(-3, 2, out, dtype=torch.float64)[:, None]
    W[0, 0] += outlier
    W[out // 2] *= out % 2
    return W.to(dtype)


@examples(1)
@given(seeds, sizes, sizes, st.sampled_from([*DTYPES, torch.float64]), st.sampled_from([0.0, 1e4]))
@example(0, 3, 1, torch.bfloat16, 0.0)
def test_no_result_is_off_by_more_than_half_a_step_of_each_weight(seed, out, inner, dtype, outlier):
    W = weight(seed, out, inner, dtype, outlier)
    q, scales = quantize_rows(W)
    q, scales, W = q.double(), scales.double(), W.double()
    x = torch.cat([randn(seed + 1, 5, inner), torch.eye(inner, dtype=torch.float64)])
    off = (int8_linear(x, q, scales, None) - F.linear(x, W)).abs()
    assert (off <= error_bound(x, scales) * (1 + 1e-6)).all()


@pytest.mark.parametrize("mistake", [torch.Tensor.trunc, lambda codes: codes.roll(1, 0), lambda codes: -codes])
def test_the_bound_rejects_a_mistake(mistake, monkeypatch):
    W = weight(0, 8, 8, torch.float64)
    monkeypatch.setattr(torch.Tensor, "round", mistake)
    q, scales = quantize_rows(W)
    x = torch.eye(8, dtype=torch.float64)
    off = (int8_linear(x, q.double(), scales, None) - F.linear(x, W)).abs()
    assert (off > 1.5 * error_bound(x, scales)).any()


@examples(0.5)
@given(seeds, sizes, st.sampled_from([16, 48, 80]), st.sampled_from(DTYPES), st.booleans())
def test_the_product_of_pytorch_is_the_definition(seed, out, inner, dtype, has_bias):
    q, scales = quantize_rows(weight(seed, out, inner, dtype))
    x, b = randn(seed + 1, 2, 3, inner, dtype=dtype), randn(seed + 2, out, dtype=dtype) if has_bias else None
    exact = int8_linear(x.double(), q.double(), scales.double(), None if b is None else b.double())
    assert_precision(int8_linear_on_cpu(x, q, scales, b), int8_linear(x, q, scales, b), exact)


@pytest.mark.parametrize("inner", [1, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_pytorch_would_read_beyond_takes_the_definition(dtype, inner):
    linear = torch.nn.Linear(inner, 6).to(dtype).requires_grad_(False)
    x = randn(0, 3, inner, dtype=dtype)
    q, scales = quantize_rows(linear.weight)
    assert torch.equal(Int8Linear(linear)(x), int8_linear(x, q, scales, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoder_writes_what_one_with_the_rounded_weights_writes(dtype):
    model, rounded = (tiny_model(dtype=dtype) for _ in range(2))
    decode_in_int8(model.model)
    with torch.no_grad():
        for linear in rounded.model.modules():
            if isinstance(linear, torch.nn.Linear):
                q, scales = quantize_rows(linear.weight)
                linear.weight.copy_(q * scales[:, None])
    prompts = token_ids(0, 2, 5).tolist()
    assert ml.generate(model, prompts, 6) == ml.generate(rounded, prompts, 6)
    held = [module.q.dtype for module in model.modules() if isinstance(module, Int8Linear)]
    assert held == [torch.int8] * (7 * len(model.model.layers))


def test_a_model_of_a_directory_writes(capsys):
    main("minilora/builtin", "Definition: a small bird\nCategory:")
    assert capsys.readouterr().out.strip()

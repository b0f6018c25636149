"""A tolerance that no mistake exceeds proves nothing: each known mistake must use ten times what is allowed."""

import pytest
import torch

from minilora import llama, nf4
from minilora.data import IGNORE_INDEX
from minilora.llama import causal_attention
from minilora.testing import laws, reference
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.compare import PARITY, maths, relative
from minilora.testing.lora_laws import linear_cases
from minilora.testing.strategies import METHODS
from tests import reference_model
from tests.models import matrix, randn, tiny_model, token_ids

WHERE = [3, 4], [3, 4]
Q, KEYS, VALUES = randn(1, 7, 4, 4), randn(2, 7, 2, 4), randn(3, 7, 2, 4)
ATTENTION = reference_model.causal_attention(Q.numpy(), KEYS.numpy(), VALUES.numpy(), *WHERE, 2)
WRONG_ATTENTION = {
    "mask shifted": causal_attention(Q, KEYS, VALUES, *WHERE, window=1),
    "window too wide": causal_attention(Q, KEYS, VALUES, *WHERE, window=3),
    "no window": causal_attention(Q, KEYS, VALUES, *WHERE),
    "one document": causal_attention(Q, KEYS, VALUES, [7], [7], window=2),
    "not divided by the root of E": causal_attention(2 * Q, KEYS, VALUES, *WHERE, window=2),
    "heads in the wrong order": causal_attention(Q, KEYS.flip(1), VALUES.flip(1), *WHERE, window=2),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")


def most_used(mistake, method, dtype, use_rslora):
    """How much of a bound the outputs and gradients of a layer use, in the worst case."""
    compared = [laws(method)[name].compare for name in ("forward", "gradients")]
    cases = linear_cases(method, dtype, use_rslora=use_rslora)
    return max(each.verdict[0] for compare in compared for case in cases for each in compare(mistake, case))


@matrix(3, dtype=DTYPES, method=METHODS, use_rslora=(False, True))
def test_a_mistake_of_a_layer_exceeds_the_bound_in_some_case(method, dtype, use_rslora):
    """Tenfold, but of the norm of DoRA in bfloat16, whose bounds are as wide as its many roundings."""
    least = 4 if (method, dtype) == ("dora", "bfloat16") else 10
    for name, mistake in CATALOGUE[method].items():
        if most_used(mistake, method, "float64", use_rslora) > 1:
            assert most_used(mistake, method, dtype, use_rslora) > least, name


@pytest.mark.parametrize("mistake", WRONG_ATTENTION)
def test_a_mistake_of_attention(mistake):
    assert maths(causal_attention(Q, KEYS, VALUES, *WHERE, window=2), ATTENTION) <= 1
    assert maths(WRONG_ATTENTION[mistake], ATTENTION) > 10


def test_norm_over_the_wrong_axis_or_without_eps():
    x, weight, eps = randn(1, 5, 5), randn(2, 5), 1e-3
    right = reference_model.rms_norm(x.numpy(), weight.numpy(), eps)
    assert maths(weight * x * torch.rsqrt(x.square().mean(0) + eps), right) > 10
    assert maths(llama.rms_norm(x, weight, 0.0), right) > 10
    assert maths(weight * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + eps), right) > 10


def test_gate_and_up_exchanged():
    gate, up = randn(1, 5, 5), randn(2, 5, 5)
    assert maths(llama.swiglu(up, gate), reference_model.swiglu(gate.numpy(), up.numpy())) > 10


def test_rotation_backwards_or_of_neighbouring_pairs():
    x, angles = randn(1, 5, 2, 6), randn(2, 5, 3)
    cos, sin = angles.cos(), angles.sin()
    right = reference_model.rotate(x.numpy(), cos.numpy(), sin.numpy())
    assert maths(llama.rotate(x, cos, -sin), right) > 10
    neighbours = llama.rotate(x[..., [0, 2, 4, 1, 3, 5]], cos, sin)[..., [0, 3, 1, 4, 2, 5]]
    assert maths(neighbours, right) > 10


def losses(micro_batches, labels):
    """The gradient of the head for a way of summing up, on logits of a fixed hidden state."""
    hidden, head = randn(1, 12, 5), torch.nn.Linear(5, 9, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(randn(2, 9, 5))
    places = [[i for i in range(first, first + 4) if labels[i] != IGNORE_INDEX] for first in (0, 4, 8)]
    total = micro_batches([llama.cross_entropy(hidden[rows], labels[rows], head) for rows in places])
    return torch.autograd.grad(total, head.weight)[0]


def test_mean_of_means_and_prompt_tokens_in_the_loss():
    labels = token_ids(3, 12, high=9)
    masked = labels.clone()
    masked[[1, 2, 3, 4, 9]] = IGNORE_INDEX  # 1, 3 and 3 labels in the three micro-batches
    right = losses(lambda sums: sum(sums) / 7, masked)
    assert maths(losses(lambda sums: sum(s / n for s, n in zip(sums, (1, 3, 3), strict=True)) / 3, masked), right) > 10
    assert maths(losses(lambda sums: sum(sums) / 12, labels), right) > 10
    assert maths(losses(lambda sums: sum(sums) / 12, masked), right) > 10


def test_labels_off_by_one():
    labels = token_ids(3, 12, high=9)
    assert maths(losses(sum, labels.roll(1)), losses(sum, labels)) > 10


def test_padding_that_is_attended_to():
    model, ids = tiny_model(), token_ids(3, 1, 9)
    right = model(ids[:, :5])
    left_padded = model(torch.cat([ids[:, 5:], ids[:, :5]], dim=1))[:, 4:]
    assert maths(model(ids, lengths=[5])[:, :5], right) <= 1
    assert maths(left_padded, right) > 10


PACKED, ABSMAX = nf4.quantize(randn(7, 8, 64, dtype=torch.float32) * torch.arange(1.0, 9).unsqueeze(1))
CODES, SCALES, OFFSET = nf4.quantize_absmax(ABSMAX)
ROUNDED = nf4.dequantize_absmax(CODES, SCALES, OFFSET)


def dense(packed=PACKED, absmax=ROUNDED, quant_type="nf4"):
    return nf4.dequantize(packed, absmax, (8, 64), torch.float32, quant_type=quant_type)


DEQUANTIZED = {
    "nibbles exchanged": dense(packed=PACKED << 4 | PACKED >> 4),
    "codebook off by one": dense(packed=(PACKED + 0x11).where((PACKED >> 4 < 15) & (PACKED & 15 < 15), PACKED)),
    "another codebook": dense(quant_type="fp4"),
    "one absmax for all": dense(absmax=ROUNDED.max().expand(8)),
    "absmax of the next block": dense(absmax=ROUNDED.roll(1)),
    "offset left out": dense(absmax=nf4.dequantize_absmax(CODES, SCALES, 0 * OFFSET)),
    "second scale left out": dense(absmax=nf4.dequantize_absmax(CODES, torch.ones_like(SCALES), OFFSET)),
}


@pytest.mark.parametrize("mistake", DEQUANTIZED)
def test_dequantizing(mistake):
    right = reference.nf4_dequantize(bytes(PACKED.tolist()), ROUNDED.numpy(), 512, 64).reshape(8, 64)
    assert relative(dense(), right, PARITY) <= 1
    assert relative(DEQUANTIZED[mistake], right, PARITY) > 10

"""A tolerance that no mistake exceeds proves nothing: each known mistake must use ten times what is allowed."""

import pytest
import torch
import torch.nn.functional as F

from minilora import llama, nf4
from minilora.data import IGNORE_INDEX
from minilora.llama import causal_attention
from minilora.testing import reference, reference_conv, reference_nf4
from minilora.testing.compare import GRADIENT_PARITY, PARITY, maths, precision, relative
from tests.models import randn, tiny_model, token_ids

N, INNER, OUTER, R, SCALE = 6, 8, 8, 2, 7.0  # square, or exchanged factors would not even multiply
# Base, bias and update of one size, or a mistake in the smallest would drown in the rounding of the largest.
X, W, BIAS = randn(1, N, INNER), randn(2, OUTER, INNER), 4 * randn(3, OUTER)
A, B, DY, M = randn(4, R, INNER), 0.1 * randn(5, OUTER, R), randn(6, N, OUTER), randn(7, OUTER).abs() + 1
V, DW = W + SCALE * B @ A, DY.T @ X  # the merged weight, and its gradient
NORM = V.norm(dim=1)
K = M / NORM
CLOSE = torch.nextafter(torch.tensor(SCALE), torch.tensor(8.0)).item()  # the smallest wrong scale in float32
WHERE = [3, 4], [3, 4]
Q, KEYS, VALUES = randn(1, 7, 4, 4), randn(2, 7, 2, 4), randn(3, 7, 2, 4)
ARRAYS = [tensor.numpy() for tensor in (W, A, B)]


def forward(scale=SCALE, weight=W, bias=BIAS, lora_A=A, lora_B=B):
    return F.linear(X, weight, bias) + scale * X @ lora_A.T @ lora_B.T


# what is computed -> the oracle's number, the right one as PyTorch has it
RIGHT = {
    "forward": (reference.lora_forward(X.numpy(), W.numpy(), BIAS.numpy(), *ARRAYS[1:], SCALE), forward()),
    "merged weight": (reference.lora_merged_weight(*ARRAYS, SCALE), V),
    "gradient of A": (reference.lora_gradients(X.numpy(), DY.numpy(), *ARRAYS[1:], SCALE)[0], SCALE * B.T @ DW),
    "DoRA": (
        X @ torch.from_numpy(reference.dora_merged_weight(*ARRAYS, SCALE, M.numpy())).T + BIAS,
        K * (X @ V.T) + BIAS,
    ),
    "gradient of DoRA's A": (
        reference.dora_gradients(X.numpy(), DY.numpy(), *ARRAYS, SCALE, M.numpy())[0],
        SCALE * B.T @ (K.unsqueeze(1) * DW),
    ),
    "attention": (
        reference.causal_attention(Q.numpy(), KEYS.numpy(), VALUES.numpy(), *WHERE, 2),
        causal_attention(Q, KEYS, VALUES, *WHERE, window=2),
    ),
}
MISTAKES = {
    "forward": {
        "scale dropped": forward(scale=1.0),
        "scale squared": forward(scale=SCALE**2),
        "scale in float32": forward(scale=CLOSE),
        "alpha over the root of r": forward(scale=SCALE * R**0.5),
        "A and B exchanged": forward(lora_A=B.T, lora_B=A.T),
        "base transposed": forward(weight=W.T),
        "bias scaled": forward(bias=SCALE * BIAS),
        "bias twice": forward() + BIAS,
        "delta subtracted": forward(scale=-SCALE),
        "a rank lost": forward(lora_A=A[:-1], lora_B=B[:, :-1]),
    },
    "merged weight": {
        "scale dropped": W + B @ A,
        "transposed": W + SCALE * (B @ A).T,
        "merged twice": W + 2 * SCALE * B @ A,
        "scale in float32": W + CLOSE * B @ A,
    },
    "gradient of A": {
        "scale dropped": B.T @ DW,
        "scale squared": SCALE**2 * B.T @ DW,
        "mean instead of sum": SCALE * B.T @ DW / N,
    },
    "DoRA": {
        "not divided by the length": M * (X @ V.T) + BIAS,
        "the length of the base": M / W.norm(dim=1) * (X @ V.T) + BIAS,
        "the length of columns": M / V.norm(dim=0) * (X @ V.T) + BIAS,
        "one length for all": M / V.norm() * (X @ V.T) + BIAS,
        "the length without the scale": M / (W + B @ A).norm(dim=1) * (X @ V.T) + BIAS,
        "the sum of squares": M / NORM**2 * (X @ V.T) + BIAS,
        "the bias stretched": K * (X @ V.T + BIAS),
        "only the update stretched": X @ W.T + K * SCALE * X @ A.T @ B.T + BIAS,
        "only the base stretched": K * (X @ W.T) + SCALE * X @ A.T @ B.T + BIAS,
        "columns stretched": X @ (K * V).T + BIAS,
    },
    "gradient of DoRA's A": {
        "not stretched": SCALE * B.T @ DW,
        "through the length": SCALE * B.T @ (K.unsqueeze(1) * (DW - ((DW * V).sum(1) / NORM**2).unsqueeze(1) * V)),
        "without the length": SCALE * B.T @ (M.unsqueeze(1) * DW),
    },
    "attention": {
        "mask shifted": causal_attention(Q, KEYS, VALUES, *WHERE, window=1),
        "window too wide": causal_attention(Q, KEYS, VALUES, *WHERE, window=3),
        "no window": causal_attention(Q, KEYS, VALUES, *WHERE),
        "one document": causal_attention(Q, KEYS, VALUES, [7], [7], window=2),
        "not divided by the root of E": causal_attention(2 * Q, KEYS, VALUES, *WHERE, window=2),
        "heads in the wrong order": causal_attention(Q, KEYS.flip(1), VALUES.flip(1), *WHERE, window=2),
    },
}
LOW = [(what, mistake) for what in ("forward", "DoRA") for mistake in MISTAKES[what] if mistake != "scale in float32"]


@pytest.mark.parametrize(("what", "mistake"), [(what, mistake) for what in MISTAKES for mistake in MISTAKES[what]])
def test_a_mistake_exceeds_the_tolerance_of_maths(what, mistake):
    oracle, right = RIGHT[what]
    assert maths(right, oracle) <= 1
    assert maths(MISTAKES[what][mistake], oracle) > 10


@pytest.mark.parametrize(("what", "mistake"), LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mistake_exceeds_the_tolerance_of_low_precision_and_of_parity(what, mistake, dtype):
    oracle, right = RIGHT[what]
    x, weight, bias, lora_A, lora_B, merged, k = (each.to(dtype) for each in (X, W, BIAS, A, B, V, K))
    plain = k * (x @ merged.T) + bias if what == "DoRA" else F.linear(x, weight, bias) + SCALE * x @ lora_A.T @ lora_B.T
    wrong = MISTAKES[what][mistake]
    assert precision(wrong.to(dtype), plain, oracle) > 10
    for allowed in (PARITY, GRADIENT_PARITY):
        assert relative(wrong.float(), right, allowed) > 10


def test_a_group_of_a_convolution_that_sees_another_one_s_channels():
    x, weight = randn(8, 2, 4, 5).numpy(), randn(9, 6, 2, 3).numpy()
    numbers = {"stride": [1], "padding": [(1, 1)], "dilation": [1]}
    right = F.conv1d(torch.from_numpy(x), torch.from_numpy(weight), padding=1, groups=2)
    whole = reference_conv.ungrouped(weight, 2)
    assert maths(right, reference_conv.convolution(x, whole, None, **numbers)) <= 1
    assert maths(right, reference_conv.convolution(x, whole[:, [2, 3, 0, 1]], None, **numbers)) > 10


def test_norm_over_the_wrong_axis_or_without_eps():
    x, weight, eps = randn(1, 5, 5), randn(2, 5), 1e-3
    right = reference.rms_norm(x.numpy(), weight.numpy(), eps)
    assert maths(weight * x * torch.rsqrt(x.square().mean(0) + eps), right) > 10
    assert maths(llama.rms_norm(x, weight, 0.0), right) > 10
    assert maths(weight * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + eps), right) > 10


def test_gate_and_up_exchanged():
    gate, up = randn(1, 5, 5), randn(2, 5, 5)
    assert maths(llama.swiglu(up, gate), reference.swiglu(gate.numpy(), up.numpy())) > 10


def test_rotation_backwards_or_of_neighbouring_pairs():
    x, angles = randn(1, 5, 2, 6), randn(2, 5, 3)
    cos, sin = angles.cos(), angles.sin()
    right = reference.rotate(x.numpy(), cos.numpy(), sin.numpy())
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
    right = reference_nf4.nf4_dequantize(bytes(PACKED.tolist()), ROUNDED.numpy(), 512, 64).reshape(8, 64)
    assert relative(dense(), right, PARITY) <= 1
    assert relative(DEQUANTIZED[mistake], right, PARITY) > 10

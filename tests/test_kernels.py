"""Kernels compute what their definitions say: one table of calls, and what holds for every entry."""

import functools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora import definition, lora, nf4
from minilora.kernels import attention
from minilora.kernels import delta_rule as chunks
from minilora.kernels import llama as loss
from minilora.models.bitsandbytes import FP4_LEVELS
from minilora.nf4 import NF4Linear
from minilora.testing import check_kernel
from tests import models
from tests.models import examples, of_kernels, randn, scales, seeds, sizes, small_tiles, token_ids

pytestmark = of_kernels
DEFINITIONS = definition.WITH_KERNEL
LOW = [torch.float32, torch.bfloat16, torch.float16]


class Call:
    """A drawn call of a definition.

    Sizes are small and odd, or large enough for the largest rounding errors of two ways to be alike.

    Attributes:
        leaves: the tensors of the call, in float64.
        fixed: which of them are never trained.
        masters: which of them stay in float32 at least.
        call: (function, *leaves) -> the result.
        kept: how many numbers in the dtype of the call, and how many in float32 at least, are kept for the backward
            pass besides the leaves and `stored`.
        stored: other tensors that are there anyway.
        not_kept: which leaves the backward pass does without.
    """

    def __init__(self, draw, is_large):
        self.draw, self.is_large, self.seed = draw, is_large, draw(seeds)
        self.leaves, self.fixed, self.masters = [], set(), set()
        self.kept, self.stored, self.not_kept = (0, 0), [], set()

    def size(self, large, most=9):
        return large if self.is_large else self.draw(st.integers(1, most))

    def rows(self):
        return [self.of(33, 3)] if self.is_large else self.draw(st.lists(sizes, max_size=2))

    def of(self, *values):
        return self.draw(st.sampled_from(values))

    def leaf(self, *shape, is_fixed=False, is_master=False):
        index = len(self.leaves)
        self.leaves.append(randn(self.seed + index, *shape))
        self.fixed |= {index} if is_fixed else set()
        self.masters |= {index} if is_master else set()

    def packed(self, rows, columns):
        layer = NF4Linear.quantize(randn(self.seed + 90, rows, columns), double_quant=self.of(True, False))
        self.stored += layer.parameters()
        return layer


def computing_in(layer, dtype):
    if layer.dtype != dtype:
        layer.dtype = dtype
    return layer


def lora_linear(c):
    rows, inner, outer, r, scale, kind = c.rows(), c.size(40), c.size(24), c.size(8), c.draw(scales), c.of("W", "4", "")
    c.leaf(*rows, inner)
    c.leaf(r, inner, is_master=True)
    c.leaf(outer, r, is_master=True)
    has_bias, packed = c.of(True, False), c.packed(outer, inner) if kind == "4" else None
    if has_bias:
        c.leaf(outer)
    if packed is None:
        c.leaf(outer, inner, is_fixed=not kind)
    c.kept, dense = (math.prod(rows) * r, 0), nn.Module()

    def call(function, x, A, B, *more):
        dense.weight = None if packed else more[-1]
        base = computing_in(packed, x.dtype) if packed else dense
        return function(x, base, more[0] if has_bias else None, A, B, scale)

    c.call = call


def dora_norm(c):
    inner, outer, r, scale = c.size(40), c.size(24), c.size(8), c.draw(scales)
    c.leaf(outer, inner)
    c.leaf(r, inner, is_master=True)
    c.leaf(outer, r, is_master=True)
    c.call = lambda function, *leaves: function(*leaves, scale)


def merge_weight(c):
    inner, outer, r, scale, count = c.size(40), c.size(24), c.size(8), c.draw(scales), c.of(1, 2)
    c.leaf(outer, inner)
    for _ in range(count):
        c.leaf(r, inner, is_master=True)
        c.leaf(outer, r, is_master=True)

    def call(function, weight, *factors):
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return function(weight, [lora.LoraAdapter({"lora_A": A, "lora_B": B}, scale) for A, B in pairs]).detach()

    c.call = call


def quantize(c):
    c.leaf(c.size(24), c.size(150, 150), is_fixed=True)
    block_size = c.of(5, 32, 64, 128, 135)
    c.call = lambda function, weight: function(weight, block_size)


def dequantize(c):
    shape = c.size(24), c.size(150, 150)
    block_size = c.of(5, 64, 135)
    packed, absmax = nf4.quantize.function(randn(c.seed, *shape), block_size)
    c.leaf(1, is_fixed=True)  # for its dtype
    levels = c.of(nf4.LEVELS, FP4_LEVELS)
    c.call = lambda function, x: function(packed, absmax, shape, x.dtype, block_size, levels)


def nf4_linear(c):
    rows, inner, outer = c.rows(), c.of(64, c.size(64, 150)), c.size(24)
    c.leaf(*rows, inner)
    has_bias, packed, c.not_kept = c.of(True, False), c.packed(outer, inner), {0}
    if has_bias:
        c.leaf(outer, is_master=True)
    c.call = lambda function, x, bias=None: function(x, computing_in(packed, x.dtype), bias)


def rms_norm(c):
    rows, width, eps = c.rows(), c.size(40) + 1, c.of(1e-6, 0.5)  # one number alone has hardly a gradient
    c.leaf(*rows, width)
    c.leaf(width)
    c.kept = 0, math.prod(rows)
    c.call = lambda function, *leaves: function(*leaves, eps)


def causal_attention(c):
    drawn = [24, 17] if c.is_large else c.draw(models.document_lengths)
    lengths = drawn if c.is_large else [3, *(n for n in drawn for _ in range(c.of(1, 2, 7)))]
    key_lengths = [n + c.of(0, 0, 3) for n in lengths]
    K, group, E, window = c.size(2, 3), c.size(2, 3), c.size(16), c.of(None, 2, 5)
    for n, heads in ((sum(lengths), K * group), (sum(key_lengths), K), (sum(key_lengths), K)):
        c.leaf(n, heads, E)
    c.kept = sum(leaf.numel() for leaf in c.leaves), 0
    c.call = lambda function, *leaves: function(*leaves, lengths, key_lengths, window)


def gated_delta_rule(c):
    lengths = [24, 17] if c.is_large else [*c.draw(models.document_lengths), c.of(0, 7)]
    K, E, F = c.size(2, 3), c.size(16), c.size(12)
    H, N = K * c.size(2, 3), sum(lengths)
    for heads in (K, K):
        c.leaf(N, heads, E, is_master=True)
    c.leaf(N, H, F)
    for _ in range(2):
        c.leaf(N, H, is_master=True)
    q, k, v, log_decay, beta = c.leaves
    c.leaves = [q, k / k.norm(dim=-1, keepdim=True), v, -log_decay.exp() / 4, beta.sigmoid()]
    states = c.of(None, randn(c.seed + 9, len(lengths), H, F, E))
    c.stored += [] if states is None else [states]
    c.call = lambda function, *leaves: function(*leaves, lengths, states)[0]


def swiglu(c):
    rows, width = c.rows(), c.size(40)
    c.leaf(*rows, width)
    c.leaf(*rows, width)
    c.call = lambda function, *leaves: function(*leaves)


def cross_entropy(c):
    n, D, V, has_bias = c.size(64), c.size(32), c.size(50) + 1, c.of(True, False)
    labels = token_ids(c.seed, n, high=V)
    c.leaf(n, D)
    c.leaf(V, D)
    if has_bias:
        c.leaf(V)
    c.kept = n * D, sum(leaf.numel() for leaf in c.leaves[1:])

    def call(function, hidden, weight, bias=None):
        head = nn.Linear(D, V, device="meta")
        head.weight, head.bias = weight, bias
        return function(hidden, labels, head)

    c.call = call


DIFFERENTIABLE = [lora_linear, nf4_linear, rms_norm, causal_attention, gated_delta_rule, swiglu, cross_entropy]
EXACT = [quantize, dequantize]
TABLE = {case.__name__: case for case in (*DIFFERENTIABLE, *EXACT, dora_norm, merge_weight)}
each = pytest.mark.parametrize("name", TABLE)
each_differentiable = pytest.mark.parametrize("name", [case.__name__ for case in DIFFERENTIABLE])


@st.composite
def calls(draw, name, is_large=False):
    call = Call(draw, is_large)
    TABLE[name](call)
    return call


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """A few rows are several tiles, blocks and chunks, also of documents for which other ways are faster."""
    small_tiles(monkeypatch, 100)
    monkeypatch.setattr(attention, "BLOCK_MIN_TOKENS", 0)
    monkeypatch.setattr(loss, "head_chunks", lambda _, *tensors: zip(*(t.split(3) for t in tensors), strict=True))
    monkeypatch.setattr(attention, "query_block_size", lambda dtype: 2)
    monkeypatch.setattr(attention, "MAX_BATCH", 6)
    monkeypatch.setattr(chunks, "CHUNK", 2)


def leaves_of(call, dtype, trained=None):
    wide = torch.promote_types(dtype, torch.float32)
    trained = set(range(len(call.leaves))) if trained is None else trained
    return [
        nn.Parameter(leaf.to(wide if i in call.masters else dtype), i in trained - call.fixed)
        for i, leaf in enumerate(call.leaves)
    ]


def assert_kernel_is_the_definition(name, call, leaves):
    own = DEFINITIONS[name]
    kernel, plain = (functools.partial(call.call, function) for function in (own, own.function))
    if TABLE[name] in EXACT:
        assert_exact(kernel(*leaves), plain(*leaves))
    else:
        check_kernel(kernel, plain, leaves, name)


def assert_exact(ours, theirs):
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    assert all(our.dtype == their.dtype and torch.equal(our, their) for our, their in pairs)


def test_every_kernel_is_in_the_table():
    assert sorted(TABLE) == sorted(DEFINITIONS)


@each
@given(data=st.data(), trained=st.sets(st.integers(0, 4)), has_grad=st.booleans())
def test_values_and_gradients_equal_the_definition_s_whatever_is_trained(name, data, trained, has_grad):
    call = data.draw(calls(name))
    with torch.set_grad_enabled(has_grad):
        assert_kernel_is_the_definition(name, call, leaves_of(call, torch.float64, trained))


@each
@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(data=st.data(), has_grad=st.booleans())
def test_in_low_precision_values_and_gradients_are_as_good_as_the_definition_s(name, dtype, data, has_grad):
    call = data.draw(calls(name, is_large=True))
    with torch.set_grad_enabled(has_grad):
        assert_kernel_is_the_definition(name, call, leaves_of(call, dtype))


@each_differentiable
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@given(data=st.data())
def test_of_the_results_only_what_is_counted_is_kept_for_the_backward_pass(name, dtype, data):
    call, saved = data.draw(calls(name)), []
    leaves = leaves_of(call, dtype)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(weakref.ref(tensor)) or tensor, lambda tensor: tensor
    ):
        y = call.call(DEFINITIONS[name], *leaves)
    storages = [tensor.untyped_storage() for found in saved if (tensor := found()) is not None]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert not {leaves[i].data_ptr() for i in call.not_kept} & kept.keys()
    for tensor in [*leaves, *call.stored]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    own, wide = call.kept
    assert sum(kept.values()) == own * dtype.itemsize + wide * torch.promote_types(dtype, torch.float32).itemsize
    del y


@torch.no_grad()
def test_a_4_bit_linear_by_tiles_keeps_the_dtype_of_autocast():
    layer = NF4Linear.quantize(randn(0, 9, 64).float(), randn(1, 9).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(2, 1, 64).float()).dtype == torch.bfloat16


@pytest.mark.parametrize("trained", ["A", "B", "AB"])
def test_x_is_kept_only_for_the_gradient_of_A_and_x_A_only_for_that_of_B(trained):
    (x, A, B), saved = (randn(i, *shape) for i, shape in enumerate([(5, 4), (2, 4), (3, 2)])), []
    A.requires_grad_("A" in trained)
    B.requires_grad_("B" in trained)
    base = nn.Linear(4, 3).double().requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora.lora_linear(x.requires_grad_(), base, None, A, B, 2.0)
    assert (x.data_ptr() in {tensor.data_ptr() for tensor in saved}) == ("A" in trained)
    assert ((5, 2) in {tuple(tensor.shape) for tensor in saved}) == ("B" in trained)


@pytest.mark.parametrize("name", ["dora_norm", "merge_weight", "quantize", "dequantize", "nf4_linear"])
@torch.no_grad()
def test_besides_the_result_a_kernel_never_holds_as_much_as_a_weight(name):
    weight, A, B = (randn(i, *shape, dtype=torch.bfloat16) for i, shape in enumerate([(250, 64), (2, 64), (250, 2)]))
    packed, absmax = nf4.quantize.function(weight)
    layer = NF4Linear.quantize(weight)
    call = {
        "dora_norm": lambda: lora.dora_norm(weight, A, B, 2.0),
        "merge_weight": lambda: lora.merge_weight(weight, [lora.LoraAdapter({"lora_A": A, "lora_B": B}, 2.0)]),
        "quantize": lambda: nf4.quantize(weight),
        "dequantize": lambda: nf4.dequantize(packed, absmax, (250, 64), torch.bfloat16),
        "nf4_linear": lambda: nf4.nf4_linear(weight[:1], layer, None),
    }[name]
    live, most, _ = models.allocated(call)
    assert most - live <= weight.nbytes / 2
    with ml.plain(name):
        live, most, _ = models.allocated(call)
    assert most - live >= weight.nbytes


@each_differentiable
@given(data=st.data())
def test_what_comes_next_may_change_a_result_in_place(name, data):
    call = data.draw(calls(name))
    leaves = leaves_of(call, torch.float64)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    both = (relu(call.call(DEFINITIONS[name], *leaves)).sum() for relu in (torch.relu, torch.relu_))
    assert all(map(torch.equal, *(torch.autograd.grad(y, trained) for y in both)))


@each_differentiable
@examples(0.2)
@given(data=st.data())
def test_a_second_derivative_is_refused(name, data):
    call = data.draw(calls(name))
    leaves = leaves_of(call, torch.float64)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    first, *_ = torch.autograd.grad(call.call(DEFINITIONS[name], *leaves).square().sum(), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_plain_switches_some_kernels_off_or_all_and_back_on_whatever_happens_and_refuses_other_names():
    def off():
        return {name for name, own in DEFINITIONS.items() if own.disabled}

    with ml.plain("swiglu"):
        assert off() == {"swiglu"}
        with pytest.raises(KeyboardInterrupt), ml.plain():  # noqa: PT012
            assert off() == set(DEFINITIONS)
            raise KeyboardInterrupt
        with ml.plain("rms_norm", "swiglu"):
            assert off() == {"rms_norm", "swiglu"}
        assert off() == {"swiglu"}
    with pytest.raises(ml.ConfigError, match=r"\['swish'\]; .*'swiglu'"), ml.plain("rms_norm", "swish"):
        pass
    assert off() == set()

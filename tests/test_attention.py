"""The kernels of causal attention: each against the loops, in blocks of any size, memory, and which one is chosen."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora.kernels import attention
from minilora.kernels.attention import block_attention, fused_attention, select_kernel
from minilora.llama import causal_attention
from minilora.testing.compare import assert_maths
from tests import reference_model
from tests.models import allocated, examples, of_kernels, randn, seeds
from tests.test_llama import attention_inputs, wide

windows = st.none() | st.integers(1, 6)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Four rows are two blocks, seven documents more than are taken at once."""
    monkeypatch.setattr(attention, "query_block_size", lambda dtype: 2)
    monkeypatch.setattr(attention, "MAX_BATCH", 6)


PLAIN = causal_attention.function


@pytest.mark.parametrize("kernel", [block_attention, fused_attention, causal_attention, PLAIN])
@given(attention_inputs(), windows)
def test_attention_equals_the_loops(kernel, case, window):
    q, k, v, lengths, key_lengths = case
    if kernel is fused_attention:
        k, v, key_lengths, window = k[: len(q)], v[: len(q)], lengths, None
    expected = reference_model.causal_attention(wide(q), wide(k), wide(v), lengths, key_lengths, window)
    assert_maths(kernel(q, k, v, lengths, key_lengths, window), expected)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@given(attention_inputs())
def test_keys_that_are_repeated_for_a_gpu_give_the_same(case):
    q, k, v, lengths, _ = case
    k, v = k[: len(q)], v[: len(q)]
    on_gpu = fused_attention(*(tensor.as_subclass(OnGPU) for tensor in (q, k, v)), lengths, lengths, None)
    assert_maths(on_gpu.as_subclass(torch.Tensor), fused_attention(q, k, v, lengths, lengths, None))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("n", "m", "window", "is_masked"), [(5, 5, None, 0), (1, 5, None, 0), (3, 5, None, 1), (5, 5, 5, 0), (5, 5, 4, 1)]
)
def test_the_fused_kernel_is_chosen_where_it_needs_no_mask(n, m, window, is_masked, device):
    """A mask grows with the square of the length."""
    with FakeTensorMode():
        q = torch.empty(n, 9, 64, device=device)
    assert select_kernel(q, [n], [m], window) is (block_attention if is_masked else fused_attention)


@given(attention_inputs())
def test_the_fused_kernel_lets_a_single_query_see_all_keys(case):
    q, k, v, _, key_lengths = case
    q, ones = q[: len(key_lengths)], [1] * len(key_lengths)
    assert_maths(fused_attention(q, k, v, ones, key_lengths, None), PLAIN(q, k, v, ones, key_lengths))


@given(attention_inputs(longest=20), windows, st.sampled_from([1, 4, 7, 128]))
def test_blocks_of_any_size_have_the_values_and_gradients_of_the_definition(case, window, size):
    leaves = [leaf.requires_grad_() for leaf in case[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "query_block_size", lambda dtype: size)
        ours, plain = (
            (o, *torch.autograd.grad(o, leaves, randn(1, *o.shape)))
            for o in (f(*case, window) for f in (block_attention, PLAIN))
        )
    for our, expected in zip(ours, plain, strict=True):
        assert_maths(our, expected)


@examples(0.3)
@given(seeds)
def test_the_gradient_of_a_key_that_many_blocks_see_is_summed_in_float32(seed):
    """One key, alike to all queries: its gradient is a long sum of small parts."""
    n, dtype = 400, torch.bfloat16
    q, do = torch.zeros(n, 1, 8, dtype=dtype), randn(seed, n, 1, 8, dtype=dtype).abs()
    v = randn(seed + 1, n, 1, 8, dtype=dtype).requires_grad_()
    (ours,) = torch.autograd.grad(block_attention(q, q, v, [n], [n], None), v, do)
    exact = v.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(PLAIN(q.double(), q.double(), exact, [n], [n]), exact, do.double())
    error = (ours[0].double() - oracle[0]).norm() / oracle[0].norm()
    assert error <= 4 * torch.finfo(dtype).eps  # of each P and of the sum, not of each of a hundred sums


@given(attention_inputs())
def test_a_head_that_lies_between_others_is_read_in_place_and_not_written(case):
    q, k, v, *where = case
    whole = torch.cat((q, q), dim=-1)
    before = whole.clone()
    assert_maths(block_attention(whole[..., :3], k, v, *where, None), block_attention(q, k, v, *where, None))
    assert torch.equal(whole, before)


@of_kernels
@pytest.mark.parametrize(
    ("dtype", "length", "window"),
    [
        (torch.bfloat16, 1024, None),
        (torch.float32, 2048, 64),
        pytest.param(torch.float32, 8192, None, marks=pytest.mark.long),  # of torch's own kernel
    ],
)
def test_memory_grows_with_the_length_of_a_document_and_not_with_its_square(dtype, length, window, monkeypatch):
    monkeypatch.setattr(attention, "query_block_size", lambda dtype: 64)

    def most(length):
        q, k, v = (randn(i, length, heads, 8, dtype=dtype).requires_grad_() for i, heads in enumerate((2, 1, 1)))
        return allocated(lambda: causal_attention(q, k, v, [length], [length], window).sum().backward())[1]

    assert most(length) <= 2.2 * most(length // 2)


@pytest.mark.parametrize(("device", "chosen"), [("mps", block_attention), ("cuda", fused_attention)])
def test_the_fused_kernel_is_not_used_on_mps_where_queries_may_see_later_keys(device, chosen):
    q = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    assert select_kernel(q, [5], [5], None) is chosen

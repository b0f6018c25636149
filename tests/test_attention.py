"""Causal attention: each kernel against the loops and the obvious dense mask; gradients, what is saved, the choice."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from minilora.models import attention
from minilora.models.attention import block_attention, causal_attention, fused_attention, kernel_for, varlen_attention
from minilora.testing import reference
from tests.models import allocated, examples, randn, seeds
from tests.tolerance import assert_maths, assert_parity, assert_precision

LOW = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
windows = st.none() | st.integers(1, 6)
VARLEN = "torch.nn.attention.varlen"  # where older versions of torch have nothing
kernels = pytest.mark.parametrize("kernel", [block_attention, fused_attention, varlen_attention, causal_attention])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Four rows are two blocks, seven documents more than are taken at once; torch's kernel of GPUs is stood in for."""
    monkeypatch.setattr(attention, "_block_size", lambda dtype: 2)
    monkeypatch.setattr(attention, "TOGETHER", 6)
    monkeypatch.setitem(sys.modules, VARLEN, SimpleNamespace(varlen_attn=varlen_attn_as_documented))


def varlen_attn_as_documented(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch says of `varlen_attn`: documents by their offsets, the window (left, right) with -1 for all."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths, key_lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths), max(key_lengths))
    assert enable_gqa or q.size(1) == k.size(1)
    left, right = window_size
    assert right == 0
    return dense_attention(q, k, v, lengths, key_lengths, None if left == -1 else left + 1)


def dense_attention(q, k, v, lengths, key_lengths, window):
    """The obvious way: all scores of a document, those of what is not seen at -inf, in the dtype of q."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    outputs = []
    for queries, keys, values in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
        n, m = len(queries), len(keys)
        distance = torch.arange(m - n, m).unsqueeze(1) - torch.arange(m)
        hidden = (distance < 0) | (distance >= (m if window is None else window))
        scores = torch.einsum("qhe,khe->hqk", queries, keys) / q.size(-1) ** 0.5
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def wide(tensor):
    return tensor.detach().double().numpy()


@st.composite
def inputs(draw, longest=9, alike=(1, 2, 7), most_documents=3):
    """q, k, v, lengths and key_lengths of several documents, some of which are alike, and some have keys in a cache."""
    seed, kv_heads, group = draw(seeds), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, longest), st.integers(0, 4), st.sampled_from(alike))
    drawn = draw(st.lists(sizes, min_size=1, max_size=most_documents))
    lengths = [n for n, _, times in drawn for _ in range(times)]
    key_lengths = [n + past for n, past, times in drawn for _ in range(times)]
    q = randn(seed, sum(lengths), kv_heads * group, 3)
    k, v = (randn(seed + i, sum(key_lengths), kv_heads, 3) for i in (1, 2))
    return [q, k, v, lengths, key_lengths]


@kernels
@given(inputs(), windows)
def test_attention_equals_the_loops(kernel, case, window):
    q, k, v, lengths, key_lengths = case
    expected = reference.causal_attention(wide(q), wide(k), wide(v), lengths, key_lengths, window)
    assert_maths(kernel(q, k, v, lengths, key_lengths, window), expected)


@kernels
@given(inputs())
def test_a_window_as_long_as_the_document_changes_nothing(kernel, case):
    *_, key_lengths = case
    assert_maths(kernel(*case, max(key_lengths)), kernel(*case, None))


@given(inputs(longest=20), windows, st.sampled_from([1, 4, 7, 128]))
def test_blocks_of_any_size_have_the_values_and_gradients_of_the_dense_mask(case, window, size):
    leaves = [leaf.requires_grad_() for leaf in case[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_block_size", lambda dtype: size)
        ours, dense = (
            (o, *torch.autograd.grad(o, leaves, randn(1, *o.shape)))
            for o in (f(*case, window) for f in (block_attention, dense_attention))
        )
    for our, expected in zip(ours, dense, strict=True):
        assert_maths(our, expected)


@pytest.mark.parametrize("kernel", [block_attention, fused_attention])
@examples(0.4)
@given(inputs(longest=3, alike=(1, 2), most_documents=2), windows)
def test_attention_has_the_gradients_of_finite_differences(kernel, case, window):
    *leaves, lengths, key_lengths = case
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *qkv: kernel(*qkv, lengths, key_lengths, window), leaves)


@given(seeds, LOW, st.sampled_from([None, 5]))
def test_values_and_gradients_of_blocks_are_as_precise_as_plain_pytorch(seed, dtype, window):
    lengths, key_lengths = [24, 17], [24, 20]
    q = randn(seed, sum(lengths), 4, 16, dtype=dtype)
    parts = [q, *(randn(seed + i, sum(key_lengths), 2, 16, dtype=dtype) for i in (1, 2))]

    def results(function, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in parts]
        o = function(*leaves, lengths, key_lengths, window)
        return o, *torch.autograd.grad(o, leaves, randn(seed + 3, *o.shape, dtype=q.dtype).to(dtype))

    ways = ((block_attention, dtype), (dense_attention, dtype), (dense_attention, torch.float64))
    for ours, plain, oracle in zip(*(results(*way) for way in ways), strict=True):
        assert_precision(ours, plain, oracle.detach())


@examples(0.3)
@given(seeds)
def test_the_gradient_of_a_key_that_many_blocks_see_is_summed_in_float32(seed):
    """One key, alike to all queries: its gradient is a long sum of small parts."""
    n, dtype = 400, torch.bfloat16
    q, do = torch.zeros(n, 1, 8, dtype=dtype), randn(seed, n, 1, 8, dtype=dtype).abs()
    v = randn(seed + 1, n, 1, 8, dtype=dtype).requires_grad_()
    (ours,) = torch.autograd.grad(block_attention(q, q, v, [n], [n], None), v, do)
    exact = v.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(dense_attention(q.double(), q.double(), exact, [n], [n], None), exact, do.double())
    error = (ours[0].double() - oracle[0]).norm() / oracle[0].norm()
    assert error <= 4 * torch.finfo(dtype).eps  # of each P and of the sum, not of each of a hundred sums


@given(inputs())
def test_a_head_that_lies_between_others_is_read_in_place_and_not_written(case):
    q, k, v, *where = case
    whole = torch.cat((q, q), dim=-1)
    before = whole.clone()
    assert_maths(block_attention(whole[..., :3], k, v, *where, None), block_attention(q, k, v, *where, None))
    assert torch.equal(whole, before)


@given(inputs(), windows)
def test_blocks_save_queries_keys_and_values_and_nothing_else(case, window):
    leaves, saved = [leaf.requires_grad_() for leaf in case[:3]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        block_attention(*case, window)
    assert sum(tensor.numel() for tensor in saved) == sum(leaf.numel() for leaf in leaves)


@pytest.mark.parametrize(
    ("dtype", "length", "window"),
    [
        (torch.bfloat16, 1024, None),
        (torch.float32, 2048, 64),
        pytest.param(torch.float32, 8192, None, marks=pytest.mark.long),  # of torch's own kernel
    ],
)
def test_memory_grows_with_the_length_of_a_document_and_not_with_its_square(dtype, length, window, monkeypatch):
    monkeypatch.setattr(attention, "_block_size", lambda dtype: 64)

    def most(length):
        q, k, v = (randn(i, length, heads, 8, dtype=dtype).requires_grad_() for i, heads in enumerate((2, 1, 1)))
        return allocated(lambda: causal_attention(q, k, v, [length], [length], window).sum().backward())[1]

    assert most(length) <= 2.2 * most(length // 2)


@pytest.mark.parametrize(
    ("dtype", "key_lengths", "window", "kernel"),
    [
        (torch.bfloat16, [2048], None, block_attention),
        (torch.float32, [512, 2048], None, block_attention),
        (torch.float32, [20, 4096], None, fused_attention),
        (torch.float32, [20, 4096], 512, block_attention),
        (torch.float32, [20, 4096], 8192, fused_attention),
    ],
)
def test_the_kernel_follows_from_dtype_and_size(dtype, key_lengths, window, kernel):
    assert kernel_for(torch.empty(0, 9, 64, dtype=dtype), key_lengths, window) is kernel


@pytest.mark.parametrize(
    ("version", "dtype", "width", "capability", "window", "kernel"),
    [
        ("2.13.0", torch.bfloat16, 64, (8, 0), None, varlen_attention),
        ("2.13.0", torch.bfloat16, 64, (8, 0), 3, varlen_attention),
        ("2.12.1", torch.bfloat16, 64, (8, 0), None, fused_attention),
        ("2.13.0", torch.float32, 64, (9, 0), None, fused_attention),
        ("2.13.0", torch.float32, 64, (9, 0), 3, block_attention),
        ("2.13.0", torch.float32, 64, (9, 0), 4, fused_attention),
        ("2.13.0", torch.float16, 64, (7, 5), None, fused_attention),
        ("2.13.0", torch.float16, 60, (9, 0), None, fused_attention),
        ("2.13.0", torch.float16, 256, (9, 0), None, varlen_attention),
        ("2.13.0", torch.float16, 264, (9, 0), None, fused_attention),
    ],
)
def test_a_gpu_answers_all_documents_at_once_where_its_kernel_can(
    version, dtype, width, capability, window, kernel, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(4, 9, width, dtype=dtype, device="cuda")
    assert kernel_for(q, [4], window) is kernel


@kernels
def test_a_forecast_can_run_every_kernel_without_numbers(kernel, monkeypatch):
    if kernel is varlen_attention:
        monkeypatch.delitem(sys.modules, VARLEN)
        pytest.importorskip(VARLEN)
    with FakeTensorMode():
        q, k, v = (torch.empty(9, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        o = kernel(q, k, v, [7, 2], [7, 2], 3)
        gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert [each.shape for each in (o, *gradients)] == [each.shape for each in (q, q, k, v)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.long), 3])
def test_blocks_are_compiled_as_one_graph_whatever_the_lengths(window):
    compiled = torch.compile(block_attention, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 1], [2, 2, 3]):
        leaves = [randn(i, sum(lengths), heads, 4).float().requires_grad_() for i, heads in enumerate((4, 2, 2))]
        outputs = (function(*leaves, lengths, lengths, window) for function in (compiled, block_attention))
        results = ((o, *torch.autograd.grad(o.square().sum(), leaves)) for o in outputs)
        for one, other in zip(*results, strict=True):
            assert_parity(one, other)

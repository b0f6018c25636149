"""The operations: each against its oracle, gradients and precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig
from minilora.adapters.layers import AdapterLinear
from minilora.errors import TrainingError
from minilora.models import ops
from minilora.models.ops import IGNORE_INDEX
from minilora.quant.linear import NF4Linear
from minilora.testing import reference
from tests.models import document_lengths, examples, fill_, randn, seeds, sizes, small_tiles, tiny_model, token_ids
from tests.tolerance import assert_maths, assert_parity, assert_precision

LOW = st.sampled_from([torch.float32, torch.bfloat16])
EPS = 1e-6


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Nine rows are more than one chunk, and a chunk more than one tile."""
    monkeypatch.setattr(ops, "head_chunk", lambda head: 3)
    small_tiles(monkeypatch, 20)


def wide(tensor):
    return tensor.detach().double().numpy()


@given(seeds, sizes, sizes, sizes, st.sampled_from([1e-6, 0.5]))
def test_rms_norm_equals_the_loops(seed, n, heads, width, eps):
    x, weight = randn(seed, n, heads, width), randn(seed + 1, width)
    assert_maths(ops.rms_norm(x, weight, eps), reference.rms_norm(wide(x), wide(weight), eps))


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(ops.rms_norm(torch.zeros(2, 3), torch.ones(3), EPS), torch.zeros(2, 3))


@given(seeds, sizes, sizes)
def test_swiglu_equals_the_loops(seed, n, width):
    gate, up = 4 * randn(seed, n, width), randn(seed + 1, n, width)
    assert_maths(ops.swiglu(gate, up), reference.swiglu(wide(gate), wide(up)))


@st.composite
def rotations(draw, dtype=torch.float64):
    """x of N tokens, H heads and R + rest coordinates, and a rotation of R of them."""
    seed, n, heads, half, rest = draw(seeds), draw(sizes), draw(sizes), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    angles = 3 * randn(seed + 1, n, half)
    return [part.to(dtype) for part in (randn(seed, n, heads, 2 * half + rest), angles.cos(), angles.sin())]


@given(rotations())
def test_rotate_is_a_product_of_complex_numbers(case):
    assert_maths(ops.rotate(*case), reference.rotate(*map(wide, case)))


HEADS = ("plain", "bias", "frozen", "adapted", "four bits", "adapted four bits")


def make_head(kind, seed, D, V):
    """A head of each kind that may be trained, and two that are not."""
    head = nn.Linear(D, V, bias=kind == "bias" or "adapted" in kind).double()
    fill_(head, seed)
    if kind not in ("plain", "bias"):
        head.requires_grad_(False)
    if "four bits" in kind:
        head = NF4Linear.quantize(head.weight, head.bias)
    if "adapted" not in kind:
        return head
    adapted = AdapterLinear(head, "lm_head")
    factors = {"lora_A": randn(seed + 1, 2, D), "lora_B": randn(seed + 2, V, 2)}
    adapted.add("default", LoraConfig(r=2, lora_alpha=7), factors)
    adapted.active = ("default",)
    return adapted


@st.composite
def heads(draw):
    """Hidden states of up to 9 tokens, about a third of them without a label, and a head."""
    seed, n, D, V = draw(seeds), draw(sizes), draw(sizes), draw(st.integers(2, 9))
    labels = token_ids(seed, n, high=V).masked_fill(token_ids(seed + 1, n, high=3) == 0, IGNORE_INDEX)
    head = make_head(draw(st.sampled_from(HEADS)), seed + 3, D, V)
    return randn(seed + 2, n, D).requires_grad_(), labels, head


def full_cross_entropy(hidden, labels, head):
    return F.cross_entropy(head(hidden), labels, reduction="sum", ignore_index=IGNORE_INDEX)


@given(heads())
def test_cross_entropy_equals_the_loops_over_full_logits(case):
    hidden, labels, head = case
    logits = head(hidden)
    assert_maths(ops.cross_entropy(*case), reference.cross_entropy(wide(logits), labels))


def assert_gradients_of_full_logits(case, inputs, upstream=1.0):
    both = [upstream * cross(*case) for cross in (ops.cross_entropy, full_cross_entropy)]
    ours, full = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in both)
    for our, expected in zip(ours, full, strict=True):
        assert_maths(our, expected)


@given(heads(), st.sampled_from([0.25, 7.0]), st.booleans())
def test_cross_entropy_gives_hidden_and_head_the_gradients_of_the_full_logits(case, upstream, is_frozen):
    """Also the head alone, where the hidden states are frozen."""
    hidden, labels, head = case
    trained = [p for p in head.parameters() if p.requires_grad]
    assume(trained or not is_frozen)
    if is_frozen:
        assert_gradients_of_full_logits((hidden.detach(), labels, head), trained, upstream)
    else:
        assert_gradients_of_full_logits(case, [hidden, *trained], upstream)


@examples(0.5)
@given(seeds, document_lengths)
def test_cross_entropy_gives_a_tied_head_the_gradient_of_both_its_uses(seed, lengths):
    model, n = tiny_model("qwen2", seed, num_hidden_layers=1), sum(lengths)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = model.model(token_ids(seed, n), lengths)
    assert_gradients_of_full_logits((hidden, token_ids(seed + 1, n), model.lm_head), list(model.parameters()))


@given(heads())
def test_cross_entropy_goes_back_to_what_a_head_is_given_besides(case):
    """Where nothing that it knows of is trained."""
    hidden, labels, head = case
    assume((labels != IGNORE_INDEX).any())
    head.requires_grad_(False)
    added = randn(1, head.out_features).requires_grad_()
    head.register_forward_hook(lambda module, inputs, logits: logits + added)
    assert_gradients_of_full_logits((hidden.detach(), labels, head), [added])


def test_cross_entropy_leaves_a_trained_part_of_the_head_that_does_not_act_without_gradient():
    hidden, labels, head = randn(0, 5, 4).requires_grad_(), token_ids(0, 5, high=3), make_head("adapted", 1, 4, 3)
    head.active = ()
    ops.cross_entropy(hidden, labels, head).backward()
    assert not any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert_gradients_of_full_logits((hidden, labels, head), [hidden])


@pytest.mark.parametrize("kind", HEADS)
def test_cross_entropy_without_labels_is_zero_and_so_are_its_gradients(kind):
    hidden, head = randn(0, 5, 4).requires_grad_(), make_head(kind, 1, 4, 3)
    loss = ops.cross_entropy(hidden, torch.full((5,), IGNORE_INDEX), head)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros(5, 4).double())
    assert not any(p.grad.any() for p in head.parameters() if p.requires_grad)


@given(heads())
def test_cross_entropy_without_gradients_is_the_same_number(case):
    with torch.no_grad():
        loss = ops.cross_entropy(*case)
    assert not loss.requires_grad
    assert_maths(loss, ops.cross_entropy(*case))


@given(heads(), st.booleans())
def test_the_head_sees_labelled_rows_only_and_a_chunk_at_a_time(case, grad):
    hidden, labels, head = case
    rows = []
    handle = head.register_forward_hook(lambda _, args, output: rows.append(output[..., 0].numel()))
    with torch.set_grad_enabled(grad):
        ops.cross_entropy(hidden, labels, head)
    handle.remove()
    assert sum(rows) == (labels != IGNORE_INDEX).sum()
    assert max(rows) <= 3


@given(heads(), st.booleans())
def test_what_is_kept_for_the_backward_pass_is_as_large_as_hidden_and_head(case, is_frozen):
    hidden, labels, head = case
    trained = [p for p in head.parameters() if p.requires_grad]
    assume(trained or not is_frozen)
    loss = ops.cross_entropy(hidden.detach() if is_frozen else hidden, labels, head)
    kept = sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors)
    assert kept == hidden[labels != IGNORE_INDEX].numel() + sum(p.numel() for p in trained)


@given(seeds, sizes, sizes)
def test_rms_norm_and_swiglu_have_the_gradients_of_finite_differences(seed, n, width):
    x, y = randn(seed, n, width).requires_grad_(), randn(seed + 1, n, width).requires_grad_()
    weight = randn(seed + 2, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: ops.rms_norm(*args, 0.1), (x, weight))
    assert torch.autograd.gradcheck(ops.swiglu, (x, y))


@examples(0.3)
@given(rotations())
def test_rotate_has_the_gradients_of_finite_differences(case):
    x, cos, sin = case
    assert torch.autograd.gradcheck(lambda x: ops.rotate(x, cos, sin), (x.requires_grad_(),))


@examples(0.5)
@given(heads())
def test_cross_entropy_has_the_gradient_of_finite_differences(case):
    hidden, labels, head = case
    assert torch.autograd.gradcheck(lambda rows: ops.cross_entropy(rows, labels, head), (hidden,))


def assert_as_precise(ours, plain, leaves):
    """Values and gradients of one function against the other, both against the latter in float64."""

    def results(function, dtype):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*own)
        return y, *torch.autograd.grad(y, own, randn(9, *y.shape, dtype=leaves[0].dtype).to(dtype))

    dtype = leaves[0].dtype
    found = zip(results(ours, dtype), results(plain, dtype), results(plain, torch.float64), strict=True)
    for our, other, oracle in found:
        assert our.dtype == dtype
        assert_precision(our, other, oracle.detach())


@given(seeds, LOW)
def test_rms_norm_is_as_precise_as_plain_pytorch(seed, dtype):
    leaves = randn(seed, 9, 33, dtype=dtype), randn(seed + 1, 33, dtype=dtype)
    assert_as_precise(
        lambda x, weight: ops.rms_norm(x, weight, EPS),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight,
        leaves,
    )


@given(seeds, LOW)
def test_rms_norm_takes_its_mean_in_float32_and_rounds_before_the_weight(seed, dtype):
    x, weight = randn(seed, 9, 33, dtype=dtype), randn(seed + 1, 33, dtype=dtype)
    rounded = ops.rms_norm(x.float(), torch.ones(33), EPS).to(dtype)
    assert torch.equal(ops.rms_norm(x, weight, EPS), weight * rounded)


@given(seeds, LOW)
def test_swiglu_is_as_precise_as_plain_pytorch(seed, dtype):
    leaves = (4 * randn(seed, 9, 33)).to(dtype), randn(seed + 1, 9, 33, dtype=dtype)
    assert_as_precise(ops.swiglu, lambda gate, up: gate * gate.sigmoid() * up, leaves)


@given(st.data(), LOW)
def test_rotate_is_as_precise_as_plain_pytorch(data, dtype):
    x, cos, sin = data.draw(rotations(dtype))
    R = 2 * cos.size(-1)

    def plain(x):
        a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
        twice = [torch.cat((table, table), dim=-1).unsqueeze(1).to(x.dtype) for table in (cos, sin)]
        return torch.cat((x[..., :R] * twice[0] + torch.cat((-b, a), dim=-1) * twice[1], rest), dim=-1)

    assert_as_precise(lambda x: ops.rotate(x, cos, sin), plain, [x])


@given(seeds, st.sampled_from([torch.bfloat16, torch.float16]))
def test_rotate_rounds_as_the_checkpoints_own_code_does(seed, dtype):
    x, angles = randn(seed, 9, 3, 8, dtype=dtype), randn(seed + 1, 9, 1, 4)
    a, b = x.chunk(2, dim=-1)
    cos, sin = (table.to(dtype) for table in (angles.cos(), angles.sin()))
    theirs = x * torch.cat((cos, cos), dim=-1) + torch.cat((-b, a), dim=-1) * torch.cat((sin, sin), dim=-1)
    assert torch.equal(ops.rotate(x, cos.squeeze(1), sin.squeeze(1)), theirs)


@given(seeds, LOW)
def test_cross_entropy_and_its_gradient_are_as_precise_as_plain_pytorch(seed, dtype):
    labels, head = token_ids(seed, 64, high=50), make_head("frozen", seed + 1, 32, 50)
    hidden, head = randn(seed, 64, 32, dtype=dtype).requires_grad_(), head.to(dtype)
    ours = ops.cross_entropy(hidden, labels, head)
    plain = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    assert ours.dtype == torch.float32
    assert_precision(ours, plain, reference.head_cross_entropy(wide(hidden), labels, wide(head.weight)))
    exact = hidden.detach().double().requires_grad_()
    losses = ((ours, hidden), (plain, hidden), (full_cross_entropy(exact, labels, copy.deepcopy(head).double()), exact))
    assert_precision(*(torch.autograd.grad(loss / 7, to)[0] for loss, to in losses))


def test_a_label_whose_probability_is_no_float32_has_a_finite_loss_and_a_gradient():
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[200.0, 0], [0, 0], [0, 300.0]])
    hidden, labels = torch.eye(2).requires_grad_(), torch.tensor([1, 2])
    loss = ops.cross_entropy(hidden, labels, head)
    assert loss.item() == 200
    loss.backward()
    assert torch.equal(hidden.grad, torch.tensor([[200.0, 0], [0, 0]]))


def test_the_gradient_of_a_sure_label_is_what_is_left_to_it():
    """p[label] - 1, of which 16 bits would leave nothing."""
    head = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    head.weight.data = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    ops.cross_entropy(hidden, torch.tensor([0]), head).backward()
    expected = -8 / (1 + torch.tensor(8.0).exp())
    assert_parity(hidden.grad.flatten(), expected.reshape(1), torch.finfo(torch.bfloat16).eps)


def saved_by(function, *leaves):
    """Where what a function saves for the gradient of its leaves lies, and how many numbers of it lie elsewhere."""
    own = [leaf.requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = function(*own)
    known = [leaf.data_ptr() for leaf in own]
    assert y.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    places = [known.index(tensor.data_ptr()) for tensor in saved if tensor.data_ptr() in known]
    return places, sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in known)


@given(seeds, sizes, st.integers(2, 9))
def test_what_is_saved_is_what_was_there_and_a_number_a_row_of_the_norm(seed, n, width):
    x, y, weight = randn(seed, n, width), randn(seed + 1, n, width), randn(seed + 2, width)
    assert saved_by(lambda *args: ops.rms_norm(*args, EPS), x, weight) == ([0, 1], n)
    assert saved_by(ops.swiglu, x, y) == ([0, 1], 0)


@given(rotations())
def test_a_rotation_saves_nothing_of_what_it_turns(case):
    x, cos, sin = case
    assert saved_by(lambda x: ops.rotate(x, cos, sin), x) == ([], cos.numel() + sin.numel())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_the_operations_are_compiled_as_one_graph():
    x, weight = randn(1, 5, 2, 8, dtype=torch.float32), randn(2, 8, dtype=torch.float32)
    angles = randn(3, 5, 3, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()

    def work(x, weight):
        y = ops.rotate(ops.rms_norm(x, weight, EPS), cos, sin)
        return ops.swiglu(y, x)

    results = []
    for run in (work, torch.compile(work, backend="aot_eager", fullgraph=True)):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight)]
        y = run(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_parity(compiled, eager)


@given(seeds, st.integers(2, 400))
def test_a_loss_divided_by_n_divides_its_gradient_which_is_rounded_once(seed, n):
    labels, head = token_ids(seed, 20, high=50), make_head("frozen", seed + 1, 32, 50).to(torch.bfloat16)
    hidden = randn(seed, 20, 32, dtype=torch.bfloat16).requires_grad_()
    (whole,) = torch.autograd.grad(ops.cross_entropy(hidden, labels, head), hidden)
    (share,) = torch.autograd.grad(ops.cross_entropy(hidden, labels, head) / n, hidden)
    assert torch.equal(share, (whole.float() * torch.tensor(1.0).div(n)).bfloat16())


def test_a_head_that_computes_with_what_is_not_its_own_is_refused():
    """Its gradient would lack a share without a word."""
    hidden, labels, weight = randn(0, 4, 3).requires_grad_(), torch.tensor([1, 0, 2, 1]), randn(1, 5, 3)

    class Head(nn.Module):
        def forward(self, x):
            return x @ weight.T

    ops.cross_entropy(hidden, labels, Head()).backward()
    weight.requires_grad_()
    with pytest.raises(TrainingError, match=r"a trained \(5, 3\) that is no parameter"):
        ops.cross_entropy(hidden, labels, Head())


def test_a_head_may_change_what_it_is_given():
    hidden, labels, linear = randn(0, 4, 3).requires_grad_(), torch.tensor([1, 0, 2, 1]), nn.Linear(3, 5).double()
    loss = ops.cross_entropy(hidden, labels, nn.Sequential(nn.ReLU(inplace=True), linear))
    plain = full_cross_entropy(hidden.relu(), labels, linear)
    assert_maths(loss, plain)
    assert_maths(*(torch.autograd.grad(each, hidden)[0] for each in (loss, plain)))

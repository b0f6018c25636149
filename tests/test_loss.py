"""The kernel of the loss: heads of every kind, and what it sees and computes with."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig, attach, llama
from minilora.errors import TrainingError
from minilora.kernels import llama as loss
from minilora.kernels.llama import head_chunks
from minilora.llama import Documents
from minilora.nf4 import NF4Linear
from minilora.testing.compare import assert_maths, assert_parity
from tests.models import (
    document_lengths,
    fill_,
    of_kernels,
    randn,
    seeds,
    set_dropout_step,
    sizes,
    small_tiles,
    tiny_model,
    token_ids,
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Nine rows are several chunks where there are 4 logits or more, and a chunk is several tiles."""
    monkeypatch.setattr(loss, "HEAD_LOGITS", 30)
    small_tiles(monkeypatch, 20)


ADAPTED = {
    "adapted": {"target_modules": ("head",)},
    "adapted four bits": {"target_modules": ("head",)},
    "trained in full": {"modules_to_save": ("head",)},
    "tied to trained rows": {"trainable_token_indices": {"embedding": (1, 0)}},
}
HEADS = ("plain", "bias", "frozen", "four bits", *ADAPTED)


def make_head(kind, seed, D, V):
    """A head of each kind that may be trained, and two that are not."""
    head = nn.Linear(D, V, bias=kind == "bias" or kind in ADAPTED).double()
    fill_(head, seed)
    if kind not in ("plain", "bias"):
        head.requires_grad_(False)
    if "four bits" in kind:
        head = NF4Linear.quantize(head.weight, head.bias)
    if kind not in ADAPTED:
        return head
    model = nn.ModuleDict({"embedding": nn.Embedding(V, D), "head": head})
    if "tied" in kind:
        model["embedding"].weight = head.weight
    attach(model, LoraConfig(**{"r": 2, "lora_alpha": 7, "target_modules": (), **ADAPTED[kind]}), dtype=torch.float64)
    fill_(nn.ParameterList(p for p in model.parameters() if p.requires_grad), seed + 1)
    return model["head"]


@st.composite
def heads(draw, *kinds):
    """Hidden states of up to 9 labelled tokens, and a head."""
    seed, n, D, V = draw(seeds), draw(sizes), draw(sizes), draw(st.integers(2, 9))
    head = make_head(draw(st.sampled_from(kinds or HEADS)), seed + 3, D, V)
    return randn(seed + 2, n, D).requires_grad_(), token_ids(seed, n, high=V), head


def assert_gradients_of_full_logits(case, inputs, upstream=1.0):
    both = [upstream * cross(*case) for cross in (llama.cross_entropy, llama.cross_entropy.function)]
    ours, full = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in both)
    for our, expected in zip(ours, full, strict=True):
        assert_maths(our, expected)


@pytest.mark.parametrize("kind", HEADS)
@given(st.data(), st.sampled_from([0.25, 7.0]), st.booleans())
def test_cross_entropy_gives_hidden_and_head_the_gradients_of_the_full_logits(kind, data, upstream, is_frozen):
    """Also the head alone, where the hidden states are frozen."""
    hidden, labels, head = case = data.draw(heads(kind))
    trained = [p for p in head.parameters() if p.requires_grad]
    assume(trained or not is_frozen)
    if is_frozen:
        assert_gradients_of_full_logits((hidden.detach(), labels, head), trained, upstream)
    else:
        assert_gradients_of_full_logits(case, [hidden, *trained], upstream)


def test_dropout_of_a_head_has_a_mask_for_each_row():
    """The mask follows from the seed, so chunks would share one."""
    hidden, labels = randn(0, 9, 4).requires_grad_(), token_ids(0, 9, high=5)
    model = nn.ModuleDict({"head": nn.Linear(4, 5).double()})
    attach(model, LoraConfig(target_modules=("head",), lora_dropout=0.5), dtype=torch.float64)
    fill_(model, 1)
    set_dropout_step(model.train(), 0)
    case = hidden, labels, model["head"]
    assert_maths(llama.cross_entropy(*case), llama.cross_entropy.function(*case))
    assert_gradients_of_full_logits(case, [hidden, *(p for p in model.parameters() if p.requires_grad)])


# A token alone, or beside one that is equal, gives q and k rounding only.
@given(seeds, document_lengths.filter(lambda lengths: max(lengths) > 3))
def test_cross_entropy_gives_a_tied_head_the_gradient_of_both_its_uses(seed, lengths):
    model, n = tiny_model("qwen2", seed, num_hidden_layers=1), sum(lengths)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = model.model(token_ids(seed, n), Documents(lengths))
    assert_gradients_of_full_logits((hidden, token_ids(seed + 1, n), model.lm_head), list(model.parameters()))


@given(heads())
def test_cross_entropy_goes_back_to_what_a_head_is_given_besides(case):
    """Where nothing that it knows of is trained."""
    hidden, labels, head = case
    head.requires_grad_(False)
    added = randn(1, head.out_features).requires_grad_()
    head.register_forward_hook(lambda module, inputs, logits: logits + added)
    assert_gradients_of_full_logits((hidden.detach(), labels, head), [added])


@given(heads())
def test_cross_entropy_leaves_logits_as_they_are_for_the_backward_pass_of_a_hook(case):
    hidden, labels, head = case
    head.register_forward_hook(lambda module, inputs, logits: logits.tanh())
    assert_gradients_of_full_logits((hidden, labels, head), [hidden])


def test_cross_entropy_gives_an_inactive_adapter_of_the_head_no_gradient():
    hidden, labels, head = randn(0, 5, 4).requires_grad_(), token_ids(0, 5, high=3), make_head("adapted", 1, 4, 3)
    head.active = ()
    llama.cross_entropy(hidden, labels, head).backward()
    assert not any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert_gradients_of_full_logits((hidden, labels, head), [hidden])


@pytest.mark.parametrize("V", [3, 32_000, 49_152, 10**8])
def test_the_logits_of_a_chunk_take_50_MB_in_bfloat16_or_are_one_row(V, monkeypatch):
    monkeypatch.undo()
    [[chunk], *_] = head_chunks(nn.Linear(1, V, device="meta"), torch.empty(2**24, device="meta"))
    rows = len(chunk)
    assert rows == 1 or 2 * rows * V <= 50.4e6
    assert 2 * (rows + 1) * V > 50.3e6


@of_kernels
@given(heads(), st.booleans())
def test_the_head_sees_a_chunk_at_a_time(case, grad):
    hidden, labels, head = case
    rows = []
    handle = head.register_forward_hook(lambda _, args, output: rows.append(output[..., 0].numel()))
    with torch.set_grad_enabled(grad):
        llama.cross_entropy(hidden, labels, head)
    handle.remove()
    assert sum(rows) == len(labels)
    assert max(rows) * head.out_features <= 30


@of_kernels
@given(seeds, st.integers(2, 400))
def test_a_loss_divided_by_n_divides_its_gradient_which_is_rounded_once(seed, n):
    labels, head = token_ids(seed, 20, high=50), make_head("frozen", seed + 1, 32, 50).to(torch.bfloat16)
    hidden = randn(seed, 20, 32, dtype=torch.bfloat16).requires_grad_()
    (whole,) = torch.autograd.grad(llama.cross_entropy(hidden, labels, head), hidden)
    (share,) = torch.autograd.grad(llama.cross_entropy(hidden, labels, head) / n, hidden)
    assert torch.equal(share, (whole.float() * torch.tensor(1.0).div(n)).bfloat16())


@of_kernels
def test_a_head_that_computes_with_what_is_not_its_own_is_refused():
    """Its gradient would lack a share without a word."""
    hidden, labels, weight = randn(0, 4, 3).requires_grad_(), torch.tensor([1, 0, 2, 1]), randn(1, 5, 3)

    class Head(nn.Module):
        def forward(self, x):
            return x @ weight.T

    llama.cross_entropy(hidden, labels, Head()).backward()
    weight.requires_grad_()
    with pytest.raises(TrainingError, match=r"a trained tensor \(5, 3\) that is not one of its parameters"):
        llama.cross_entropy(hidden, labels, Head())


@of_kernels
@pytest.mark.parametrize(("grad", "is_trained"), [(False, True), (True, False), (True, True)])
def test_a_gradient_is_computed_only_where_one_is_asked_for(grad, is_trained, monkeypatch):
    hidden, labels = randn(0, 5, 4).requires_grad_(is_trained), token_ids(0, 5, high=3)
    asked = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **_: asked.append(args) or (torch.zeros(3, 4),))
    with torch.set_grad_enabled(grad):
        llama.cross_entropy(hidden[:3], labels[:3], make_head("frozen", 1, 4, 3))
    assert bool(asked) == (grad and is_trained)


@of_kernels
def test_a_head_may_change_what_it_is_given_and_need_its_logits_for_its_gradient():
    hidden, labels, linear = randn(0, 4, 3).requires_grad_(), torch.tensor([1, 0, 2, 1]), nn.Linear(3, 5).double()
    loss = llama.cross_entropy(hidden, labels, nn.Sequential(nn.ReLU(inplace=True), linear, nn.Tanh()))
    plain = llama.cross_entropy.function(hidden.relu(), labels, nn.Sequential(linear, nn.Tanh()))
    assert_maths(loss, plain)
    assert_maths(*(torch.autograd.grad(each, hidden)[0] for each in (loss, plain)))


def test_a_label_whose_probability_is_no_float32_has_a_finite_loss_and_a_gradient():
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[200.0, 0], [0, 0], [0, 300.0]])
    hidden, labels = torch.eye(2).requires_grad_(), torch.tensor([1, 2])
    loss = llama.cross_entropy(hidden, labels, head)
    assert loss.item() == 200
    loss.backward()
    assert torch.equal(hidden.grad, torch.tensor([[200.0, 0], [0, 0]]))


def test_the_gradient_of_a_sure_label_is_what_is_left_to_it():
    """p[label] - 1, of which 16 bits would leave nothing."""
    head = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    head.weight.data = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    llama.cross_entropy(hidden, torch.tensor([0]), head).backward()
    expected = -8 / (1 + torch.tensor(8.0).exp())
    assert_parity(hidden.grad.flatten(), expected.reshape(1), torch.finfo(torch.bfloat16).eps)

"""Experts with adapters are those of the changed parameters, by einsum, and PEFT's `target_parameters`."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.testing.compare import assert_maths, assert_parity
from recipes.experts import attach_experts, merge_experts, save_experts
from tests.models import perturb_, randn, scales, seeds, sizes, token_ids

NAMES = ["up_proj", "down_proj"]


class Experts(nn.Module):
    """x W₁ᵀ W₂ᵀ of each expert, weighted: stacked experts, as modules of transformers have them."""

    def __init__(self, seed, experts, inner, middle, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        first, second = randn(seed, experts, middle, inner), randn(seed + 1, experts, inner, middle)
        self.up_proj = nn.Parameter(first.mT.contiguous() if is_transposed else first)
        self.down_proj = nn.Parameter(second.mT.contiguous() if is_transposed else second)
        self.scores = nn.Parameter(randn(seed + 2, experts, inner))

    def forward(self, x):
        up, down = (w.mT if self.is_transposed else w for w in (self.up_proj, self.down_proj))
        return torch.einsum("ne,emi,eom,ni->no", x @ self.scores.T, up, down, x)


def changed(weight, lora_A, lora_B, scale, is_transposed):
    """W[e, o, i] + s·Σₖ B[o, k, e] A[e, k, i], where A is (E·r, in) and B is (out, r·E)."""
    experts = len(weight)
    A, B = lora_A.view(experts, -1, lora_A.size(1)), lora_B.view(lora_B.size(0), -1, experts)
    return weight + scale * torch.einsum("oke,eki->eio" if is_transposed else "oke,eki->eoi", B, A)


@given(seeds, sizes, sizes, sizes, st.integers(1, 4), scales, st.booleans())
def test_forward_is_that_of_the_changed_parameters(seed, experts, inner, middle, r, scale, is_transposed):
    plain = Experts(seed, experts, inner, middle, is_transposed)
    model, x, dy = nn.Sequential(copy.deepcopy(plain)), randn(seed + 50, 5, inner), randn(seed + 51, 5, inner)
    attach_experts(model, NAMES, r, scale * r, is_transposed)
    assert torch.equal(model(x), plain(x))
    perturb_(model, seed)
    layer = model[0]
    weights = {
        name: changed(getattr(plain, name), layer.lora_A[name], layer.lora_B[name], scale, is_transposed)
        for name in NAMES
    }
    y, expected = model(x), torch.func.functional_call(plain, weights, x)
    assert_maths(y, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    for our, their in zip(*(torch.autograd.grad(output, trained, dy) for output in (y, expected)), strict=True):
        assert_maths(our, their)
    merge_experts(model)
    assert type(model[0]) is Experts
    assert_maths(model(x), expected)


def test_what_is_not_there_is_refused_and_the_package_names_the_recipe(tmp_path):
    model = nn.Sequential(Experts(0, 3, 4, 5, False), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    with pytest.raises(ml.TargetError, match="no module of the model has a parameter called"):
        attach_experts(model, ["gate_proj"], 2, 14, False)
    with pytest.raises(TypeError, match=r"target_parameters.*recipes/experts\.py"):
        ml.LoraConfig(target_parameters=["up_proj"])
    with pytest.raises(ml.TargetError, match="no adapters of experts"):
        save_experts(model, tmp_path)
    attach_experts(model, NAMES, 2, 14, False)
    save_experts(model, tmp_path)
    with pytest.raises(ml.FormatError, match=r"target_parameters.*recipes/experts\.py"):
        ml.load_adapter(plain, tmp_path)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # the peers' own warnings
def test_peft_computes_the_same_of_the_saved_adapter_and_merges_it_alike(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    size = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**size, **heads)).eval()
    base, ids = copy.deepcopy(model), token_ids(1, 2, 7)
    attach_experts(model, ["gate_up_proj", "down_proj"], 3, 21, is_transposed=False)
    perturb_(model)
    save_experts(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_parity(model(ids).logits, theirs(ids).logits)
    merge_experts(model)
    assert_parity(model(ids).logits, theirs.merge_and_unload()(ids).logits)

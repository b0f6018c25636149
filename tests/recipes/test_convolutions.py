"""A convolution with an adapter is one of the merged weight, and PEFT's."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.testing.compare import assert_maths, assert_parity
from recipes.convolutions import CONVOLUTIONS, attach_convolutions, merge_convolutions, save_convolutions
from tests.models import perturb_, randn, scales, seeds, sizes

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's, of its own copy


@st.composite
def convolutions(draw):
    """One of any kind, and an input."""
    sides = draw(st.integers(1, 3))
    options = {
        "kernel_size": draw(st.tuples(*(st.integers(1, 3),) * sides)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.sampled_from([0, 1, 2, "same", "valid"])),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }
    if options["padding"] != "same":
        options["stride"] = draw(st.integers(1, 2))
    channels = draw(sizes), draw(sizes)
    model = nn.Sequential(CONVOLUTIONS[sides - 1](*channels, **options)).double()
    return model, randn(draw(seeds), 2, channels[0], *(5,) * sides)


@given(convolutions(), sizes, scales, seeds)
def test_forward_is_the_merged_weight_applied_and_a_new_adapter_changes_nothing(case, r, scale, seed):
    model, x = case
    before, y = copy.deepcopy(model), model(x)
    attach_convolutions(model, ["0"], r, scale * r)
    assert torch.equal(model(x), y)
    perturb_(model, seed)
    layer, expected = model[0], model(x)
    assert torch.equal(layer.base.weight, before[0].weight)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    weight = torch.einsum("or,ri...->oi...", B.flatten(1), A) * scale + before[0].weight
    merge_convolutions(model)
    assert type(model[0]) is type(before[0])
    assert_maths(model[0].weight, weight)
    assert_maths(model(x), expected)


def test_only_the_adapter_is_trained_and_groups_are_refused():
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 1, groups=2), nn.Linear(3, 2))
    attach_convolutions(model, ["0"], 2, 14)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A.weight", "0.lora_B.weight"}
    with pytest.raises(ml.TargetError, match="2 groups"):
        attach_convolutions(model, ["1"], 2, 14)
    with pytest.raises(ml.TargetError, match=r"no convolution called \['2'\]"):
        attach_convolutions(model, ["2"], 2, 14)


def test_the_package_names_the_recipe(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(3, 2))
    for targets in (["0", "1"], r"[01]"):
        with pytest.raises(ml.TargetError, match=r"0: is a convolution.*recipes/convolutions\.py"):
            ml.attach(model, ml.LoraConfig(target_modules=targets))
    plain = copy.deepcopy(model)
    attach_convolutions(model, ["0"], 2, 14)
    save_convolutions(model, tmp_path)
    with pytest.raises(ml.FormatError, match=r"0\.lora_A.* of a convolution.*recipes/convolutions\.py"):
        ml.load_adapter(plain, tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_peft_computes_the_same_of_the_saved_adapter_and_merges_it_alike(kind, tmp_path):
    """Without a dilation, which PEFT 0.21 leaves out of A, so that the two shapes differ."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(kind(3, 5, 3, stride=2, padding=1), nn.Tanh(), kind(5, 4, 2))
    base, x = copy.deepcopy(model), randn(1, 2, 3, *(9,) * (CONVOLUTIONS.index(kind) + 1), dtype=torch.float32)
    attach_convolutions(model, ["0", "2"], 3, 21)
    perturb_(model)
    save_convolutions(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert_parity(model(x), theirs(x))
    merge_convolutions(model)
    assert_parity(model(x), theirs.merge_and_unload()(x))

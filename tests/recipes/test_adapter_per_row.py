"""A batch in which each row has its own adapter is its rows apart, and PEFT's batch of `adapter_names`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import assert_maths, assert_parity
from recipes.adapter_per_row import adapter_per_row
from tests.models import WHOLE, examples, four_bit, perturb_, randn, seeds, tiny_model, token_ids

KINDS = {
    "linears": ml.LoraConfig(r=2, lora_alpha=5, target_modules=("q_proj", "down_proj")),
    "all": ml.LoraConfig(r=3, lora_alpha=2, use_rslora=True),
    "head": ml.LoraConfig(r=2, lora_alpha=3, target_modules=("lm_head",)),
}
names = st.lists(st.sampled_from([None, *KINDS]), min_size=1, max_size=6)


@pytest.fixture(scope="module", params=[lambda model: model, four_bit], ids=["dense", "nf4"])
def model(request):
    model = request.param(tiny_model(WHOLE, num_hidden_layers=2))
    for seed, (name, config) in enumerate(KINDS.items()):
        ml.attach(model, config, name, seed=seed, dtype=torch.float64)
        perturb_(model, seed)
    return model


def use(model, name):
    ml.set_adapter(model, [name] if name else [])


@examples(0.5)
@given(names, seeds)
def test_each_row_is_what_its_adapter_makes_of_it_alone(model, chosen, seed):
    lengths = [1 + (seed + i) % 7 for i in range(len(chosen))]
    ids = token_ids(seed, len(chosen), max(lengths))
    with adapter_per_row(model, chosen):
        logits = model(ids, lengths)
    for row, name, length, found in zip(ids, chosen, lengths, logits, strict=True):
        use(model, name)
        assert_maths(found[:length], model(row[:length].unsqueeze(0))[0])


@examples(0.2)
@given(names, seeds, st.sets(st.integers(0, 60), max_size=9))
def test_rows_are_generated_with_their_adapters_also_when_some_have_ended(model, chosen, seed, stop_ids):
    prompts = [token_ids(seed + i, 1, 1 + (seed + i) % 7)[0].tolist() for i in range(len(chosen))]
    with adapter_per_row(model, chosen):
        written = ml.generate(model, prompts, 6, stop_ids=stop_ids)
    for name, prompt, new in zip(chosen, prompts, written, strict=True):
        use(model, name)
        assert new == ml.generate(model, [prompt], 6, stop_ids=stop_ids)[0]


def test_rows_in_the_first_dimension_need_no_lengths():
    """Also of PyTorch's encoder, whose fast path reads the weights of its linears and does not call them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model, x, outputs = nn.TransformerEncoder(layer, 1).eval(), randn(0, 2, 3, 8), []
    for seed, name in enumerate(("a", "b"), start=1):
        ml.attach(model, ml.LoraConfig(r=2, target_modules=["linear1", "linear2"]), name, dtype=torch.float64)
        perturb_(model, seed)
        outputs.append(model(x))
    with adapter_per_row(model, ["a", "b"]), torch.no_grad():
        mixed = model(x)
    assert_maths(mixed, torch.stack((outputs[0][0], outputs[1][1])))
    assert torch.equal(model(x), outputs[1])
    assert not any(layer._forward_hooks for layer in adapter_layers(model).values())


def test_rows_and_adapters_that_are_unknown_or_do_more_than_add_are_refused(model):
    with pytest.raises(ml.ShapeError, match="2 rows, for which 3"), adapter_per_row(model, ["all", None, "all"]):
        model(token_ids(0, 2, 5))
    with pytest.raises(ml.TargetError, match="no adapter is called 'other'"), adapter_per_row(model, ["other"]):
        pass
    plain = nn.Sequential(nn.Linear(5, 4))
    ml.attach(plain, ml.LoraConfig(r=2, use_dora=True))
    with pytest.raises(ml.TargetError, match="'default' is not a plain LoRA"), adapter_per_row(plain, ["default"]):
        pass


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # the peers' own warnings
def test_logits_are_peft_s(tmp_path):
    """PEFT takes one length for all rows: it pads."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, ids, chosen = tiny_model("llama", dtype=torch.float32), token_ids(1, 4, 5), ["two", None, "one", "two"]
    ml.save_model(model, tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        ml.attach(model, ml.LoraConfig(r=2 + seed, lora_alpha=7, target_modules=("q_proj", "up_proj")), name)
        perturb_(model, seed)
        ml.save_adapter(model, tmp_path / name, name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "one", "one").eval()
    theirs.load_adapter(tmp_path / "two", "two")
    expected = theirs(ids, adapter_names=[name or "__base__" for name in chosen]).logits
    with adapter_per_row(model, chosen):
        assert_parity(model(ids), expected)

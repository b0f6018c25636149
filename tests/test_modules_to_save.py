"""Modules trained in full, and biases: a copy for each adapter, and a base that stays what it was."""

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.modules_to_save import ModulesToSave
from minilora.testing.compare import assert_maths
from tests.models import WHOLE, fill_, four_bit, randn, tiny_model, token_ids, train_a_little

IDS = token_ids(3, 2, 7)


def base_model(dtype=torch.float64):
    return tiny_model(WHOLE, dtype=dtype, num_hidden_layers=2)


def with_copies(*names, dtype=torch.float64, own=torch.float32, **config):
    model = base_model(dtype)
    config = {"target_modules": (), "modules_to_save": names, **config}
    ml.attach(model, ml.LoraConfig(**config), dtype=own)
    return model


def own(model, name="default"):
    """Path -> what an adapter trains there, of modules in full and biases."""
    places = {path: place for path, place in adapter_layers(model).items() if isinstance(place, ModulesToSave)}
    return {path: place.adapters[name].tensors() for path, place in places.items() if name in place.adapters}


def test_a_copy_begins_as_the_module_and_is_trained_in_float32_whatever_the_base():
    model = with_copies("lm_head", "norm", dtype=torch.bfloat16)
    assert torch.equal(model(IDS), base_model(torch.bfloat16)(IDS))
    copies = own(model)
    assert set(copies) == {"lm_head", "model.norm"}
    trained = [tensor for held in copies.values() for tensor in held.values()]
    assert {(tensor.dtype, tensor.requires_grad) for tensor in trained} == {(torch.float32, True)}
    assert sum(p.requires_grad for p in model.parameters()) == len(trained)


def test_a_float32_copy_of_a_bfloat16_module_computes_in_bfloat16():
    model = with_copies("lm_head", dtype=torch.bfloat16)
    train_a_little(model, IDS)
    place = adapter_layers(model)["lm_head"]
    x, copy = randn(1, 5, 24, dtype=torch.bfloat16), own(model)["lm_head"]["weight"]
    assert copy.dtype == torch.float32
    assert place(x).dtype == model(IDS).dtype == torch.bfloat16
    assert torch.equal(place(x), nn.functional.linear(x, copy.bfloat16()))
    assert torch.equal(place.merged().weight, copy.bfloat16())


def test_gradients_reach_the_copy_and_not_the_base_as_if_it_stood_there_alone():
    model, plain = with_copies("layers.1.mlp", own=torch.float64), base_model()
    loss, expected = model(IDS).square().sum(), plain(IDS).square().sum()
    loss.backward()
    expected.backward()
    copies, base = own(model)["model.layers.1.mlp"], dict(plain.model.layers[1].mlp.named_parameters())
    assert copies.keys() == base.keys()
    for name, parameter in copies.items():
        assert_maths(parameter.grad, base[name].grad)
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


def test_two_adapters_that_train_one_module_or_bias_cannot_act_together():
    model = with_copies("norm", target_modules=("q_proj",))
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), modules_to_save=("norm",)), name="second")
    with pytest.raises(ml.TargetError, match=r"model\.norm: \('default', 'second'\) train the same parameter"):
        ml.set_adapter(model, ["default", "second"])
    assert adapter_layers(model)["model.norm"].active == ("second",)
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",)), name="third")
    ml.set_adapter(model, ["default", "third"])
    assert adapter_layers(model)["model.norm"].active == ("default",)
    biased = nn.ModuleDict({"q_proj": nn.Linear(3, 2)})
    for name in ("first", "second"):
        ml.attach(biased, ml.LoraConfig(bias="lora_only"), name=name)
    with pytest.raises(ml.TargetError, match=r"q_proj: \('first', 'second'\)"):
        ml.set_adapter(biased, ["first", "second"])


@pytest.mark.parametrize(("name", "is_tied"), [("lm_head", False), ("norm", True)])
def test_a_head_that_was_tied_is_its_own_after_merging_only_if_its_copy_was_trained(name, is_tied):
    model = with_copies(name)
    train_a_little(model, IDS)
    embedding = model.model.embed_tokens.weight.clone()
    ml.merge(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_all_biases_are_trained_once_each_and_no_weight():
    model = base_model()
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), bias="all", modules_to_save=("layers.1.mlp",)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    names = [name.replace(".adapters.default.", ".").replace(".copy.", ".") for name in trained]
    weights = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert sorted(names) == sorted([*biases, *weights])


def test_a_trained_bias_is_used_in_its_place():
    model = base_model()
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), bias="all"), dtype=torch.float64)
    expected = base_model()
    for name, parameter in expected.named_parameters():
        path, _, last = name.rpartition(".")
        if last == "bias":
            with torch.no_grad():
                adapter_layers(model)[path].adapters["default"].tensors()[last].copy_(parameter.add_(1))
    assert_maths(model(IDS), expected(IDS))


def test_one_adapter_changes_a_module_in_one_way():
    model = base_model()
    config = ml.LoraConfig(target_modules=(), modules_to_save=("embed_tokens",), trainable_token_indices=(1,))
    with pytest.raises(ml.TargetError, match="embed_tokens: an adapter can change a module in one way only"):
        ml.attach(model, config)
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    ("names", "base", "why"),
    [
        (("layers.1.mlp",), four_bit, r"layers\.1\.mlp has packed weights, which cannot be trained"),
        (("empty",), lambda model: model, "empty has no parameters"),
        (("held",), lambda model: model, "held is a container, which has no forward; name what it holds"),
    ],
)
def test_what_cannot_be_trained_in_full_is_refused(names, base, why):
    held = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.ModuleDict({"model": base(base_model()), "empty": nn.ReLU(), "held": held})
    with pytest.raises(ml.TargetError, match=why):
        ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), modules_to_save=names))
    assert not adapter_layers(model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_four_bits_are_trained_beside_packed_weights(bias):
    model = four_bit(base_model())
    base = model(IDS)
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), bias=bias), dtype=torch.float64)
    train_a_little(model, IDS)
    assert not torch.equal(model(IDS), base)
    logits = model(IDS)
    with ml.disable_adapter(model):
        assert torch.equal(model(IDS), base)
    ml.merge(model)
    assert_maths(model(IDS), logits)


def test_a_model_reads_the_copy_s_attributes():
    model = with_copies("lm_head")
    fill_(model.lm_head.adapters["default"], 1)
    assert torch.equal(model.lm_head.weight, own(model)["lm_head"]["weight"])
    with ml.disable_adapter(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bias_of_the_model_itself_is_refused_as_no_place_could_hold_it():
    model = nn.Linear(3, 2)
    model.proj = nn.Linear(2, 2)
    with pytest.raises(ml.TargetError, match="in none of its modules"):
        ml.attach(model, ml.LoraConfig(target_modules=("proj",), bias="all"))
    assert not adapter_layers(model)

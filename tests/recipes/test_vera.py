"""VeRA is a LoRA whose factors share two matrices, in all that an adapter can do, and is PEFT's."""

import copy

import pytest
import torch
from hypothesis import given

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import assert_maths, assert_parity
from recipes.vera import attach_vera, load_vera, save_vera
from tests.models import bases, examples, randn, seeds, tiny_model, token_ids
from tests.training import assert_resumed_to_the_same_bytes, random_rows

IDS = token_ids(3, 2, 7)
NAMES = ["q_proj", "down_proj"]


def with_vera(seed=0, base=lambda model: model, dtype=torch.float64, r=3, name="default"):
    """A model with an adapter of random vectors."""
    model = base(tiny_model(dtype=dtype))
    attach_vera(model, NAMES, r, name=name)
    fill(model, seed, name)
    return model


def fill(model, seed, name="default"):
    for number, layer in enumerate(adapter_layers(model).values()):
        for tensor in layer.adapters[name].tensors().values():
            tensor.data = randn(seed + number, *tensor.shape).to(tensor.dtype)


def written_out(W, adapter):
    """W + Λ_b B Λ_d A, number by number of the rank."""
    lambda_b, lambda_d = (adapter.tensors()[f"vera_lambda_{letter}"].detach().double() for letter in "bd")
    A, B = (getattr(adapter.shared, letter).double() for letter in "AB")
    for i in range(len(lambda_d)):
        W = W + lambda_d[i] * torch.outer(lambda_b * B[: W.size(0), i], A[i, : W.size(1)])
    return W


@examples(0.5)
@given(seeds, bases)
def test_the_layer_is_the_equation_and_so_is_what_is_merged(seed, base):
    model = with_vera(seed, base)
    expected = [written_out(layer.base.weight, layer.adapters["default"]) for layer in adapter_layers(model).values()]
    logits = model(IDS)
    for layer, W in zip(adapter_layers(model).values(), expected, strict=True):
        assert_parity(layer.merged_weight(), W)
    ml.merge(model)
    assert_parity(model(IDS), logits)


def test_a_new_adapter_changes_nothing_and_all_layers_share_the_matrices():
    model = tiny_model(dtype=torch.float64)
    before = model(IDS)
    attach_vera(model, NAMES, r=4)
    assert torch.equal(model(IDS), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        len(layer.base.weight) + 4 for layer in adapter_layers(model).values()
    )
    assert len({id(layer.adapters["default"].shared) for layer in adapter_layers(model).values()}) == 1


def test_it_trains_and_a_run_that_stopped_ends_as_one_that_did_not(tmp_path):
    make = lambda: with_vera(dtype=torch.float32)  # noqa: E731
    assert_resumed_to_the_same_bytes(tmp_path, make, random_rows(0, 8))


def loaded_as_itself(model, save, load, directory):
    """The base with the adapter that was saved: it computes as the model, is not trained and can be disabled."""
    save(model, directory)
    loaded = tiny_model(dtype=torch.float64)
    before = loaded(IDS)
    load(loaded, directory)
    assert_maths(loaded(IDS), model(IDS))
    assert not any(p.requires_grad for p in loaded.parameters())
    with ml.disable_adapter(loaded):
        assert torch.equal(loaded(IDS), before)
    return loaded


def test_it_is_saved_and_loaded_as_itself_disabled_and_beside_another(tmp_path):
    loaded, base = loaded_as_itself(with_vera(1), save_vera, load_vera, tmp_path), tiny_model(dtype=torch.float64)
    attach_vera(loaded, NAMES, r=2, name="other")
    fill(loaded, 5, "other")
    ml.set_adapter(loaded, ["default", "other"])
    for path, layer in adapter_layers(loaded).items():
        W = written_out(written_out(layer.base.weight, layer.adapters["default"]), layer.adapters["other"])
        base.get_submodule(path).weight.data = W
    assert_parity(loaded(IDS), base(IDS))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same_from_the_same_files(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = tiny_model(dtype=torch.float32)
    ml.save_model(ours, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    attach_vera(ours, NAMES, r=3, projection_prng_key=7)
    config = peft.VeraConfig(r=3, target_modules=NAMES, projection_prng_key=7)
    shared = next(iter(adapter_layers(ours).values())).adapters["default"].shared
    new = peft.get_peft_model(copy.deepcopy(theirs), config)
    assert torch.equal(new.base_model.vera_A["default"], shared.A)
    assert torch.equal(new.base_model.vera_B["default"], shared.B)
    fill(ours, 2)
    save_vera(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert_parity(ours(IDS), read(IDS).logits)
    read.save_pretrained(tmp_path / "theirs")
    again = tiny_model(dtype=torch.float32)
    load_vera(again, tmp_path / "theirs")
    assert_parity(again(IDS), ours(IDS))

"""TinyLoRA is a LoRA between singular vectors, in all that an adapter can do, and is PEFT's."""

import copy

import pytest
import torch
from hypothesis import given

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import assert_parity
from recipes.tinylora import all_tensors, attach_tinylora, load_tinylora, save_tinylora
from tests.models import bases, examples, randn, seeds, tiny_model
from tests.recipes.test_vera import IDS, NAMES, loaded_as_itself
from tests.training import assert_resumed_to_the_same_bytes, random_rows


def vectors(model, name="default"):
    return {key: tensor for key, tensor in all_tensors(model, name).items() if "tinylora_v" in key}


def with_tinylora(seed=0, base=lambda model: model, dtype=torch.float64, **config):
    """A model with an adapter of random vectors."""
    model = base(tiny_model(dtype=dtype))
    attach_tinylora(model, NAMES, **{"r": 3, "u": 5, "weight_tying": 0.5, **config})
    for number, v in enumerate(vectors(model).values()):
        v.data = randn(seed + number, len(v), dtype=torch.float32)
    return model


def written_out(W, adapter):
    """W + U √S (Σ v_i P_i) √S Vᵀ, where the singular vectors and values are those of W Wᵀ and Wᵀ W."""
    r = len(adapter.A)
    squares, U = torch.linalg.eigh(W.double() @ W.double().T)
    U, S = U[:, -r:].flip(1), squares[-r:].flip(0).sqrt()
    Vt = (U.T @ W.double()) / S[:, None]
    middle = sum(v * P for v, P in zip(adapter.v.double(), adapter.P.double(), strict=True))
    signs = torch.diag((U * adapter.lora_B.double()).sum(0).sign())  # of singular vectors, which any algorithm chooses
    return W + (U * S.sqrt()) @ signs @ middle @ signs @ (S.sqrt()[:, None] * Vt)


@examples(0.3)
@given(seeds, bases)
def test_the_layer_is_the_equation_and_so_is_what_is_merged(seed, base):
    model = with_tinylora(seed, base)
    layers = adapter_layers(model).values()
    expected = [written_out(layer.base.weight, layer.adapters["default"]) for layer in layers]
    logits = model(IDS)
    for layer, W in zip(layers, expected, strict=True):
        assert_parity(layer.merged_weight(), W, 1e-4)
    ml.merge(model)
    assert_parity(model(IDS), logits)


@pytest.mark.parametrize(("weight_tying", "groups"), [(0.0, 8), (0.5, 4), (0.75, 2), (1.0, 1)])
def test_a_new_adapter_changes_nothing_and_layers_share_vectors_as_they_are_tied(weight_tying, groups):
    model = tiny_model(dtype=torch.float64)
    before = model(IDS)
    attach_tinylora(model, NAMES, u=5, weight_tying=weight_tying)
    assert torch.equal(model(IDS), before)
    assert len(adapter_layers(model)) == 8
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == ml.count_parameters(model).trainable
        == 5 * groups
    )


def test_it_trains_and_a_run_that_stopped_ends_as_one_that_did_not(tmp_path):
    loss = lambda model, rows: (-model(torch.tensor([rows[0].tokens])).log_softmax(-1)[0, :, 7].sum(), 1)  # noqa: E731
    steps, _ = assert_resumed_to_the_same_bytes(
        tmp_path, lambda: with_tinylora(dtype=torch.float32), random_rows(0, 4), loss=loss
    )
    assert len(steps) == 4


@pytest.mark.parametrize("weight_tying", [0.0, 0.5, 1.0])
def test_it_is_saved_and_loaded_as_itself_and_disabled(tmp_path, weight_tying):
    loaded_as_itself(with_tinylora(1, weight_tying=weight_tying), save_tinylora, load_tinylora, tmp_path)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_tying", [0.0, 0.6])
def test_peft_computes_the_same_from_the_same_files(tmp_path, weight_tying):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = with_tinylora(2, dtype=torch.float32, weight_tying=weight_tying, projection_seed=7)
    base = copy.deepcopy(ours)
    ml.detach(base)
    ml.save_model(base, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.TinyLoraConfig(r=3, u=5, target_modules=NAMES, weight_tying=weight_tying, projection_seed=7)
    new = peft.get_peft_model(copy.deepcopy(theirs), config)
    for path, layer in adapter_layers(ours).items():
        assert torch.equal(new.base_model.model.get_submodule(path).tinylora_P["default"], layer.adapters["default"].P)
    assert len(new.base_model.tinylora_v["default"]) == len(vectors(ours))
    save_tinylora(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert_parity(ours(IDS), read(IDS).logits)
    read.save_pretrained(tmp_path / "theirs")
    load_tinylora(base, tmp_path / "theirs")
    assert_parity(base(IDS), ours(IDS))

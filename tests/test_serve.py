"""Many adapters at once: a batch of several is its rows apart; swapping numbers is loading; switching moves nothing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora import LoraConfig, ShapeError, TargetError, attach, disable_adapter, save_adapter, set_adapter
from minilora.adapter import adapter_layers
from minilora.adapters import serve
from minilora.adapters.attach import delete_adapter
from minilora.adapters.serve import hotswap_adapter, merged_if_faster, mixed_batch
from minilora.testing.compare import assert_maths, assert_parity, assert_precision
from tests.models import WHOLE, examples, four_bit, long, perturb_, randn, seeds, tiny_model, token_ids

KINDS = {
    "linears": LoraConfig(r=2, lora_alpha=5, target_modules=("q_proj", "down_proj")),
    "dora": LoraConfig(r=3, lora_alpha=2, use_dora=True, use_rslora=True),
    "bias": LoraConfig(r=2, lora_alpha=3, target_modules=("k_proj",), bias="all", modules_to_save=("norm", "lm_head")),
    "lora_bias": LoraConfig(r=1, lora_alpha=3, target_modules=("v_proj", "up_proj"), lora_bias=True),
    "rows": LoraConfig(r=2, lora_alpha=3, target_modules=("o_proj",), trainable_token_indices=(5, 1, 40)),
    "pissa": LoraConfig(r=2, lora_alpha=3, target_modules=("gate_proj",), init_lora_weights="pissa"),
}
names = st.lists(st.sampled_from([None, *KINDS]), min_size=1, max_size=6)
MERGE_TOKENS = 5


@pytest.fixture(autouse=True)
def _merged_early(monkeypatch):
    """Few tokens are enough for merged weights to be faster."""
    monkeypatch.setattr(serve, "MERGE_TOKENS", MERGE_TOKENS)


def base_model() -> nn.Module:
    return tiny_model(WHOLE, num_hidden_layers=2)


def model_with(*kinds: str, make=lambda model: model) -> nn.Module:
    model = make(base_model())
    for i, kind in enumerate(kinds):
        attach(model, KINDS[kind], kind, seed=i, dtype=torch.float64)
        perturb_(model, 10 * i)
    return model


def alone(model, name, ids):
    with disable_adapter(model):
        if name is not None:
            set_adapter(model, name)
        return model(ids.unsqueeze(0))[0]


@pytest.fixture(scope="module", params=[lambda model: model, four_bit])
def crowded(request):
    return model_with(*KINDS, make=request.param)


@examples(0.5)
@given(chosen=names, seed=seeds)
def test_a_mixed_batch_is_its_rows_apart(crowded, chosen, seed):
    model = crowded
    lengths = [1 + (seed + i) % 7 for i in range(len(chosen))]
    ids = token_ids(seed, len(chosen), max(lengths), high=8)  # so that trained rows are met
    with mixed_batch(model, chosen):
        logits = model(ids, lengths)
    for row, name, length, found in zip(ids, chosen, lengths, logits, strict=True):
        assert_maths(found[:length], alone(model, name, row[:length]))


def test_after_a_mixed_batch_the_active_adapters_act_again_and_after_one_inside_another_those_of_the_outer():
    model, ids, chosen = model_with("linears", "dora"), token_ids(4, 3, 5), ["dora", "linears", None]
    before = model(ids)
    with pytest.raises(ShapeError, match="2 rows, and 3 adapters"), mixed_batch(model, chosen):
        model(ids[:2])
    assert torch.equal(model(ids), before)
    with mixed_batch(model, ["linears", None]):
        outer = model(ids[:2])
        with mixed_batch(model, chosen):
            inner = model(ids)
        assert torch.equal(model(ids[:2]), outer)
    for row, name, found in zip(ids, chosen, inner, strict=True):
        assert_maths(found, alone(model, name, row))


def test_a_model_that_keeps_its_rows_apart_needs_no_lengths():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    for name in ("one", "two"):
        attach(model, LoraConfig(r=2, lora_alpha=3), name, dtype=torch.float64)
        perturb_(model, len(name))
    x, chosen = randn(1, 3, 6, 5), ["two", None, "one"]
    with mixed_batch(model, chosen):
        mixed = model(x)
    for row, name, found in zip(x, chosen, mixed, strict=True):
        assert_maths(found, alone(model, name, row))


def test_rows_whose_adapter_is_not_known_are_refused():
    for config in [{}, {"target_modules": (), "target_parameters": ("0.weight",)}]:
        model = nn.Sequential(nn.Linear(5, 4)).double()
        attach(model, LoraConfig(r=2, **config), dtype=torch.float64)
        with (
            mixed_batch(model, ["default", None]),
            pytest.raises((ShapeError, TargetError), match=r"got 3 rows|mixed in"),
        ):
            model(randn(0, 3, 5))
        with pytest.raises(TargetError, match="no adapter is called 'other'"), mixed_batch(model, ["other"]):
            pass


@pytest.mark.parametrize(
    ("make", "tokens", "is_merged"),
    [
        (lambda model: model, MERGE_TOKENS - 1, False),
        (four_bit, MERGE_TOKENS, True),
        *long((four_bit, MERGE_TOKENS - 1, False), (lambda model: model, MERGE_TOKENS, True)),
    ],
)
def test_many_tokens_are_written_with_merged_weights_and_what_was_there_comes_back(make, tokens, is_merged):
    model, ids = model_with("linears", "dora", make=make), token_ids(1, 2, 5)
    before, layers = {name: t.clone() for name, t in model.state_dict().items()}, adapter_layers(model)
    expected, written = model(ids), ml.generate(model, ids, tokens)

    def write():
        with merged_if_faster(model, tokens):
            assert bool(adapter_layers(model)) != is_merged
            assert ml.generate(model, ids, tokens) == written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert adapter_layers(model) == layers
    assert torch.equal(model(ids), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_with_an_adapter_each_models_without_one_and_large_weights_are_not_merged():
    model = model_with("linears", "dora")
    layers = adapter_layers(model)
    with mixed_batch(model, ["dora", None]), merged_if_faster(model, MERGE_TOKENS):
        assert adapter_layers(model) == layers
    with disable_adapter(model), merged_if_faster(model, MERGE_TOKENS):
        assert adapter_layers(model) == layers
    with merged_if_faster(tiny_model(), MERGE_TOKENS):
        pass
    next(iter(layers.values())).register_forward_hook(lambda *_: None)
    large = nn.Sequential(*(nn.Linear(2**14, out, device="meta") for out in (2**14, 3)))  # one of them has a gibibyte
    attach(large, LoraConfig(r=1, target_modules=["0", "1"]))
    for unmerged in (model, large):
        layers = adapter_layers(unmerged)
        with merged_if_faster(unmerged, MERGE_TOKENS):
            assert adapter_layers(unmerged) == layers


@examples(0.4)
@given(seeds)
def test_merged_weights_are_as_precise_as_applied_adapters_in_bfloat16(seed):
    ids, logits = token_ids(seed, 8, 20), {}
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_model(seed=seed, dtype=torch.bfloat16).to(dtype)
        attach(model, LoraConfig(r=4, lora_alpha=8), dtype=torch.float32, seed=seed)
        perturb_(model, seed)
        with torch.no_grad():
            logits[dtype] = model(ids)
            with merged_if_faster(model, MERGE_TOKENS):
                assert not adapter_layers(model)
                merged = model(ids)
    assert_precision(merged, logits[torch.bfloat16], logits[torch.float64])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_swapped_numbers_are_those_of_the_loaded_adapter_whatever_its_scale(kind, tmp_path):
    ids, other = token_ids(2, 2, 6), base_model()
    attach(other, replace(KINDS[kind], lora_alpha=7), dtype=torch.float64)
    perturb_(other, 77)
    save_adapter(other, tmp_path / "new")
    model = model_with(kind)
    held = [id(parameter) for parameter in model.parameters()]
    hotswap_adapter(model, tmp_path / "new", kind)
    assert [id(parameter) for parameter in model.parameters()] == held
    assert_maths(model(ids), other(ids))
    save_adapter(model, tmp_path / "again", kind)  # whose scale is the old one
    fresh = base_model()
    ml.load_adapter(fresh, tmp_path / "again")
    assert_maths(fresh(ids), other(ids))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("linears", vars(KINDS["dora"]), "adapter 'linears' of the model is another one"),
        ("linears", {"r": 3}, "lora_A"),
        ("rows", {"trainable_token_indices": (5, 2, 40)}, "or other rows"),
    ],
)
def test_what_does_not_fit_is_not_swapped(kind, changes, said, tmp_path):
    model, other = model_with(kind), base_model()
    before = [parameter.clone() for parameter in model.parameters()]
    attach(other, replace(KINDS[kind], **changes))
    save_adapter(other, tmp_path)
    with pytest.raises(TargetError, match=said):
        hotswap_adapter(model, tmp_path, kind)
    assert all(map(torch.equal, model.parameters(), before))


def test_an_adapter_of_low_rank_does_not_take_the_place_of_a_copy(tmp_path):
    whole = {"target_modules": (), "modules_to_save": ("0",)}
    for name, config in (("low", {"target_modules": ("0",)}), ("whole", whole)):
        model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
        attach(model, LoraConfig(r=2, **config))
        save_adapter(model, tmp_path / name)
    for held, stored in (("low", "whole"), ("whole", "low")):
        model = nn.Sequential(nn.Linear(4, 3))
        ml.load_adapter(model, tmp_path / held)
        with pytest.raises(TargetError, match=r"they differ in \['0'\]"):
            hotswap_adapter(model, tmp_path / stored)


@pytest.mark.parametrize("use_dora", [*long(False), True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_swapping_does_not_compile_again(use_dora, tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)
    for name, alpha in (("new", 9), ("default", 4)):
        attach(model, LoraConfig(r=2, lora_alpha=alpha, use_dora=use_dora), name)
        perturb_(model, alpha)
    save_adapter(model, tmp_path, "new")
    x = randn(1, 4, 8, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        hotswap_adapter(model, tmp_path)
        with torch._dynamo.config.patch(error_on_recompile=True):
            swapped = compiled(x)
        set_adapter(model, "new")
        assert_parity(swapped, model(x))


def test_switching_moves_no_number_and_deleting_leaves_the_others():
    model, ids = model_with("linears", "dora", "lora_bias"), token_ids(4, 2, 5)
    logits, held = {}, {name: p.data_ptr() for name, p in model.named_parameters()}
    for kind in ("linears", "dora", "lora_bias"):
        set_adapter(model, kind)
        logits[kind] = model(ids)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == held
    set_adapter(model, ["dora", "lora_bias"])
    delete_adapter(model, "linears")
    assert {name for layer in adapter_layers(model).values() for name in layer.configs} == {"dora", "lora_bias"}
    for kind in ("dora", "lora_bias"):
        set_adapter(model, kind)
        assert torch.equal(model(ids), logits[kind])
    delete_adapter(model, "dora")
    delete_adapter(model, "lora_bias")
    assert not adapter_layers(model)
    assert torch.equal(model(ids), base_model()(ids))

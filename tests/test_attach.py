import contextlib
import copy
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import minilora as ml
from minilora.adapter import adapter_layers, linear_layers
from minilora.adapters.attach import delete_adapter, merged
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.lora import LoraAdapter
from minilora.models.checkpoint import build_model
from minilora.models.config import parse_config
from minilora.testing.compare import MATHS, assert_maths, assert_parity, relative
from tests import models
from tests.files import same_state
from tests.models import (
    CONFIGS,
    WHOLE,
    bases,
    four_bit,
    randn,
    randomize_adapters_,
    scales,
    seeds,
    tiny_model,
    token_ids,
)
from tests.training import adapted

families = st.sampled_from(sorted(models.FAMILIES))
IDS = token_ids(3, 2, 7)


def kinds_of(model):
    return [type(module) for module in model.modules()]


@pytest.fixture(scope="module", params=CONFIGS)
def trained_once(request):
    """A model after some steps of training, what it was before, and what it computed then."""
    model = tiny_model(WHOLE, num_hidden_layers=2)
    before, logits, kinds = copy.deepcopy(model), model(IDS), kinds_of(model)
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **CONFIGS[request.param]}), dtype=torch.float64)
    models.train_a_little(model.train(), IDS, steps=2)
    return model.eval(), before, logits, kinds


@pytest.fixture
def trained(trained_once):
    model, *before = trained_once
    return copy.deepcopy(model), *before


def test_training_leaves_every_bit_of_the_base_which_acts_where_no_adapter_does(trained):
    model, before, logits, kinds = trained
    assert relative(model(IDS), logits, MATHS) > 1e6
    with ml.disable_adapter(model):
        assert torch.equal(model(IDS), logits)
    ml.detach(model)
    same_state(model, before)
    assert torch.equal(model(IDS), logits)
    assert kinds_of(model) == kinds


def test_merging_keeps_the_logits_and_comes_back_to_every_bit_or_leaves_no_adapter(trained):
    """Also after an interruption."""
    model, _, base_logits, kinds = trained
    state, logits, modules = copy.deepcopy(model), model(IDS), list(model.modules())
    with pytest.raises(KeyboardInterrupt), merged(model):  # noqa: PT012
        assert not any(layer.active for layer in adapter_layers(model).values())
        assert_maths(model(IDS), logits)
        raise KeyboardInterrupt
    assert list(model.modules()) == modules
    same_state(model, state)
    assert torch.equal(model(IDS), logits)
    ml.merge(model)
    assert not adapter_layers(model)
    assert_maths(model(IDS), logits)
    assert kinds_of(model) == kinds
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert relative(model(IDS), base_logits, MATHS) > 1e6


def test_deleting_one_of_two_adapters_leaves_the_other_as_it_was(trained):
    model, before, *_ = trained
    logits = model(IDS)
    names = trained_names(model)
    ml.attach(model, ml.LoraConfig(r=2, target_modules=("q_proj",)), name="other", dtype=torch.float64)
    delete_adapter(model, "other")  # so the one that is left acts and learns
    assert torch.equal(model(IDS), logits)
    assert trained_names(model) == names
    delete_adapter(model, "default")
    same_state(model, before)
    assert not adapter_layers(model)


def test_of_two_that_act_the_other_acts_after_one_was_deleted_where_both_were_disabled():
    model = adapted(name="a")
    ml.attach(model, ml.LoraConfig(r=2), "b", dtype=torch.float64)
    randomize_adapters_(model)
    logits = model(IDS)
    ml.set_adapter(model, ["a", "b"])
    with ml.disable_adapter(model):
        ml.delete_adapter(model, "a")
    assert torch.equal(model(IDS), logits)


def test_of_the_adapters_left_by_the_active_one_the_first_by_name_acts_in_all_its_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for name, places in {"zero": ["1"], "two": ["0", "1"], "one": ["1"]}.items():
        ml.attach(model, ml.LoraConfig(target_modules=places), name)
    ml.set_adapter(model, "zero")
    delete_adapter(model, "zero")
    assert [layer.active for layer in adapter_layers(model).values()] == [(), ("one",)]
    assert all(p.requires_grad for p in model[1].adapters["one"].parameters())


@models.examples(0.2)
@given(families)
def test_four_bits_are_as_many_parameters_as_sixteen(family):
    dense, packed = tiny_model(family), four_bit(tiny_model(family))
    assert ml.count_parameters(packed).total == ml.count_parameters(dense).total


@models.examples(0.4)
@given(families, seeds, bases)
def test_a_new_adapter_leaves_the_logits_bit_equal(family, seed, base):
    model = base(tiny_model(family, seed=seed))
    before = model(IDS)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=12), seed=seed)
    assert torch.equal(model(IDS), before)


@example("llama", 0, 7.0, four_bit, ("o_proj",))
@models.examples(0.4)
@given(families, seeds, scales, bases, st.sampled_from(["all-linear", ("down_proj",)]))
def test_merging_keeps_the_logits_and_leaves_plain_linears(family, seed, scale, base, targets):
    model = adapted(family, seed=seed, base=base, lora_alpha=3 * scale, target_modules=targets)
    before, without = model(IDS), base(tiny_model(family))(IDS)
    ml.merge(model)
    for linear in linear_layers(model).values():
        assert type(linear) is nn.Linear
        assert linear.weight.shape == (linear.out_features, linear.in_features)
    assert not adapter_layers(model)
    assert_maths(model(IDS), before)
    assert not torch.equal(before, without)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def trained_adapters(model):
    """Those of which something is trainable, and the base as an empty name."""
    return {name.partition(".adapters.")[2].partition(".")[0] for name in trained_names(model)}


@pytest.mark.parametrize(
    ("is_trained", "trainable", "expected"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_the_adapters_that_are_set_are_trained_alone_if_one_was_before_or_as_is_asked(is_trained, trainable, expected):
    """Each with all that it has, also what is trained in full."""
    model = tiny_model(WHOLE, num_hidden_layers=1)
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",), trainable_token_indices=(1, 2)), "first")
    ml.attach(model, ml.LoraConfig(target_modules=("v_proj",), modules_to_save=("norm",)), "second")
    ml.set_adapter(model, "first", trainable=True)
    count = ml.count_parameters(model).trainable
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj", "v_proj")), "third")
    ml.set_adapter(model, "third", trainable=is_trained)
    assert trained_adapters(model) == ({"third"} if is_trained else set())
    ml.set_adapter(model, "first", trainable)
    assert ml.count_parameters(model).trainable == (count if expected else 0)
    ml.set_adapter(model, ["first", "second"], trainable)
    assert trained_adapters(model) == ({"first", "second"} if expected else set())
    ml.set_adapter(model, [])
    assert trained_adapters(model) == ({"first", "second"} if expected else set())


def test_llama_3_2_1b_has_3407872_trainable_parameters_of_1239222272():
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = build_model(parse_config({"model_type": "llama", **sizes, **heads}))
    ml.attach(model, ml.LoraConfig(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    assert ml.count_parameters(model) == (3_407_872, 1_239_222_272)


def test_adapters_act_in_the_order_in_which_they_are_named():
    """What DoRA makes of what another has made, by loops: test_layers.py."""
    model = tiny_model()
    for name in ("first", "second"):
        ml.attach(model, ml.LoraConfig(r=3, use_dora=True), name=name)
    for names in (("first", "second"), ("second", "first")):
        ml.set_adapter(model, [*names, names[0]])  # an adapter named twice acts once
        assert {layer.active for layer in adapter_layers(model).values()} == {names}


def test_without_an_adapter_or_while_it_is_merged_none_is_disabled_or_set():
    model = adapted()
    for without in (lambda: merged(model), lambda: contextlib.nullcontext(ml.detach(model))):
        with without():
            for change in (lambda: ml.disable_adapter(model).__enter__(), lambda: ml.set_adapter(model, "default")):
                with pytest.raises(ml.TargetError, match="has no adapter"):
                    change()


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], ["q_proj", "v_proj"]])
def test_an_adapter_that_is_attached_where_another_is_disabled_stays_the_only_one_that_acts(targets):
    model = adapted(target_modules=["q_proj", "o_proj"])
    with ml.disable_adapter(model):
        ml.attach(model, ml.LoraConfig(target_modules=targets), name="second")
    layers = adapter_layers(model).values()
    assert {layer.active for layer in layers} == {("second",), ()}
    assert all(layer.active for layer in layers if "second" in layer.adapters)
    assert {name for layer in layers for name, p in layer.adapters.named_parameters() if p.requires_grad} == {
        "second.lora_A",
        "second.lora_B",
    }


def test_all_linear_leaves_the_head_alone_and_a_name_can_still_mean_it():
    model = tiny_model("qwen2")
    ml.attach(model, ml.LoraConfig())
    assert set(linear_layers(model)) - set(adapter_layers(model)) == {"lm_head"}
    ml.attach(model, ml.LoraConfig(target_modules=("lm_head",)), name="head")
    assert "lm_head" in adapter_layers(model)


def test_any_module_can_be_adapted_and_a_shared_linear_is_adapted_everywhere():
    """Also under two names of one parent."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared, shared), "second": shared, "other": nn.Linear(4, 4)})
    ml.attach(model, ml.LoraConfig(r=2, target_modules=r"first\.0"))
    assert model["first"][0] is model["first"][1] is model["second"] is not shared
    assert list(adapter_layers(model)) == ["first.0"]
    ml.detach(model)
    assert model["first"][0] is model["first"][1] is model["second"] is shared


def test_a_model_that_has_no_head_and_says_so_by_an_error_can_be_adapted():
    """As models of transformers do."""

    class Headless(nn.Sequential):
        def get_output_embeddings(self):
            raise NotImplementedError

    model = Headless(nn.Linear(3, 4), nn.Linear(4, 2))
    ml.attach(model, ml.LoraConfig(r=2))
    assert list(adapter_layers(model)) == ["0", "1"]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    return linear


def overridden():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: 2 * x
    return linear


def test_a_layer_that_computes_otherwise_than_its_class_is_no_target():
    for layer, message in (
        (hooked, "0: has hooks or a forward of its own"),
        (overridden, "0: has hooks or a forward of its own"),
        (lambda: Doubled(4, 4), "no module that can be adapted matches"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "no module that can be adapted matches"),
        (lambda: prune.identity(nn.Linear(4, 4), "weight"), "no module that can be adapted matches"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "no module that can be adapted matches"),
    ):
        with pytest.raises(ml.TargetError, match=message):
            ml.attach(nn.Sequential(layer()), ml.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("wrapped", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_refused_for_its_names_would_fit_no_other(wrapped):
    with pytest.raises(ml.TargetError, match="adapt it, then wrap it"):
        ml.attach(wrapped(tiny_model()), ml.LoraConfig())


KINDS = ({"trainable_token_indices": (1,)}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]})
IN_FULL = {"modules_to_save": ["layers.0.mlp"]}, {"target_modules": ["up_proj"]}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        *((*pair, "embed_tokens: adapters .* wrap it by another class") for pair in permutations(KINDS, 2)),
        *((*pair, r"up_proj: is in .*mlp, which an adapter trains in full") for pair in permutations(IN_FULL)),
    ],
)
def test_adapters_of_two_kinds_do_not_share_a_module_nor_a_part_of_one(first, second, said):
    model = tiny_model(WHOLE, num_hidden_layers=1)
    ml.attach(model, ml.LoraConfig(**{"target_modules": [], **first}))
    before = copy.deepcopy(model)
    with pytest.raises(ml.TargetError, match=said):
        ml.attach(model, ml.LoraConfig(**{"target_modules": [], **second}), "second")
    same_state(model, before)


class Shared(nn.Module):
    """What a T5 of transformers 5 has: an embedding for others to share, which is not called itself."""

    def __init__(self):
        super().__init__()
        self.shared, self.embed, self.head = nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Linear(4, 7)
        self.embed.weight = self.head.weight = self.shared.weight
        models.fill_(self.double(), 0)

    def forward(self, ids):
        return self.head(self.embed(ids))

    def get_input_embeddings(self):
        return self.shared


def test_trained_rows_are_those_of_every_embedding_that_is_tied(tmp_path):
    model, loaded, ids = Shared(), Shared(), torch.tensor([[1, 2, 3]])
    ml.attach(model, ml.LoraConfig(target_modules=[], trainable_token_indices=(1,)), dtype=torch.float64)
    models.perturb_(model)
    rows = next(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.embed(torch.tensor([1])), rows)
    ml.save_adapter(model, tmp_path)
    assert list(load_file(tmp_path / WEIGHTS_FILE)) == ["base_model.model.shared.token_adapter.trainable_tokens_delta"]
    ml.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(ids), model(ids))
    ml.merge(model)
    assert model.embed.weight is model.shared.weight
    assert_maths(model(ids), loaded(ids))


def test_all_linear_says_which_linears_it_leaves_out_and_names_do_not():
    """Of PyTorch's layer it adapts two: attention reads its own weights, and calls no linear."""

    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)

    model = encoder()
    with pytest.warns(UserWarning, match=r"leaves out \{'MultiheadAttention': 2\}, such as 'layers\.0\.self_attn'"):
        ml.attach(model, ml.LoraConfig(r=2))
    assert {path.rpartition(".")[2] for path in adapter_layers(model)} == {"linear1", "linear2"}
    for config in (ml.LoraConfig(modules_to_save=("self_attn",)), ml.LoraConfig(target_modules=("linear1",))):
        ml.attach(encoder(), config)


@pytest.mark.parametrize("is_active", [True, False])
def test_merging_a_tied_head_keeps_the_embedding_and_the_tie_if_its_adapter_does_not_act(is_active):
    model = adapted("qwen2", target_modules=("lm_head",))
    if not is_active:
        ml.attach(model, ml.LoraConfig(r=2, target_modules=("q_proj",)), name="second")
    before, embedding = model(IDS), model.model.embed_tokens.weight.clone()
    ml.merge(model)
    assert_maths(model(IDS), before)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) != is_active


def test_a_merge_that_unties_a_head_says_so_in_the_config_that_transformers_saves():
    """Otherwise the head would be tied again when the merged model is loaded."""
    model = tiny_model(WHOLE)
    model.config, model.save_pretrained = SimpleNamespace(tie_word_embeddings=True, source={}), lambda path: None
    ml.attach(model, ml.LoraConfig(r=2, target_modules=("lm_head",)))
    randomize_adapters_(model)
    ml.merge(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False


def test_a_bias_of_b_is_not_for_embeddings():
    model = tiny_model(WHOLE)
    before = copy.deepcopy(model)
    with pytest.raises(ml.ConfigError, match="embed_tokens: lora_bias is not for embeddings"):
        ml.attach(model, ml.LoraConfig(r=2, target_modules=("embed_tokens",), lora_bias=True))
    same_state(model, before)


@given(seeds, scales, bases, st.booleans(), st.booleans())
def test_factors_that_are_given_are_a_part_of_the_weight_that_will_be_trained(seed, scale, base, has_b, use_dora):
    """Where B is 0 the adapter is a plain one; modules without given factors start as the config says."""
    model, path = base(tiny_model(seed=seed)), "model.layers.0.mlp.up_proj"
    before, logits = copy.deepcopy(model), model(IDS)
    A, B = randn(seed, 3, 24), randn(seed + 1, 40, 3) * has_b
    config = ml.LoraConfig(r=3, lora_alpha=3 * scale, use_dora=use_dora)
    ml.attach(model, config, dtype=torch.float64, start={path: (A, B)})
    assert_maths(model(IDS), logits)
    layers = adapter_layers(model)
    adapter = layers[path].adapters["default"]
    trained = models.trained_of(adapter)
    assert torch.equal(trained["lora_A"], A)
    assert torch.equal(trained["lora_B"], B)
    assert (type(adapter) is LoraAdapter) != has_b
    assert all(type(layers[other].adapters["default"]) is LoraAdapter for other in layers.keys() - {path})
    with torch.no_grad():
        trained["lora_B"].add_(1)
    if not use_dora:
        assert_maths(layers[path].merged_weight(), layers[path].base.weight + scale * torch.ones_like(B) @ A)
    ml.detach(model)
    same_state(model, before)


@pytest.mark.parametrize(
    ("path", "shapes", "said"),
    [
        ("lm_head", ((3, 24), (61, 3)), r"start: \['lm_head'\] are not among the modules that get an adapter"),
        ("model.layers.0.mlp.up_proj", ((2, 24), (40, 2)), r"up_proj: start has A \(2, 24\) .*, need A \(3, 24\)"),
    ],
)
def test_factors_that_fit_no_module_are_refused_and_change_nothing(path, shapes, said):
    model = tiny_model()
    before = copy.deepcopy(model)
    with pytest.raises((ml.TargetError, ml.ShapeError), match=said):
        ml.attach(model, ml.LoraConfig(r=3), start={path: [torch.ones(shape) for shape in shapes]})
    same_state(model, before)


def test_start_values_that_are_made_from_weights_have_their_shapes_without_them():
    with torch.device("meta"):
        blank = build_model(models.tiny_config())
    full = tiny_model()
    for model in (blank, full):
        ml.attach(model, ml.LoraConfig(r=3, init_lora_weights="pissa", use_dora=True))
    assert {name: t.shape for name, t in blank.state_dict().items()} == {
        name: t.shape for name, t in full.state_dict().items()
    }


def test_a_row_of_zeros_stays_a_number_under_dora():
    model, x = nn.Sequential(nn.Linear(4, 3)), randn(0, 5, 4).float()
    model[0].weight.data[1] = 0
    expected = model(x)
    ml.attach(model, ml.LoraConfig(r=2, use_dora=True))
    assert_parity(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_sum_beyond_the_numbers_that_there_are_is_refused():
    model = adapted(dtype=torch.float32, name="a")
    for layer in adapter_layers(model).values():
        layer.adapters["a"].lora_B.data.fill_(1e37)
    with pytest.raises(ml.TrainingError, match="not finite"):
        ml.combine_adapters(model, {"a": 1e6}, "sum")


@pytest.mark.parametrize("fold", [ml.merge, lambda model: ml.merged(model).__enter__()])
def test_a_merge_that_overflows_is_refused_by_name_and_changes_nothing(fold):
    model = tiny_model(dtype=torch.float16)
    ml.attach(model, ml.LoraConfig(r=3))
    adapter = list(adapter_layers(model).values())[-1].adapters["default"]
    for factor in (adapter.lora_A, adapter.lora_B):
        factor.data.fill_(200)
    before = copy.deepcopy(model)
    with pytest.raises(ml.TrainingError, match=r"layers\.3\.mlp\.down_proj: merged, it has numbers that are not"):
        fold(model)
    same_state(model, before)


def test_what_is_not_there_is_an_error_that_says_what_is_and_so_is_a_name_that_cannot_be_a_module_s():
    model = tiny_model()
    for name in ("", "a.b", "keys"):
        with pytest.raises(ml.TargetError, match="adapter name"):
            ml.attach(model, ml.LoraConfig(), name=name)
    assert not adapter_layers(model)
    for operation in (ml.detach, ml.merge, lambda m: ml.set_adapter(m, "default")):
        with pytest.raises(ml.TargetError, match="no adapter"):
            operation(model)
    ml.attach(model, ml.LoraConfig(target_modules=("q_proj",)))
    with pytest.raises(ml.TargetError, match="already"):
        ml.attach(model, ml.LoraConfig(target_modules=("v_proj",)))
    assert all(path.endswith("q_proj") for path in adapter_layers(model))
    with pytest.raises(ml.TargetError, match=r"'task1'.*\['default'\]"):
        ml.set_adapter(model, "task1")
    with ml.disable_adapter(model), pytest.raises(ml.TargetError, match="no adapter is active"):
        ml.merge(model)


def test_a_place_with_hooks_is_not_merged():
    model = adapted()
    path, layer = next(iter(adapter_layers(model).items()))
    handle = layer.register_forward_hook(lambda *_: None)
    for fold in (ml.merge, lambda model: ml.merged(model).__enter__()):
        with pytest.raises(ml.TargetError, match=f"{path}: has hooks"):
            fold(model)
    assert path in adapter_layers(model)
    handle.remove()
    ml.merge(model)


class Scaled(nn.Module):
    """Like some models of transformers, it scales what a tied head is given."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True, tie_word_embeddings=True)
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.head(hidden * 4**-0.5 if self.config.tie_word_embeddings else hidden)


@pytest.mark.parametrize("target", ["head", "embedding"])
def test_a_tie_that_the_model_computes_with_is_not_broken_by_a_merge(target):
    model, ids = Scaled(), torch.arange(7)
    ml.attach(model, ml.LoraConfig(r=2, target_modules=[target]))
    randomize_adapters_(model)
    before = model(ids)
    with pytest.raises(ml.TargetError, match="may change what the model computes"):
        ml.merge(model)
    assert torch.equal(model(ids), before)


def test_a_wrapper_leaves_the_mode_of_what_it_wraps():
    model = tiny_model(dtype=torch.float32).train()
    model.model.layers[0].mlp.gate_proj.eval()
    modes = [module.training for module in model.modules()]
    ml.attach(model, ml.LoraConfig(target_modules=["v_proj"], modules_to_save=["mlp"]))
    ml.detach(model)
    assert [module.training for module in model.modules()] == modes

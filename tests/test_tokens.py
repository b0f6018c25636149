"""TokenRows of an embedding that are trained: as the whole matrix with those rows in it, without ever making one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.modules_to_save import TokenRows, TrainableTokens
from minilora.llama import Documents
from minilora.testing.compare import MATHS, assert_maths, relative
from tests.models import WHOLE, allocated, perturb_, randn, seeds, tiny_model, token_ids, train_a_little

IDS = token_ids(3, 2, 7)
ROWS = (7, 2, 40)


def base_model(family=WHOLE, dtype=torch.float64, **changes):
    return tiny_model(family, dtype=dtype, num_hidden_layers=1, **changes)


def with_rows(ids=ROWS, family=WHOLE, dtype=torch.float64, own=torch.float64, **changes):
    model = base_model(family, dtype, **changes)
    ml.attach(model, ml.LoraConfig(target_modules=(), trainable_token_indices=ids), dtype=own)
    return model


def rows(model, name="default"):
    return model.model.embed_tokens.adapters[name].rows


def written_out(weight, ids, rows):
    """The matrix with the rows in it."""
    return weight.index_copy(0, torch.tensor(ids), rows.to(weight.dtype))


token_lists = st.lists(st.integers(0, 60), min_size=1, max_size=20, unique=True)


@given(seeds, token_lists)
def test_rows_act_as_the_whole_matrix_with_them_in_it(seed, ids):
    embedding = nn.Embedding(61, 5).double().requires_grad_(False)
    place = TrainableTokens(embedding, "embedding", {"new": TokenRows(ids, nn.Parameter(randn(seed, len(ids), 5)))})
    place.active = ("new",)
    x, dy = token_ids(seed + 1, 4, 9), randn(seed + 2, 4, 9, 5)
    trained = place.adapters["new"].rows
    y, expected = place(x), F.embedding(x, written_out(place.base.weight, ids, trained))
    assert torch.equal(y, expected)
    assert torch.equal(place.weight, written_out(place.base.weight, ids, trained))
    assert_maths(*(torch.autograd.grad(each, trained, dy)[0] for each in (y, expected)))


@given(seeds, token_lists)
def test_a_tied_head_makes_its_logits_with_the_same_rows(seed, ids):
    model = with_rows(tuple(ids))
    rows(model).data.copy_(randn(seed, len(ids), 24))
    plain = base_model()
    whole = nn.Parameter(written_out(plain.model.embed_tokens.weight, ids, rows(model)).detach())
    plain.model.embed_tokens.weight = plain.lm_head.weight = whole
    assert_maths(model(IDS), plain(IDS))
    dy = randn(seed + 1, *IDS.shape, 61)
    (ours,), (theirs,) = (torch.autograd.grad(each(IDS), to, dy) for each, to in ((model, rows(model)), (plain, whole)))
    assert_maths(ours, theirs[ids])
    assert sum(p.requires_grad for p in model.parameters()) == 1


def test_a_tied_head_with_a_bias_keeps_it():
    """As those of masked language models."""
    embedding, head = nn.Embedding(9, 5), nn.Linear(5, 9)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head}).double()
    x = randn(0, 3, 5)
    logits, config = model["head"](x), ml.LoraConfig(target_modules=(), trainable_token_indices={"embedding": (4, 1)})
    ml.attach(model, config, dtype=logits.dtype)
    assert_maths(model["head"](x), logits)
    model["embedding"].adapters["default"].rows.data.copy_(randn(1, 2, 5))
    weight = written_out(embedding.weight, (4, 1), model["embedding"].adapters["default"].rows)
    assert_maths(model["head"](x), F.linear(x, weight, head.bias))


def test_a_head_of_its_own_does_not_read_them():
    model = with_rows(family="llama")
    assert list(adapter_layers(model)) == ["model.embed_tokens"]
    rows(model).data.zero_()
    before = base_model("llama")
    assert torch.equal(model.lm_head(randn(0, 3, 24)), before.lm_head(randn(0, 3, 24)))


@pytest.mark.parametrize("family", ["llama", WHOLE])
@pytest.mark.parametrize("ids", [{"lm_head": (4, 1)}, {"embed_tokens": (3,), "lm_head": (4, 1)}])
def test_rows_of_the_head_are_its_own_where_it_is_not_tied_or_they_are_others(family, ids):
    model = with_rows(ids, family)
    for path, layer in adapter_layers(model).items():
        layer.adapters["default"].rows.data.copy_(randn(len(path), len(ids[path.rpartition(".")[2]]), 24))
    plain = base_model(family)
    embedding, head = plain.model.embed_tokens.weight, plain.lm_head.weight
    plain.lm_head.weight = nn.Parameter(written_out(head, ids["lm_head"], model.lm_head.adapters["default"].rows))
    if "embed_tokens" in ids:
        plain.model.embed_tokens.weight = nn.Parameter(written_out(embedding, (3,), rows(model)))
    assert_maths(model(IDS), plain(IDS))
    ml.merge(model)
    assert_maths(model(IDS), plain(IDS))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def scaled_embedding(scale, dtype=torch.float64):
    """Like transformers': BART's has a number, Gemma's a buffer."""

    class BartScaledWordEmbedding(nn.Embedding):
        embed_scale = scale

        def forward(self, x):
            factor = scale.to(self.weight.dtype) if isinstance(scale, torch.Tensor) else scale
            return super().forward(x) * factor

    BartScaledWordEmbedding.__module__ = "transformers.models.bart.modeling_bart"
    model = nn.ModuleDict({"embed": BartScaledWordEmbedding(61, 6, padding_idx=1), "head": nn.Linear(6, 61)}).to(dtype)
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("scale", [7.3, torch.tensor(0.3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ("embed",)},
        {"target_modules": ("embed",), "use_dora": True},
        {"target_modules": (), "trainable_token_indices": {"embed": (*IDS[0, :2].tolist(), 1)}},
    ],
)
def test_a_scaled_embedding_is_adapted_as_the_weight_that_it_scales(scale, dtype, config):
    model = scaled_embedding(scale, dtype)
    before, head = model["embed"](IDS), model["head"](randn(0, 3, 6, dtype=dtype))
    ml.attach(model, ml.LoraConfig(r=2, lora_alpha=14, **config), dtype=dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(model["embed"](IDS), before) or "use_dora" in config
        return
    perturb_(model)
    y, x = model["embed"](IDS), randn(0, 3, 6)
    assert_maths(y, F.embedding(IDS, model["embed"].weight) * scale)
    assert relative(y, before, MATHS) > 1e6
    assert torch.equal(model["head"](x), head) == bool(config["target_modules"])
    ml.merge(model)
    assert_maths(model["embed"](IDS), y)


def test_rows_begin_as_those_of_the_embedding_in_float32_and_are_all_that_is_trained():
    model = with_rows(dtype=torch.bfloat16, own=torch.float32)
    before = base_model(dtype=torch.bfloat16)
    assert torch.equal(model(IDS), before(IDS))
    assert torch.equal(rows(model), before.model.embed_tokens.weight[list(ROWS)].float())
    assert ml.count_parameters(model).trainable == 3 * 24
    train_a_little(model, torch.tensor([ROWS]))
    assert rows(model).dtype == torch.float32
    assert model.model.embed_tokens(IDS).dtype == model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("family", [WHOLE, "llama"])
def test_nothing_of_the_size_of_the_vocabulary_is_made_or_kept(family):
    """PEFT 0.21 copies the embedding in every forward pass, and gives it a gradient."""
    V, D = 20_000, 24
    model = with_rows((5, 19_999, 3), family, dtype=torch.float32, own=torch.float32, vocab_size=V)
    known = {p.data_ptr() for p in model.parameters()}
    kept = []

    def work():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            model.model(token_ids(0, 9), Documents([9])).sum().backward()

    _, most, _ = allocated(work)
    assert most < 4 * V * D / 4
    assert 0 < max(tensor.numel() for tensor in kept if tensor.data_ptr() not in known) < V
    x = randn(0, 2, D, dtype=torch.float32).requires_grad_()
    _, most, _ = allocated(lambda: model.lm_head(x).sum().backward())
    assert most < 4 * V * D / 2  # a few times the logits of two tokens


def test_merging_writes_the_rows_into_embedding_and_head_and_ties_them_again():
    for dtype in [torch.float64, torch.bfloat16]:
        model = with_rows(dtype=dtype, own=torch.float32)
        rows(model).data.copy_(randn(0, 3, 24))
        expected = written_out(base_model(dtype=dtype).model.embed_tokens.weight, ROWS, rows(model))
        ml.merge(model)
        assert torch.equal(model.model.embed_tokens.weight, expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert type(model.model.embed_tokens) is nn.Embedding


def test_two_adapters_act_together_where_their_rows_are_others():
    model = with_rows((1, 2))
    for name, ids in (("second", (3, 4)), ("third", (4, 5))):
        ml.attach(model, ml.LoraConfig(target_modules=(), trainable_token_indices=ids), name=name, dtype=torch.float64)
        rows(model, name).data.copy_(randn(len(name), 2, 24))
    rows(model).data.zero_()
    ml.set_adapter(model, ["default", "second"])
    weight = base_model().model.embed_tokens.weight
    for ids, name in (((1, 2), "default"), ((3, 4), "second")):
        weight = written_out(weight, ids, rows(model, name))
    assert torch.equal(model.model.embed_tokens(IDS), F.embedding(IDS, weight))
    with pytest.raises(ml.TargetError, match=r"embed_tokens: \('second', 'third'\)"):
        ml.set_adapter(model, ["second", "third"])


def test_unknown_tokens_and_a_trained_bias_of_a_tied_head_are_refused():
    for ids, said in (
        ((3, 61), r"\[61\] are not below 61, the rows of model\.embed_tokens"),
        ((3, 3), "ids from 0, each once"),
        ({"wte": (3,)}, "'wte' names no module, need an embedding or a linear head"),
        ({"norm": (3,)}, r"'norm' names \['RMSNorm'\], need an embedding"),
    ):
        with pytest.raises((ml.TargetError, ml.ConfigError), match=said):
            with_rows(ids)
    with pytest.raises(ml.TargetError, match="does not say which its embedding is"):
        ml.attach(nn.Sequential(nn.Embedding(3, 2)), ml.LoraConfig(target_modules=(), trainable_token_indices=(1,)))
    model = base_model()
    model.lm_head.bias = nn.Parameter(torch.zeros(61, dtype=torch.float64))
    config = ml.LoraConfig(target_modules=("q_proj",), bias="all", trainable_token_indices=ROWS)
    with pytest.raises(ml.TargetError, match="lm_head: has trainable_token_indices, so its bias"):
        ml.attach(model, config)
    assert not adapter_layers(model)

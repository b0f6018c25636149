"""New tokens: they act in any text, and a model has rows for them that change nothing for the others."""

import pytest
import torch
from torch import nn

from minilora import (
    ConfigError,
    LoraConfig,
    attach,
    load_model,
    load_tokenizer,
    resize_token_embeddings,
    save_model,
)
from minilora.files import BUILTIN
from minilora.nf4 import NF4Linear
from minilora.testing.compare import assert_maths
from tests.models import SIZES, tiny_model, token_ids

V = SIZES["vocab_size"]
NEW = ["<wumpus>", "Zork"]


def test_new_tokens_act_in_any_text_and_leave_the_others_as_they_were(tmp_path):
    old = load_tokenizer(BUILTIN)
    new = old.with_tokens(NEW)
    new.save(tmp_path)
    for tokenizer in (new, load_tokenizer(tmp_path)):
        assert len(tokenizer) == len(old) + 2
        assert [tokenizer.token_id(token) for token in NEW] == [len(old), len(old) + 1]
        ids = tokenizer.encode("a <wumpus> in Zork", add_special_tokens=False)
        assert {len(old), len(old) + 1} < set(ids)
        assert tokenizer.decode(ids) == "a <wumpus> in Zork"
        assert tokenizer.encode("a small bird") == old.encode("a small bird")
    assert old.token_id("Zork") is None
    for tokens in ([""], ["Zork", "Zork"], ["<wumpus>", "a"]):  # none, or no new ones
        with pytest.raises(ConfigError, match="tokens already"):
            old.with_tokens(tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied and tied
def test_a_new_row_is_the_mean_and_the_old_logits_stay(family):
    model, tokens = tiny_model(family), token_ids(3, 2, 5)
    before, weights = model(tokens), [w.clone() for w in (model.model.embed_tokens.weight, model.lm_head.weight)]
    resize_token_embeddings(model, V + 3)
    after = model(tokens)
    assert_maths(after[..., :V], before)
    for weight, old in zip((model.model.embed_tokens.weight, model.lm_head.weight), weights, strict=True):
        assert torch.equal(weight[:V], old)
        assert_maths(weight[V:], old.mean(0).expand(3, -1))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "qwen2")
    assert model(token_ids(4, 1, 6, high=V + 3)).shape == (1, 6, V + 3)
    weight = model.model.embed_tokens.weight
    resize_token_embeddings(model, V + 3)  # for which there is room
    assert model.model.embed_tokens.weight is weight


def test_a_grown_model_is_saved_and_loaded(tmp_path):
    model, tokens = tiny_model("qwen2", dtype=torch.float32), token_ids(3, 2, 5, high=V + 3)
    resize_token_embeddings(model, V + 3)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_adapted_and_packed_ones_are_refused():
    model = tiny_model()
    attach(model, LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="LoraEmbedding"):
        resize_token_embeddings(model, V + 1)
    model = tiny_model()
    model.lm_head = NF4Linear.quantize(model.lm_head.weight)
    with pytest.raises(ConfigError, match="NF4Linear"):
        resize_token_embeddings(model, V + 1)
    assert isinstance(model.model.embed_tokens, nn.Embedding)

"""Ours and transformers' decoders: the same logits, the same files, the same text."""

import pytest
import torch

import minilora as ml
from minilora.model.config import FAMILIES as TYPES
from minilora.model.config import LlamaConfig
from tests.models import FAMILIES, tiny_model, token_ids
from tests.test_config_json import MINIMAL, meaning
from tests.tolerance import assert_parity

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
families = pytest.mark.parametrize("family", FAMILIES)
shards = pytest.mark.parametrize("shard_bytes", [1_000_000, 9_000])  # one file, several files


def their_model(ours):
    """transformers' model of the same config.json and weights."""
    source = dict(ours.config.source)
    config = transformers.AutoConfig.for_model(source.pop("model_type"), **source)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


@families
@pytest.mark.parametrize("n", [1, 10, 30])
def test_logits_are_equal(family, n):
    ours = tiny_model(family, dtype=torch.float32)
    tokens = token_ids(n, 2, n)
    with torch.no_grad():
        assert_parity(ours(tokens), their_model(ours)(input_ids=tokens).logits)


@families
def test_logits_of_padded_rows_are_equal(family):
    ours, tokens, lengths = tiny_model(family, dtype=torch.float32), token_ids(0, 2, 9), [9, 4]
    mask = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
    with torch.no_grad():
        ours_logits, theirs_logits = (
            ours(tokens, lengths),
            their_model(ours)(input_ids=tokens, attention_mask=mask).logits,
        )
    assert_parity(ours_logits[mask == 1], theirs_logits[mask == 1])


@families
@shards
def test_what_ours_saves_theirs_loads_without_a_key_too_few_or_too_many(family, shard_bytes, tmp_path):
    ours, tokens = tiny_model(family, dtype=torch.float32), token_ids(0, 2, 20)
    ml.save_model(ours, tmp_path, shard_bytes=shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert_parity(ours(tokens), theirs.eval()(input_ids=tokens).logits)


@families
@shards
def test_what_theirs_saves_ours_loads(family, shard_bytes, tmp_path):
    theirs, tokens = their_model(tiny_model(family, dtype=torch.float32)), token_ids(0, 2, 20)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 10_000)
    with torch.no_grad():
        assert_parity(ml.load_model(tmp_path)(tokens), theirs(input_ids=tokens).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_load_a_half_precision_checkpoint_to_the_same_weights(dtype, tmp_path):
    ml.save_model(tiny_model("llama", dtype=getattr(torch, dtype)), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # in the checkpoint's own dtype
    ours = ml.load_model(tmp_path, dtype=theirs.dtype)
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("use_cache", [True, False])
@families
def test_greedy_text_of_64_tokens_is_equal(family, use_cache):
    is_right = family != "llama-dynamic"  # or their cache keeps keys that were rotated for a shorter document
    ours, prompt = tiny_model(family, dtype=torch.float32), token_ids(0, 1, 5)
    theirs = their_model(ours).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        use_cache=use_cache and is_right,
    )
    assert ml.generate(ours, prompt, max_new_tokens=64, use_cache=use_cache) == theirs[:, 5:].tolist()


@pytest.mark.parametrize("family", TYPES)
def test_a_key_that_is_left_out_means_the_same_to_both(family):
    sizes = {**MINIMAL, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    theirs = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert meaning(LlamaConfig.from_dict(theirs)) == meaning(LlamaConfig.from_dict({"model_type": family, **sizes}))

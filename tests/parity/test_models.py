"""Ours and transformers' decoders: the same logits, the same files, the same text, drawn or greedy."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.models.config import FAMILIES as TYPES
from minilora.models.config import parse_config
from minilora.models.generate import probabilities
from minilora.testing.compare import assert_maths, assert_parity, assert_precision
from tests.models import FAMILIES, randn, seeds, tiny_model, token_ids
from tests.test_config_json import MINIMAL, meaning

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
families = pytest.mark.parametrize("family", FAMILIES)
shards = pytest.mark.parametrize("shard_bytes", [1_000_000, 9_000])  # one file, several files
ONE_PLUS_W = ("Gemma3RMSNorm", "Qwen3_5RMSNorm")
TOKENS = token_ids(0, 2, 20)
temperatures, top_ps, top_ks = st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([0.2, 0.9, 1.0]), st.integers(0, 99)


def theirs_model(ours):
    """transformers' model of the same config.json and weights."""
    source = dict(ours.config.source)
    config = transformers.AutoConfig.for_model(source.pop("model_type"), **source)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def in_float64(ours):
    """transformers' model in float64, in which norms, delta rules and the scale of the embedding are computed too."""
    theirs = theirs_model(ours).double()
    theirs.load_state_dict(ours.state_dict())
    for name, scale in theirs.named_buffers():
        if name.endswith("embed_scale"):
            scale.fill_(ours.config.hidden_size**0.5)
    for norm in (each for each in theirs.modules() if type(each).__name__.endswith("RMSNorm")):
        is_gemma, eps = type(norm).__name__ in ONE_PLUS_W, getattr(norm, "variance_epsilon", None) or norm.eps
        norm.forward = partial(rms_norm, norm, is_gemma, eps)
    for layer in (each for each in theirs.modules() if type(each).__name__ == "Qwen3_5GatedDeltaNet"):
        layer.forward = partial(without_float32, layer.forward)
    return theirs


def without_float32(function, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return function(*args, **kwargs)


def rms_norm(norm, is_gemma, eps, x):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (is_gemma + norm.weight)


SHAPES = (
    {},
    {"hidden_size": 18, "intermediate_size": 9, "num_attention_heads": 3, "num_key_value_heads": 1},
    {"hidden_size": 36, "intermediate_size": 17, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 83},
)


@pytest.mark.parametrize("shape", SHAPES)
@families
@torch.no_grad()
def test_logits_are_equal_at_every_length_and_of_padded_rows(family, shape):
    ours = tiny_model(family, **shape)
    theirs = in_float64(ours)
    for length in (1, 10, 30):
        tokens = token_ids(length, 2, length)
        assert_maths(ours(tokens), theirs(input_ids=tokens).logits)
    tokens, lengths = token_ids(0, 2, 9), [9, 4]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    padded = theirs(input_ids=tokens, attention_mask=mask.long()).logits
    assert_maths(ours(tokens, lengths)[mask], padded[mask])


@families
@torch.no_grad()
def test_in_bfloat16_logits_are_as_exact_as_theirs(family):
    ours = tiny_model(family)
    exact = ours(TOKENS)
    theirs = theirs_model(ours).bfloat16()(input_ids=TOKENS).logits
    assert_precision(ours.bfloat16()(TOKENS), theirs, exact)


@families
@shards
@torch.no_grad()
def test_what_ours_saves_theirs_loads_without_a_key_too_few_or_too_many(family, shard_bytes, tmp_path):
    ours = tiny_model(family, dtype=torch.float32)
    ml.save_model(ours, tmp_path, shard_bytes=shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert_parity(ours(TOKENS), theirs.eval()(input_ids=TOKENS).logits)


@families
@shards
@torch.no_grad()
def test_what_theirs_saves_ours_loads(family, shard_bytes, tmp_path):
    theirs = theirs_model(tiny_model(family, dtype=torch.float32))
    theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 10_000)
    assert_parity(ml.load_model(tmp_path)(TOKENS), theirs(input_ids=TOKENS).logits)


@pytest.fixture(scope="module")
def theirs():
    return theirs_model(tiny_model(dtype=torch.float32))


@given(seeds, temperatures, top_ps, top_ks)
def test_the_probabilities_that_are_drawn_from_are_equal(theirs, seed, temperature, top_p, top_k):
    """Theirs is what `generate` draws from: its own list of processors, in its own order."""
    logits, documents = 3 * randn(seed, 4, 61, dtype=torch.float32), token_ids(seed, 4, 9)
    ours = probabilities(logits, temperature, top_p, top_k)
    settings = transformers.GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    expected = theirs._get_logits_processor(settings, documents.size(1), device="cpu")(documents, logits).softmax(-1)
    assert torch.equal(ours > 0, expected > 0)
    assert_parity(ours, expected)


@pytest.mark.parametrize("family", TYPES)
def test_a_key_that_is_left_out_means_the_same_to_both(family):
    sizes = {**MINIMAL, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    theirs = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert meaning(parse_config(theirs)) == meaning(parse_config({"model_type": family, **sizes}))

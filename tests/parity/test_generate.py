"""Ours and transformers' sampling: the same probabilities, and the same text with a repetition penalty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.model.generate import penalize, probabilities
from tests.models import randn, seeds, tiny_model, token_ids
from tests.parity.test_models import their_model
from tests.tolerance import assert_parity

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
V = 61
temperatures, top_ps, top_ks = st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([0.2, 0.9, 1.0]), st.integers(0, 99)
penalties = st.sampled_from([0.5, 1.0, 1.3, 7.0])


def their_probabilities(logits, documents, temperature, top_p, top_k, penalty):
    """What `generate` draws from: its own list of processors, in its own order."""
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty
    )
    model = their_model(tiny_model(dtype=torch.float32))
    processors = model._get_logits_processor(settings, documents.size(1), device="cpu")
    return processors(documents, logits).softmax(-1)


@given(seeds, temperatures, top_ps, top_ks, penalties)
def test_what_is_drawn_from_is_equal(seed, temperature, top_p, top_k, penalty):
    logits, documents = 3 * randn(seed, 4, V, dtype=torch.float32), token_ids(seed, 4, 9)
    ours = probabilities(penalize(logits, documents.tolist(), penalty), temperature, top_p, top_k)
    theirs = their_probabilities(logits, documents, temperature, top_p, top_k, penalty)
    assert torch.equal(ours > 0, theirs > 0)
    assert_parity(ours, theirs)


@given(seeds, penalties)
def test_greedy_text_with_a_repetition_penalty_is_equal(seed, penalty):
    ours, prompt = tiny_model("llama", seed, dtype=torch.float32), token_ids(seed, 1, 5)
    theirs = their_model(ours).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=penalty,
    )
    assert ml.generate(ours, prompt, 40, repetition_penalty=penalty) == theirs[:, 5:].tolist()

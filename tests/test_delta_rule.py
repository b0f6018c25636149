"""The gated delta rule against the loops, by its definition and by chunks of any size; a memory that fades slowly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import delta_rule as chunks
from minilora.llama import Documents
from minilora.models.delta_rule import gated_delta_rule
from minilora.models.generate import KVCache
from minilora.testing.compare import assert_maths
from tests import models, reference_model
from tests.models import either, of_kernels, randn, seeds, tiny_model, token_ids
from tests.test_llama import CPU, wide

each_chunk = pytest.mark.parametrize("chunk", [1, 3, 64])


@st.composite
def calls(draw):
    """q, k, v, log α and β, the lengths of documents, of which some are empty, and the states before them."""
    seed, K, group, E, F = draw(seeds), *(draw(st.integers(1, 3)) for _ in range(4))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
    N, H, fading = sum(lengths), K * group, draw(st.sampled_from([0.01, 1.0, 30.0]))
    q, k = randn(seed, 2, N, K, E)
    log_decay, beta = -fading * randn(seed + 1, N, H).exp(), randn(seed + 2, N, H).sigmoid()
    states = randn(seed + 4, len(lengths), H, F, E)
    return q, k / k.norm(dim=-1, keepdim=True), randn(seed + 3, N, H, F), log_decay, beta, lengths, states


@either
@each_chunk
@given(call=calls())
def test_outputs_and_states_equal_the_loops(call, chunk):
    *tensors, lengths, states = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        for before in (states, None):
            found = gated_delta_rule(*tensors, lengths, before)
            expected = wide(states) if before is not None else 0 * wide(states)
            expected = reference_model.gated_delta_rule(*map(wide, tensors), lengths, expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert_maths(ours, theirs)


@of_kernels
def test_by_chunks_a_step_takes_a_tenth_of_the_memory():
    """The definition keeps the states after each token; docs/internals/decisions.md has the numbers of 16 heads."""
    q, k = randn(0, 2, 512, 2, 128, dtype=torch.float32)
    v, log_decay, beta = randn(1, 512, 2, 128), -randn(2, 512, 2).exp(), randn(3, 512, 2).sigmoid()
    tensors = [tensor.float().requires_grad_() for tensor in (q, k / k.norm(dim=-1, keepdim=True), v, log_decay, beta)]
    ours, plain = (
        models.allocated(lambda: function(*tensors, [512])[0].sum().backward())[1]  # noqa: B023
        for function in (gated_delta_rule, gated_delta_rule.function)
    )
    assert ours < plain / 10


@either
@torch.no_grad()
def test_a_cache_changes_no_logits_of_200_tokens_in_memories_that_fade_slowly():
    model, lengths = tiny_model("qwen3.5"), [200, 90]
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter -= 5
    documents = token_ids(0, sum(lengths)).split(lengths)
    whole = model.lm_head(model.model(torch.cat(documents), Documents(lengths)))
    cache, logits = KVCache(model.config, 2, 200, CPU), [[], []]
    for step in range(111):  # 90 and 1 tokens, then one of each, until the first document ends
        first = [90, 1] if step == 0 else [1, int(step < 90)]
        starts = list(cache.lengths)
        cache.begin(first)
        new = [document[start : start + n] for document, start, n in zip(documents, starts, first, strict=True)]
        for own, part in zip(logits, model.lm_head(model.model(torch.cat(new), cache)).split(first), strict=True):
            own.append(part)
    assert_maths(torch.cat([*logits[0], *logits[1]]), whole)

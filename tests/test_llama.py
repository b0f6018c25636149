"""The decoder: Llama against the oracle, every family against frozen logits of transformers, and law 9: what lies
beside a document changes nothing in it.
"""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from minilora import ShapeError, llama
from minilora.llama import Documents
from minilora.models.gemma3 import GemmaNorm
from minilora.models.generate import KVCache
from minilora.testing import reference
from minilora.testing.compare import assert_maths, assert_parity, assert_precision
from tests import models, reference_model
from tests.golden.make_models import FILE, LENGTHS
from tests.models import document_lengths, either, families, randn, seeds, sizes, tiny_config, tiny_model, token_ids
from tests.reference_model import decoder_logits

CPU = torch.device("cpu")
few = models.examples(0.2)
LOW = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def attention_inputs(draw, longest=9, alike=(1, 2, 7), most_documents=3):
    """q, k, v, lengths and key_lengths of several documents, some of which are alike, and some have keys in a cache."""
    seed, kv_heads, group = draw(seeds), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, longest), st.integers(0, 4), st.sampled_from(alike))
    drawn = draw(st.lists(sizes, min_size=1, max_size=most_documents))
    lengths = [n for n, _, times in drawn for _ in range(times)]
    key_lengths = [n + past for n, past, times in drawn for _ in range(times)]
    q = randn(seed, sum(lengths), kv_heads * group, 3)
    k, v = (randn(seed + i, sum(key_lengths), kv_heads, 3) for i in (1, 2))
    return [q, k, v, lengths, key_lengths]


def wide(tensor):
    return tensor.detach().double().numpy()


@either
@given(seeds, sizes, sizes, sizes, st.sampled_from([1e-6, 0.5]))
def test_rms_norm_equals_the_loops(seed, n, heads, width, eps):
    x, weight = randn(seed, n, heads, width), randn(seed + 1, width)
    assert_maths(llama.rms_norm(x, weight, eps), reference_model.rms_norm(wide(x), wide(weight), eps))
    assert not llama.rms_norm(0 * x, weight, eps).any()


@either
@given(seeds, sizes, sizes)
def test_swiglu_equals_the_loops(seed, n, width):
    gate, up = 4 * randn(seed, n, width), randn(seed + 1, n, width)
    assert_maths(llama.swiglu(gate, up), reference_model.swiglu(wide(gate), wide(up)))


@st.composite
def rotations(draw, dtype=torch.float64):
    """x of N tokens, H heads and R + rest coordinates, and a rotation of R of them."""
    seed, n, heads, half, rest = draw(seeds), draw(sizes), draw(sizes), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    angles = 3 * randn(seed + 1, n, half)
    return [part.to(dtype) for part in (randn(seed, n, heads, 2 * half + rest), angles.cos(), angles.sin())]


@either
@given(rotations())
def test_rotate_is_a_product_of_complex_numbers(case):
    assert_maths(llama.rotate(*case), reference_model.rotate(*map(wide, case)))


@either
@given(seeds, sizes, sizes, st.integers(2, 9), st.booleans())
def test_cross_entropy_equals_the_loops_over_full_logits(seed, n, D, V, has_bias):
    head, labels = nn.Linear(D, V, has_bias).double(), token_ids(seed, n, high=V)
    models.fill_(head, seed)
    hidden = randn(seed, n, D)
    logits = head(hidden)
    assert_maths(llama.cross_entropy(hidden, labels, head), reference.cross_entropy(wide(logits), labels))


@either
@given(seeds, LOW)
def test_rms_norm_takes_its_mean_in_float32_and_rounds_before_the_weight(seed, dtype):
    x, weight = randn(seed, 9, 33, dtype=dtype), randn(seed + 1, 33, dtype=dtype)
    rounded = llama.rms_norm(x.float(), torch.ones(33), 1e-6).to(dtype)
    assert torch.equal(llama.rms_norm(x, weight, 1e-6), weight * rounded)


@either
@given(seeds, st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_norm_of_gemma_rounds_once(seed, dtype):
    norm, x = GemmaNorm(33, models.tiny_config("gemma3")).to(dtype), randn(seed, 9, 33, dtype=dtype)
    norm.weight.data.copy_(randn(seed + 1, 33))
    exact = reference_model.rms_norm(wide(x), 1 + wide(norm.weight), norm.eps)
    rounded = torch.from_numpy(exact).to(dtype)
    assert (norm(x) == rounded).float().mean() > 0.99  # the others are in the middle of two numbers, in float32


@either
@given(seeds, st.sampled_from([torch.bfloat16, torch.float16]))
def test_rotate_rounds_as_the_checkpoints_own_code_does(seed, dtype):
    x, angles = randn(seed, 9, 3, 8, dtype=dtype), randn(seed + 1, 9, 1, 4)
    a, b = x.chunk(2, dim=-1)
    cos, sin = (table.to(dtype) for table in (angles.cos(), angles.sin()))
    theirs = x * torch.cat((cos, cos), dim=-1) + torch.cat((-b, a), dim=-1) * torch.cat((sin, sin), dim=-1)
    assert torch.equal(llama.rotate(x, cos.squeeze(1), sin.squeeze(1)), theirs)


def own_logits(model, tokens, lengths):
    return [model(part.unsqueeze(0)).squeeze(0) for part in tokens.split(lengths)]


@either
@pytest.mark.parametrize("family", ["llama-no-gqa", models.WHOLE])
@few
@given(seeds, document_lengths, st.integers(10, 30))
def test_logits_equal_the_oracle(family, seed, lengths, longer):
    """Those of other families are transformers', also in float64: parity/test_models.py."""
    model, lengths = tiny_model(family, seed), [*lengths, longer]
    tokens = token_ids(seed, sum(lengths))
    hidden = model.model(tokens, Documents(lengths))
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    expected = []
    for part in tokens.split(lengths):
        # The model's own float32 tables: how exact they are is a law of test_rope.py, and float32 would hide the rest.
        rotation = [table.numpy() for table in model.config.rope.rotation([range(len(part))], CPU)]
        expected.append(torch.from_numpy(decoder_logits(tensors, model.config, part.tolist(), *rotation)))
    assert_maths(model.lm_head(hidden), torch.cat(expected))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_logits_equal_those_of_transformers_as_they_were_frozen(family):
    frozen, ours = load_file(FILE), tiny_model(family, dtype=torch.float32)
    with torch.no_grad():
        logits = ours.lm_head(ours.model(frozen[f"{family}.tokens"], Documents(LENGTHS)))
    assert_parity(logits, frozen[f"{family}.logits"])


@either
@families
@few
@given(seeds, document_lengths, st.randoms(use_true_random=False))
def test_documents_beside_each_other_do_not_see_each_other(family, seed, lengths, random):
    """Nor does their order matter."""
    model, tokens = tiny_model(family, seed), token_ids(seed, sum(lengths))
    alone = own_logits(model, tokens, lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    for documents in (range(len(lengths)), order):
        beside = torch.cat([tokens.split(lengths)[i] for i in documents])
        logits = model.lm_head(model.model(beside, Documents([lengths[i] for i in documents])))
        assert_maths(logits, torch.cat([alone[i] for i in documents]))


@few
@given(seeds, document_lengths, st.integers(0, 5))
def test_padding_changes_no_logits_and_has_none(seed, lengths, extra):
    model, width = tiny_model("mistral", seed), max(lengths) + extra
    tokens, padded = token_ids(seed, sum(lengths)), token_ids(seed + 1, len(lengths), width)  # padding is any token
    for row, part in zip(padded, tokens.split(lengths), strict=True):
        row[: len(part)] = part
    logits = model(padded, lengths)
    for ours, alone, n in zip(logits, own_logits(model, tokens, lengths), lengths, strict=True):
        assert_maths(ours[:n], alone)
        assert not ours[n:].any()


@st.composite
def pieces(draw):
    """Documents, and the number of tokens of each that each call is given."""
    calls, documents = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return [draw(st.lists(st.integers(1, 3), min_size=documents, max_size=documents)) for _ in range(calls)]


@families
@few
@given(seeds, pieces())
def test_a_cache_changes_no_logits_however_the_documents_are_split(family, seed, calls):
    model = tiny_model(family, seed)
    check_cache(model, calls, seed)


@pytest.mark.parametrize("family", ["ministral3", "olmo3"])
def test_a_cache_changes_no_logits_far_beyond_the_length_that_yarn_extends(family):
    check_cache(tiny_model(family), [[30, 1], *[[1, 1]] * 200])


def check_cache(model, calls, seed=0):
    """Compare with the logits of whole documents those of so many tokens of each in each call."""
    lengths = [sum(column) for column in zip(*calls, strict=True)]
    documents = token_ids(seed, sum(lengths)).split(lengths)
    cache = KVCache(model.config, len(lengths), max(lengths), CPU)
    rest, logits = [list(document) for document in documents], [[] for _ in documents]
    for call in calls:
        new = torch.stack([rest[i].pop(0) for i, n in enumerate(call) for _ in range(n)])
        cache.begin(call)
        for i, part in enumerate(model.lm_head(model.model(new, cache)).split(call)):
            logits[i].append(part)
    assert cache.lengths == lengths
    for ours, alone in zip(logits, own_logits(model, torch.cat(documents), lengths), strict=True):
        assert_maths(torch.cat(ours), alone)


@families
@pytest.mark.parametrize("checkpointing", ["mlp", "block"])
def test_recomputation_changes_no_bit_of_logits_and_gradients(family, checkpointing):
    model, lengths = tiny_model(family), [3, 17]
    tokens, labels = token_ids(1, 20), token_ids(2, 20)

    def outcome(mode):
        hidden = model.model(tokens, Documents(lengths), mode)
        loss = llama.cross_entropy(hidden, labels, model.lm_head)
        return hidden, *torch.autograd.grad(loss, list(model.parameters()))

    kept = outcome("none")
    assert all(gradient.any() for gradient in kept)
    assert all(map(torch.equal, outcome(checkpointing), kept))


@families
def test_autocast_is_as_exact_as_a_model_in_16_bits(family):
    lengths, tokens = [3, 17], token_ids(1, 20)

    def outcome(dtype, autocast=False):
        model, cache = tiny_model(family, dtype=dtype), KVCache(tiny_config(family), 2, 17, CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                cache.begin(lengths)
                held = model.lm_head(model.model(tokens, cache))
            logits = model.lm_head(model.model(tokens, Documents(lengths)))
        gradients = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
        return held, logits, torch.cat([gradient.flatten() for gradient in gradients])

    oracle, plain, found = outcome(torch.float64), outcome(torch.bfloat16), outcome(torch.float32, autocast=True)
    for actual, narrow, exact in zip(found, plain, oracle, strict=True):
        assert_precision(actual, narrow, exact)


@pytest.mark.parametrize(("checkpointing", "attention", "mlp"), [("none", 1, 1), ("mlp", 1, 2), ("block", 2, 2)])
def test_the_backward_pass_computes_again_what_checkpointing_names(checkpointing, attention, mlp):
    model, runs = tiny_model(), {"self_attn": 0, "mlp": 0}

    def count(name):
        runs[name] += 1

    for name in runs:
        getattr(model.model.layers[1], name).register_forward_pre_hook(lambda *_, name=name: count(name))
    model.model(token_ids(0, 5), Documents([5]), checkpointing).sum().backward()
    assert runs == {"self_attn": attention, "mlp": mlp}


def test_input_ids_and_lengths_of_a_wrong_shape_are_refused():
    model = tiny_model()
    for shape in ((5,), (1, 2, 3), (), (0, 3), (2, 0)):
        with pytest.raises(ShapeError, match="input_ids"):
            model(torch.zeros(shape, dtype=torch.long))
    for found in ([1, 2, 3], [[1, 2, 3]], "the cat"):
        with pytest.raises(ShapeError, match=rf"must be a nonempty tensor \(B, T\), found {re.escape(str(found))}"):
            model(found)
    for lengths in ([3], [3, 3, 3], [0, 3], [3, 5], [-1, 3]):
        with pytest.raises(ShapeError, match=r"2 numbers in 1..4"):
            model(token_ids(0, 2, 4), lengths)

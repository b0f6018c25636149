"""The decoder: every family against the oracle, and law 9: what lies beside a document changes nothing in it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import minilora as ml
from minilora import ShapeError
from minilora.adapters.attach import attach
from minilora.models import ops
from minilora.models.cache import KVCache
from minilora.models.llama import Llama
from minilora.testing import reference
from tests.golden.make_models import FILE, LENGTHS
from tests.models import (
    FAMILIES,
    MOST_DIFFERENT,
    SIZES,
    document_lengths,
    examples,
    families,
    long,
    randn,
    seeds,
    tiny_config,
    tiny_model,
    token_ids,
)
from tests.tolerance import assert_maths, assert_parity, assert_precision

CPU = torch.device("cpu")
few = examples(0.2)


def own_logits(model, tokens, lengths):
    """The logits of each document alone."""
    return [model(part.unsqueeze(0)).squeeze(0) for part in tokens.split(lengths)]


@families
@few
@given(seeds, document_lengths, st.integers(10, 30))
def test_logits_equal_the_oracle(family, seed, lengths, longer):
    model, lengths = tiny_model(family, seed), [*lengths, longer]
    tokens = token_ids(seed, sum(lengths))
    hidden = model.model(tokens, lengths)
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    expected = []
    for part in tokens.split(lengths):
        # The model's own float32 tables: how exact they are is a law of test_rope.py, and float32 would hide the rest.
        rotation = [table.numpy() for table in model.config.rope.rotation([range(len(part))], CPU)]
        expected.append(torch.from_numpy(reference.decoder_logits(tensors, model.config, part.tolist(), rotation)))
    assert_maths(model.lm_head(hidden), torch.cat(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_as_they_were_frozen(family):
    frozen, ours = load_file(FILE), tiny_model(family, dtype=torch.float32)
    with torch.no_grad():
        logits = ours.lm_head(ours.model(frozen[f"{family}.tokens"], LENGTHS))
    assert_parity(logits, frozen[f"{family}.logits"])


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
        logits = model.lm_head(model.model(beside, [lengths[i] for i in documents]))
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


@families
@few
@given(seeds, st.integers(1, 6), st.integers(1, 6))  # together not so many that a rotation would change
def test_later_tokens_change_no_earlier_logits(family, seed, before, after):
    model, tokens = tiny_model(family, seed), token_ids(seed, 1, before + after)
    assert_maths(model(tokens)[:, :before], model(tokens[:, :before]))


@st.composite
def pieces(draw):
    """Documents, and the number of tokens of each that each call is given."""
    calls, documents = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return [draw(st.lists(st.integers(1, 3), min_size=documents, max_size=documents)) for _ in range(calls)]


@families
@few
@given(seeds, pieces())
def test_a_cache_changes_no_logits_however_the_documents_are_split(family, seed, calls):
    model, lengths = tiny_model(family, seed), [sum(column) for column in zip(*calls, strict=True)]
    assert not model.config.rope.changes(1, max(lengths))  # or the cache would have to be filled anew: test_generate.py
    documents = token_ids(seed, sum(lengths)).split(lengths)
    cache = KVCache(model.config, len(lengths), max(lengths), torch.float64, CPU)
    rest, logits = [list(document) for document in documents], [[] for _ in documents]
    for call in calls:
        new = torch.stack([rest[i].pop(0) for i, n in enumerate(call) for _ in range(n)])
        for i, part in enumerate(model.lm_head(model.model(new, call, cache=cache)).split(call)):
            logits[i].append(part)
    assert cache.lengths == lengths
    for ours, alone in zip(logits, own_logits(model, torch.cat(documents), lengths), strict=True):
        assert_maths(torch.cat(ours), alone)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_a_rotation_changes_where_its_table_does(family):
    rope = tiny_config(family).rope
    for before in range(2, 30):
        cos, _ = rope.rotation([range(before)], CPU)
        for after in range(before, 30):
            assert rope.changes(before, after) != torch.equal(rope.rotation([range(after)], CPU)[0][:before], cos)


@families
@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputation_changes_no_bit_of_logits_and_gradients(family, recompute):
    model, lengths = tiny_model(family), [3, 17]
    tokens, labels = token_ids(1, 20), token_ids(2, 20)

    def outcome(mode):
        hidden = model.model(tokens, lengths, recompute=mode)
        loss = ops.cross_entropy(hidden, labels, model.lm_head)
        return hidden, *torch.autograd.grad(loss, list(model.parameters()))

    kept = outcome("none")
    assert all(gradient.any() for gradient in kept)
    assert all(map(torch.equal, outcome(recompute), kept))


@families
def test_under_autocast_logits_and_gradients_are_as_good_as_those_of_a_model_in_16_bits(family):
    lengths, tokens = [3, 17], token_ids(1, 20)

    def outcome(dtype, autocast=False):
        model, cache = tiny_model(family, dtype=dtype), KVCache(tiny_config(family), 2, 17, dtype, CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                held = model.lm_head(model.model(tokens, lengths, cache))
            logits = model.lm_head(model.model(tokens, lengths))
        gradients = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
        return held, logits, torch.cat([gradient.flatten() for gradient in gradients])

    oracle, plain, found = outcome(torch.float64), outcome(torch.bfloat16), outcome(torch.float32, autocast=True)
    for actual, narrow, exact in zip(found, plain, oracle, strict=True):
        assert_precision(actual, narrow, exact)


@pytest.mark.parametrize(("recompute", "attention", "mlp"), [("none", 1, 1), ("mlp", 1, 2), ("block", 2, 2)])
def test_the_backward_pass_computes_again_what_recompute_names(recompute, attention, mlp):
    model, runs = tiny_model(), {"self_attn": 0, "mlp": 0}

    def count(name):
        runs[name] += 1

    for name in runs:
        getattr(model.model.layers[1], name).register_forward_pre_hook(lambda *_, name=name: count(name))
    model.model(token_ids(0, 5), [5], recompute=recompute).sum().backward()
    assert runs == {"self_attn": attention, "mlp": mlp}


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_what_is_computed_again_stops_before_its_last_product(recompute):
    """Nothing needs it: it went into the next block long ago."""
    model, tokens = tiny_model(dtype=torch.float32), token_ids(0, 20)
    attach(model, ml.LoraConfig(r=3))
    blocks, x, config = model.model.layers, randn(1, 20, model.config.hidden_size, dtype=torch.float32), model.config

    def train(way):
        model.model(tokens, [3, 17], recompute=way).sum().backward()

    forward = {"mlp": lambda: [block.mlp(x) for block in blocks], "block": lambda: model.model(tokens, [3, 17])}
    left_out = (flop(forward[recompute]) - flop(train, recompute) + flop(train, "none")) / len(blocks)
    last = 2 * len(tokens) * config.intermediate_size * config.hidden_size
    assert last <= left_out <= last + 2 * len(tokens) * 3 * config.hidden_size  # of u Bᵀ not every PyTorch counts all


def flop(function, *args):
    """Of the matrix products."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("recompute", ["block", *long("none", "mlp")])
def test_the_trunk_is_compiled_as_one_graph_which_changes_nothing(recompute):
    model = tiny_model("mistral", dtype=torch.float32, num_hidden_layers=1)  # the compiler takes long
    compiled, parameters = torch.compile(model.model, backend="aot_eager", fullgraph=True), [*model.model.parameters()]
    for lengths in ([13, 7], [6, 6, 9]):
        results = []
        for trunk in (model.model, compiled):
            hidden = trunk(token_ids(0, sum(lengths)), lengths, recompute=recompute)
            results.append([hidden, *torch.autograd.grad(hidden.square().sum(), parameters)])
        for eager, ours in zip(*results, strict=True):
            assert_parity(ours, eager)


def test_a_tied_head_is_the_embedding():
    model = tiny_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_model("llama").lm_head.weight is not tiny_model("llama").model.embed_tokens.weight


def test_weights_are_drawn_by_the_generator_alone():
    def draw(seed):
        return Llama(tiny_config(), torch.Generator().manual_seed(seed)).state_dict()

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)
    drawn = torch.cat([tensor.flatten() for tensor in first.values() if tensor.dim() > 1])
    assert abs(drawn.std().item() / 0.02 - 1) < 6 / (2 * len(drawn)) ** 0.5  # six standard deviations


def test_input_ids_of_another_rank_or_without_tokens_are_refused():
    for shape in ((5,), (1, 2, 3), (), (0, 3), (2, 0)):
        with pytest.raises(ShapeError, match="input_ids"):
            tiny_model()(torch.zeros(shape, dtype=torch.long))


def test_lengths_that_do_not_fit_the_tokens_are_refused():
    for lengths in ([3], [3, 3, 3], [0, 3], [3, 5], [-1, 3]):
        with pytest.raises(ShapeError, match=r"2 numbers in 1..4"):
            tiny_model()(token_ids(0, 2, 4), lengths)
    for lengths in ([], [4], [2, 4], [6, -1]):
        with pytest.raises(ShapeError, match="5 tokens"):
            tiny_model().model(token_ids(0, 5), lengths)


def test_the_families_of_the_default_suite_have_every_switch_and_all_together_every_rotation():
    configs = [tiny_config(family) for family in MOST_DIFFERENT]
    for switch in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "is_fused", "tie_word_embeddings"):
        assert {getattr(config, switch) for config in configs} == {True, False}, switch
    assert {all(config.rotated) for config in configs} == {True, False}
    assert {config.head_dim * config.num_attention_heads == SIZES["hidden_size"] for config in configs} == {True, False}
    assert {window is None for config in configs for window in config.windows} == {True, False}
    kinds = {tiny_config(family).rope.kind for family in FAMILIES}
    assert kinds == {"default", "linear", "dynamic", "llama3", "longrope"}

"""Start values from data: they are what the papers say, they change nothing, and nothing else of the model changes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora import ConfigError, LoraConfig, TrainingError, attach, llama
from minilora.adapter import adapter_layers
from minilora.adapters import from_data
from minilora.adapters.from_data import corda_factors, data_factors, gradient_factors, redistribute, redistributed
from minilora.adapters.initialize import factors_from_weight
from minilora.lora import AdapterLinear
from minilora.nf4 import NF4Linear
from minilora.testing.compare import assert_maths, relative
from tests.models import best_of_rank, fill_, generator, randn, scales, seeds, sizes, tiny_model, token_ids

KINDS = ("eva", "corda", "lora_ga")
WIDTHS = (7, 9, 8)  # of the inputs of `up`, those of `down`, and the outputs


class Small(nn.Module):
    """Two linears, the output of the first of which is changed in place."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTHS[0])
        self.up = nn.Linear(WIDTHS[0], WIDTHS[1])
        self.down = nn.Linear(WIDTHS[1], WIDTHS[2], bias=False)
        fill_(self, seed)
        self.to(dtype)

    def forward(self, x):
        y = self.up(self.norm(x))
        y += 1
        return self.down(y.tanh())

    def loss(self, x):
        return self(x).square().mean()


def targets(model, r=2, scale=2.0, paths=("up", "down")):
    modules = {path: model.get_submodule(path) for path in paths}
    layers = {path: AdapterLinear(module, path) for path, module in modules.items()}
    return layers, LoraConfig(r=r, lora_alpha=r * scale)


def batches(seed=0, sizes=(5, 3, 9), dtype=torch.float64):
    return [randn(seed + i, 2, size, WIDTHS[0], dtype=dtype) for i, size in enumerate(sizes)]


def start(kind, model, data=None, r=2, scale=2.0, **more):
    losses = (model.loss(x) for x in (batches() if data is None else data))
    return data_factors(kind, model, *targets(model, r, scale, **more), losses, generator())


def best(M, r):
    return best_of_rank(M, r)[0]


def assert_alike(ours, expected):
    """Pairs of factors by path, but for signs."""
    assert ours.keys() == expected.keys()
    for path, pair in ours.items():
        for our, other in zip(pair, expected[path], strict=True):
            assert relative(our.abs(), other.abs(), 1e-9) < 1


def inputs(model, data):
    """What the linears see, path -> (N, in), by hand."""
    rows = torch.cat([x.reshape(-1, WIDTHS[0]) for x in data])
    x = F.layer_norm(rows, WIDTHS[:1], model.norm.weight, model.norm.bias)
    hidden = (F.linear(x, model.up.weight, model.up.bias) + 1).tanh()
    return {"up": x.detach().numpy(), "down": hidden.detach().numpy()}


@given(seeds)
def test_eva_s_a_are_the_right_singular_vectors_of_all_inputs_and_b_is_zero(seed):
    model, data = Small(seed), batches(seed)
    factors = start("eva", model, data, r=3)
    for path, X in inputs(model, data).items():
        lora_A, lora_B = factors[path]
        V = np.linalg.svd(X)[2][: len(lora_A)]
        signs = np.sign((lora_A.numpy() * V).sum(1, keepdims=True))
        assert relative(lora_A, signs * V, 1e-9) < 1  # squares of values lose half of the digits of the smaller ones
        assert lora_B.shape == (model.get_submodule(path).out_features, len(lora_A))
        assert not lora_B.any()


@given(seeds, sizes, sizes)
def test_principal_directions_are_orthonormal_and_their_values_squared_singular_values(seed, rows, inner):
    x = randn(seed, rows, inner)
    vectors, values = from_data.principal_directions(x.T @ x)
    assert_maths(vectors.T @ vectors, np.eye(inner))
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    S = np.zeros(inner)
    S[: min(rows, inner)] = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    assert_maths(values, S)


@pytest.mark.parametrize("kind", KINDS)
def test_how_rows_are_put_into_batches_does_not_matter(kind):
    model, data = Small(), batches(sizes=(6, 6))
    # means of losses over as many rows differ by one factor, which cancels
    assert_alike(start(kind, model, [torch.cat(data)]), start(kind, model, data))


shares_of_layers = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=5)


@given(shares_of_layers, st.integers(1, 4))
def test_ranks_go_where_the_shares_are_largest_up_to_twice_and_no_more_than_before_in_all(all_shares, r):
    shares = {f"{i}": torch.tensor(sorted(values, reverse=True)) for i, values in enumerate(all_shares)}
    before = dict.fromkeys(shares, r)
    ranks = redistribute(shares, before)
    most = {path: min(2 * r, len(values)) for path, values in shares.items()}
    assert ranks.keys() == shares.keys()
    assert all(0 <= ranks[path] <= most[path] for path in ranks)
    assert sum(ranks.values()) == min(r * len(shares), sum(most.values()))
    taken = [shares[path][ranks[path] - 1] for path in ranks if ranks[path]]
    left = [shares[path][ranks[path]] for path in ranks if ranks[path] < most[path]]
    assert not left or min(taken) >= max(left)


def test_of_equal_shares_the_first_layer_s_count():
    shares = {path: torch.tensor([0.6, 0.3, 0.1]) for path in "qkv"}
    assert redistribute(shares, dict.fromkeys("qkv", 1)) == {"q": 1, "k": 1, "v": 1}
    assert redistribute(shares, {"q": 2, "k": 1, "v": 2}) == {"q": 2, "k": 2, "v": 1}


def test_a_layer_that_gets_no_rank_is_left_out_and_another_gets_what_it_had():
    model = Small()
    few = torch.eye(7, dtype=torch.float64), torch.eye(9, dtype=torch.float64)[[0, 4]]  # shares of 1/7 and of 1/2
    losses = (model.up(x).sum() + model.down(z).sum() for x, z in [few])
    factors = data_factors("eva", model, *targets(model, r=1), losses, generator())
    assert factors.keys() == {"down"}
    assert len(factors["down"][0]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_may_be_called_by_its_argument_s_name(kind):
    model = nn.Sequential(nn.Linear(7, 9))
    whole = {"0": AdapterLinear(model[0], "0")}, LoraConfig(r=2, lora_alpha=4)
    x = randn(0, 20, 7, dtype=torch.float32)
    by_name, by_place = (
        data_factors(kind, model, *whole, (loss() for _ in range(1)), generator())["0"]
        for loss in (lambda: model[0](input=x).square().sum(), lambda: model[0](x).square().sum())
    )
    assert all(map(torch.equal, by_name, by_place))


def test_the_config_of_redistributed_ranks_means_these_layers_with_these_ranks_and_scales():
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"b": 2}, alpha_pattern={"b": 6}, exclude_modules="x")
    found = redistributed(config, {"m.a": 6, "m.b": 1, "m.c": 4})
    assert found.target_modules == ("m.a", "m.b", "m.c")
    assert found.exclude_modules == ()
    assert [found.rank(path) for path in ("m.a", "m.b", "m.c")] == [6, 1, 4]
    assert [found.alpha(path) for path in ("m.a", "m.b", "m.c")] == [12, 3, 8]
    assert set(found.rank_pattern) == {"^m.a", "^m.b"}


@given(seeds, scales)
def test_corda_s_b_a_is_the_first_part_of_the_weight_as_inputs_weigh_it(seed, scale):
    model, data = Small(seed), batches(seed)
    factors = start("corda", model, data, scale=scale)
    for path, X in inputs(model, data).items():
        C = X.T @ X
        C += 0.01 * np.trace(C) / len(C) * np.eye(len(C))
        weight = model.get_submodule(path).weight.detach().numpy()
        lora_A, lora_B = factors[path]
        assert relative(scale * lora_B @ lora_A, best(weight @ C, 2) @ np.linalg.inv(C), 1e-9) < 1
        mean = np.trace(C) / len(C)
        assert relative(lora_B.square().sum(0), np.linalg.svd(weight @ C / mean)[1][:2] / scale, 1e-9) < 1


@given(seeds, sizes, sizes, sizes, scales, st.sampled_from([0.01, 1.0, 300.0]))
def test_corda_of_inputs_alike_in_all_directions_is_pissa_whatever_their_size(seed, inner, outer, r, scale, size):
    assume(r <= min(inner, outer))
    weight = randn(seed, outer, inner)
    ours = corda_factors(weight, size * torch.eye(inner, dtype=torch.float64), r, scale)
    for our, pissa in zip(ours, factors_from_weight("pissa", weight, r, scale, generator()), strict=True):
        assert_maths(our.abs(), pissa.abs())


@given(seeds, sizes, sizes, scales)
def test_corda_of_full_rank_is_the_weight(seed, inner, outer, scale):
    weight, x = randn(seed, outer, inner), randn(seed + 1, 3, inner)
    lora_A, lora_B = corda_factors(weight, x.T @ x, min(inner, outer), scale)
    assert lora_A.is_contiguous()
    assert relative(scale * lora_B @ lora_A, weight, 1e-9) < 1  # C is near to singular


@given(seeds, st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), scales)
def test_a_first_step_of_lora_ga_is_the_best_of_rank_2r_for_a_step_of_the_weight(seed, wider, taller, r, scale):
    inner, outer = 2 * r + wider, 2 * r + taller
    G = randn(seed, outer, inner)
    lora_A, lora_B = gradient_factors(G, r, generator(seed))
    dA, dB = scale * lora_B.T @ G, scale * G @ lora_A.T  # law 5
    zeta = outer**0.25 / 4
    assert_maths(scale * (dB @ lora_A + lora_B @ dA), (scale * zeta) ** 2 * best(G, 2 * r))


def test_lora_ga_has_as_many_parts_as_its_rank_also_of_large_weights():
    lora_A, lora_B = gradient_factors(randn(0, 70, 60), 20, generator())
    assert (lora_A.shape, lora_B.shape) == ((20, 60), (70, 20))
    assert lora_A.is_contiguous()
    assert lora_B.is_contiguous()


@given(seeds)
def test_lora_ga_takes_the_gradient_of_all_losses_together(seed):
    model, data = Small(seed), batches(seed)
    sum(model.loss(x) for x in data).backward()
    expected = {path: model.get_submodule(path).weight.grad.clone() for path in ("up", "down")}
    factors = start("lora_ga", model, data)
    for path, G in expected.items():
        lora_A, lora_B = factors[path]
        first, second = best(G, 2), best(G, 4) - best(G, 2)
        zeta = len(G) ** 0.25 / 4
        assert relative(G @ lora_A.T @ lora_A, zeta**2 * first, 1e-9) < 1
        assert relative(lora_B @ lora_B.T @ G, zeta**2 * second, 1e-9) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_four_bits_start_as_the_dense_ones_that_they_stand_for(kind):
    dense, model = Small(), Small()
    for path in ("up", "down"):
        linear = dense.get_submodule(path)
        base = NF4Linear.quantize(linear.weight.detach(), linear.bias)
        model.set_submodule(path, base)
        linear.weight = nn.Parameter(base.weight)
    assert_alike(start(kind, model), start(kind, dense))


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_ga_through_recomputed_layers_is_the_same(reentrant):
    model = Small()
    losses = (checkpoint(model.loss, x.requires_grad_(), use_reentrant=reentrant) for x in batches())
    assert_alike(data_factors("lora_ga", model, *targets(model), losses, generator()), start("lora_ga", model))


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "block"])
def test_lora_ga_sees_every_linear_of_our_decoder_through_its_own_backward_passes(checkpointing):
    def loss(model, tokens):
        return llama.cross_entropy(model.model(tokens, [4, 6], checkpointing=checkpointing), tokens, model.lm_head)

    model, rows = tiny_model(num_hidden_layers=2), [token_ids(i, 10) for i in range(3)]
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    sum(loss(model, tokens) for tokens in rows).backward()
    gradients = {path: linear.weight.grad.clone() for path, linear in linears.items()}
    model.requires_grad_(False)
    losses = (loss(model, tokens) for tokens in rows)
    factors = data_factors("lora_ga", model, *targets(model, paths=linears), losses, generator())
    for path, G in gradients.items():
        lora_A, _ = factors[path]
        assert relative(G @ lora_A.T @ lora_A, len(G) ** 0.5 / 16 * best(G, 2), 1e-6) < 1


@pytest.mark.parametrize("kind", KINDS)
@given(seeds, scales)
def test_an_adapter_of_a_model_begins_with_these_factors_and_changes_nothing(kind, seed, scale):
    model, (x, *_) = Small(seed), batches()
    expected, y = start(kind, model, scale=scale), model(x)
    config = LoraConfig(r=2, lora_alpha=2 * scale, target_modules=("up", "down"), init_lora_weights=kind)
    attach(model, config, dtype=torch.float64, losses=(model.loss(x) for x in batches()))
    layers = adapter_layers(model)
    assert layers.keys() == expected.keys()
    for path, layer in layers.items():
        adapter = layer.adapters["default"]
        assert adapter.scale == scale
        for factor, other in zip((adapter.lora_A, adapter.lora_B), expected[path], strict=True):
            assert_maths(factor, other)
    assert_maths(model(x), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(kind, fails):
    model = Small().train()
    model.norm.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.up.weight.grad = torch.ones_like(model.up.weight)

    def losses():
        yield model.loss(batches()[0])
        if fails:
            raise KeyError("data")
        yield model.loss(batches()[1])

    with pytest.raises(KeyError) if fails else nullcontext():
        data_factors(kind, model, *targets(model), losses(), generator())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True]
    assert torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert model.down.weight.grad is None
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["eva", "corda"])
def test_what_needs_no_gradient_keeps_none(kind):
    model, needed = Small(), []

    def losses():
        for x in batches():
            needed.append(model.loss(x).requires_grad)
            yield torch.zeros(())

    data_factors(kind, model, *targets(model), losses(), generator())
    assert not any(needed)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_a_bfloat16_model_are_float32_and_near_those_of_float64(kind):
    # EVA has nearly equal values here and CorDA a matrix that amplifies errors, so it is the shares that are compared.
    low = start(kind, Small(dtype=torch.bfloat16), batches(dtype=torch.bfloat16), r=1)
    exact = start(kind, Small(), r=1)
    for path, (lora_A, lora_B) in low.items():
        assert {(factor.dtype, factor.requires_grad) for factor in (lora_A, lora_B)} == {(torch.float32, False)}
        one, other = lora_A[0].double(), exact[path][0][0]
        assert (one @ other).abs() > 0.99 * one.norm() * other.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_factors(kind):
    first, second = start(kind, Small()), start(kind, Small())
    assert all(torch.equal(a, b) for path in first for a, b in zip(first[path], second[path], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_were_computed_before_are_refused(kind):
    model = Small().requires_grad_(False)
    losses = [model.loss(x) for x in batches()]
    with pytest.raises((TrainingError, ConfigError), match="computed when"):
        data_factors(kind, model, *targets(model), losses, generator())


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_nothing_reaches_is_refused(kind):
    model = Small()
    model.idle = nn.Linear(4, 4)
    with_zeros = (model.loss(x) + model.idle(torch.zeros(3, 4)).sum() for x in batches())
    for losses in ((model.loss(x) for x in batches()), with_zeros):
        with pytest.raises(TrainingError, match=r"\['idle'\] saw nothing but zeros"):
            data_factors(kind, model, *targets(model, paths=("up", "idle")), losses, generator())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite_are_refused(kind):
    data = batches()
    data[1][0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"\['up', 'down'\].* not finite"):
        start(kind, Small(), data)


@pytest.mark.parametrize(("kind", "r", "most"), [("corda", 8, 7), ("lora_ga", 4, 3)])
def test_a_rank_that_a_layer_has_not_is_refused_before_the_data_are_read(kind, r, most):
    model = Small()
    losses = iter([torch.zeros(())])
    with pytest.raises(ConfigError, match=f"up: {kind} can give a weight of 9 x 7 at most rank {most}; found r = {r}"):
        data_factors(kind, model, *targets(model, r), losses, generator())
    assert len(list(losses)) == 1


def test_layers_that_are_no_linears_are_refused():
    config = LoraConfig(target_modules=("0",), init_lora_weights="eva")
    with pytest.raises(ConfigError, match="0: init_lora_weights 'eva' is for linears, found Embedding"):
        attach(nn.Sequential(nn.Embedding(3, 4)), config)

"""Laws 1 and 2 for every base: forward is the merged weight applied, whatever the adapters; a new one is nothing."""

import functools

import pytest
import torch
from hypothesis import given
from torch import nn

from minilora import LoraConfig, attach
from minilora.adapter import own_parameters
from minilora.adapters.layers import as_matrix
from minilora.runs.sampler import SeededDropout, hash_seed
from minilora.testing.compare import MATHS, assert_maths, assert_precision, relative
from tests.adapters import LAYERS, adapted, add, applied_by_loops, bias_of, merged_by_loops, place
from tests.models import KERNELS, either, examples, matrix, randn, scales, seeds

each_layer = pytest.mark.parametrize("kind", LAYERS)
each_class = pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])


def kinds(test, share=0.5):
    """The test for each kind of layer on its own, with a share of the examples, with kernels and without."""

    @either
    @each_layer
    def each(kind):
        examples(share)(given(adapted((kind,)))(test))()

    each.__name__, each.__doc__ = test.__name__, test.__doc__
    return each


@functools.partial(kinds, share=1)
def test_forward_is_the_merged_weight_applied(case):
    layer = case.layer
    assert_maths(layer(case.x), case.applied(layer.weight, bias_of(layer)))


@kinds
def test_gradients_are_those_of_the_merged_weight_applied(case):
    layer, x = case.layer, case.x
    inputs = [*layer.adapters.parameters(), *([x.requires_grad_()] if x.is_floating_point() else [])]
    y, merged = layer(x), case.applied(layer.weight, bias_of(layer))
    dy = randn(7, *y.shape)
    ours, expected = (torch.autograd.grad(each, inputs, dy, allow_unused=True) for each in (y, merged))
    for our, their in zip(ours, expected, strict=True):
        assert (our is None) == (their is None)  # a bias that a later adapter's takes the place of
        if our is not None:
            assert_maths(our, their)


@kinds
def test_forward_and_merged_weight_equal_the_loops(case):
    layer, merged = case.layer, case.layer.weight
    matrix, bias = merged_by_loops(layer)
    assert_maths(as_matrix(layer.base, merged), matrix)
    assert (bias_of(layer) is None) == (bias is None)
    if bias is not None:
        assert_maths(bias_of(layer), bias)
    assert_maths(layer(case.x), applied_by_loops(layer, case.x))


@matrix(3, dtype=(torch.float32, torch.bfloat16), kind=LAYERS, use_dora=(False, True))
@examples(0.1)
@given(seed=seeds, scale=scales)
def test_in_low_precision_forward_is_as_good_as_pytorch_with_the_merged_weight(kind, use_dora, dtype, seed, scale):
    """Of ten layers together: of one alone, PyTorch's largest error is now and then a quarter of the usual one."""
    results = []
    for i in range(10):
        case = place(kind, seed + i, 40, 24, dtype=dtype)
        add(case.layer, "new", seed + i, 8, scale, use_dora, lora_bias=True, dtype=torch.float32)
        y, plain = case.layer(case.x), case.applied(case.layer.weight, bias_of(case.layer))
        assert y.dtype == dtype
        results.append((y, plain, torch.from_numpy(applied_by_loops(case.layer, case.x))))
    assert_precision(*map(torch.stack, zip(*results, strict=True)))


@each_class
@each_layer
@examples(0.3)
@given(seeds, scales)
def test_the_merged_weight_of_a_bfloat16_base_is_rounded_once(kind, use_dora, seed, scale):
    layer = place(kind, seed, dtype=torch.bfloat16).layer
    add(layer, "new", seed, 2, scale, use_dora, dtype=torch.float32)
    matrix, _ = merged_by_loops(layer)
    merged = layer.weight
    assert merged.dtype == torch.bfloat16
    exact = torch.from_numpy(matrix)
    assert_precision(as_matrix(layer.base, merged), exact.bfloat16(), exact)


@each_class
@each_layer
def test_the_base_gets_no_gradient_and_is_no_parameter_of_the_adapter(kind, use_dora):
    case = place(kind, 0)
    add(case.layer, "new", 1, 2, 7.0, use_dora, bias=True)
    before = {name: tensor.clone() for name, tensor in case.layer.base.state_dict().items()}
    case.layer(case.x).sum().backward()
    assert all(parameter.grad is None for parameter in case.layer.base.parameters())
    assert all(parameter.grad.any() for parameter in own_parameters(case.layer, "new"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.layer.base.state_dict().items())


def test_padding_of_an_embedding_is_not_adapted_by_training():
    """Its row of the base gets no gradient in PyTorch, either."""
    case = place("embedding", 0, padding_idx=1)
    add(case.layer, "new", 1, 2, 7.0)
    case.layer(torch.tensor([0, 1, 2])).sum().backward()
    assert not case.layer.adapters["new"].lora_A.grad[:, 1].any()
    assert case.layer.adapters["new"].lora_A.grad[:, 0].all()


@matrix(3, kind=LAYERS, use_dora=(False, True), _kernels=KERNELS)
@examples(0.3)
@given(seed=seeds)
def test_dropout_is_keyed_and_tends_to_nothing_as_p_does(kind, use_dora, seed):
    case = place(kind, seed)
    layer = case.layer
    add(layer, "new", seed, 2, 0.5, use_dora)
    adapter, whole = layer.adapters["new"], layer(case.x)

    def trained(p, key):
        adapter.dropout = SeededDropout(p)
        adapter.dropout.seed = hash_seed(key)
        return layer.train()(case.x)

    assert torch.equal(trained(0.5, "0/0"), trained(0.5, "0/0"))
    assert not torch.equal(trained(0.5, "0/0"), trained(0.5, "0/1"))
    assert_maths(trained(1e-13, "0/0"), whole)
    assert torch.equal(layer.eval()(case.x), whole)


@either
@each_class
def test_dropout_of_an_embedding_drops_whole_tokens(use_dora):
    layer = place("embedding", 0, 50).layer
    add(layer, "new", 1, 2, 7.0, use_dora)
    adapter, ids, p = layer.adapters["new"], torch.arange(50), 0.5
    adapter.dropout = SeededDropout(p)
    adapter.dropout.seed = hash_seed("0/0")
    whole = (layer.base.weight.T + adapter.scale / (1 - p) * (adapter.lora_B @ adapter.lora_A)).T
    k = adapter.rescale(torch.ones_like(adapter.magnitude), layer.base.weight.T) if use_dora else 1
    y = layer.train()(ids)
    is_dropped = torch.tensor(
        [relative(row, k * base, MATHS) <= 1 for row, base in zip(y, layer.base.weight, strict=True)]
    )
    assert_maths(y[~is_dropped], (k * whole)[~is_dropped])
    assert 10 < is_dropped.sum() < 40


@matrix(
    5,
    dtype=(torch.float32, torch.bfloat16),
    init=(True, "gaussian", "pissa"),
    kind=LAYERS,
    use_dora=(False, True),
    _kernels=KERNELS,
)
def test_a_new_adapter_changes_nothing_and_can_be_trained(kind, use_dora, init, dtype):
    """To the bit where B = 0; of B A - B₀ A₀ the order of the sums is left."""
    case = place(kind, 3, 12, 8, dtype=dtype)
    model, base = nn.ModuleDict({"layer": case.layer.base}), case.layer.base(case.x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("layer",), init_lora_weights=init, use_dora=use_dora)
    attach(model, config, seed=1)
    y = model["layer"](case.x)
    adapter = model["layer"].adapters["default"]
    assert all(factor.dtype == torch.float32 for factor in (adapter.lora_A, adapter.lora_B))
    if init in (True, "gaussian") and not use_dora:
        assert torch.equal(y, base)
        assert torch.equal(model["layer"].weight, model["layer"].base.weight)
    else:
        assert_precision(y, base, applied_by_loops(case.layer, case.x))
    y.sum().backward()
    assert any(factor.grad.any() for factor in adapter.parameters() if factor.dim() == 2)

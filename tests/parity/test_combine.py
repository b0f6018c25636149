"""What we combine is what PEFT's `add_weighted_adapter` makes of the same adapters, but for what is wrong there."""

import pytest
import torch
from torch import nn

from minilora.lora.combine import Factors, combine
from minilora.lora.combine_config import CombineConfig
from minilora.lora.functional import lora_delta
from minilora.lora.weighted_files import combine_directories
from tests.models import randn
from tests.tolerance import assert_parity, relative

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

WIDTHS = {"first": (12, 9), "second": (7, 12), "third": (8, 7)}  # module -> (out, in)
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("cat", "svd", "linear", *PRUNED, *(f"{kind}_svd" for kind in PRUNED))


def their_model(configs):
    """Plain linears with adapters of random numbers."""
    base = nn.Sequential()
    for name, (outer, inner) in WIDTHS.items():
        base.add_module(name, nn.Linear(inner, outer))
    names = list(configs)
    model = peft.get_peft_model(base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(randn(seed, *parameter.shape))
    return model


def layers(model):
    found = model.base_model.model.named_children()
    return {name: layer for name, layer in found if isinstance(layer, peft.tuners.lora.LoraLayer)}


def factors(model, adapter):
    """Their adapter as ours take it."""
    return {
        path: Factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for path, layer in layers(model).items()
        if adapter in layer.lora_A
    }


def config(r=3, lora_alpha=7, target_modules=tuple(WIDTHS), **options):
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=list(target_modules), **options)


def both(monkeypatch, configs, weights, kind, svd_rank=None, **options):
    """Module -> our ΔW and theirs."""
    model, generator, bernoulli = their_model(configs), torch.Generator().manual_seed(5), torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda input: bernoulli(input, generator=generator))  # their drops are ours
    model.add_weighted_adapter(list(configs), weights, "sum", kind, svd_rank=svd_rank, **options)
    monkeypatch.undo()
    wanted = CombineConfig(kind, svd_rank=svd_rank, seed=5, **options)
    ours = combine([factors(model, name) for name in configs], weights, wanted)
    theirs = {path: layer.get_delta_weight("sum") for path, layer in layers(model).items() if "sum" in layer.lora_A}
    assert ours.keys() == theirs.keys()
    return {path: (lora_delta(*ours[path].factors), theirs[path]) for path in theirs}


def options_of(kind):
    return {"density": 0.6} if kind.startswith(PRUNED) else {}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [2.0, -0.5]])
def test_every_type_makes_what_peft_makes(monkeypatch, kind, weights):
    for ours, theirs in both(
        monkeypatch, {"A": config(), "B": config(lora_alpha=2)}, weights, kind, **options_of(kind)
    ).values():
        assert_parity(ours, theirs)


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_signs_are_elected_by_frequency_too(monkeypatch, kind):
    three = {"A": config(), "B": config(lora_alpha=2), "C": config(lora_alpha=20)}
    for ours, theirs in both(
        monkeypatch, three, [0.7, 0.3, 1.2], kind, majority_sign_method="frequency", density=0.6
    ).values():
        assert_parity(ours, theirs)


@pytest.mark.parametrize("kind", ["cat", "svd", *(f"{kind}_svd" for kind in PRUNED)])
def test_ranks_and_modules_may_differ(monkeypatch, kind):
    two = {"A": config(r=2, rank_pattern={"first": 4}), "B": config(lora_alpha=2, target_modules=("second", "first"))}
    for ours, theirs in both(
        monkeypatch, two, [0.7, 0.3], kind, svd_rank=4 if "svd" in kind else None, **options_of(kind)
    ).values():
        assert_parity(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", *PRUNED])
def test_types_on_factors_take_other_modules_too(monkeypatch, kind):
    two = {"A": config(target_modules=("first", "third")), "B": config(lora_alpha=2, target_modules=("first",))}
    for ours, theirs in both(monkeypatch, two, [0.7, 0.3], kind, **options_of(kind)).values():
        assert_parity(ours, theirs)


def exact(model, weights):
    return {
        path: sum(w * layer.get_delta_weight(name) for name, w in weights.items() if name in layer.lora_A)
        for path, layer in layers(model).items()
    }


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_of_rslora_are_not_scaled_twice(kind):
    """PEFT keeps `use_rslora` for the sum, whose scale then is √r instead of 1."""
    weights = {"A": 0.7, "B": 0.3}
    model = their_model({name: config(use_rslora=True) for name in weights})
    rank = 6 if kind == "svd" else None
    ours = combine([factors(model, name) for name in weights], [0.7, 0.3], CombineConfig(kind, svd_rank=rank))
    model.add_weighted_adapter(list(weights), [0.7, 0.3], "sum", kind, svd_rank=rank)
    for path, expected in exact(model, weights).items():
        assert_parity(lora_delta(*ours[path].factors), expected)
        assert relative(layers(model)[path].get_delta_weight("sum"), expected, 0.1) > 10


def test_one_adapter_alone_is_cut_as_asked():
    """PEFT takes another type for one adapter, whatever is asked for."""
    model = their_model({"A": config()})
    ours = combine([factors(model, "A")], [0.7], CombineConfig("svd", svd_rank=1))
    model.add_weighted_adapter(["A"], [0.7], "cut", "svd", svd_rank=1)
    for path, layer in layers(model).items():
        U, sigma, Vt = torch.linalg.svd(0.7 * layer.get_delta_weight("A"))
        assert_parity(lora_delta(*ours[path].factors), sigma[0] * U[:, :1] @ Vt[:1])
        assert torch.linalg.matrix_rank(layer.get_delta_weight("cut")) == 3


def small_model():
    """An embedding, a convolution and linears, that can be run."""
    layers = [nn.Embedding(9, 6), nn.Linear(6, 7), nn.Conv1d(5, 4, 3), nn.Linear(5, 8)]  # of sequences of 5 tokens
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(seed, *parameter.shape))
    return model


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_loads_files_of_its_own_that_we_combined_to_the_outputs_of_its_own_sum(tmp_path, kind):
    other = "2" if kind == "cat" else "3"  # its svd takes no convolution in one dimension
    two = {"A": config(r=2, target_modules=("0", "1", "3")), "B": config(lora_alpha=2, target_modules=("1", other))}
    model = peft.get_peft_model(small_model(), two["A"], adapter_name="A")
    model.add_adapter("B", two["B"])
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(randn(seed + 20, *parameter.shape))
    model.save_pretrained(tmp_path)
    rank = {"svd_rank": 4} if kind == "svd" else {}
    combine_directories([tmp_path / "A", tmp_path / "B"], [0.7, -0.3], tmp_path / "out", CombineConfig(kind, **rank))
    ours, tokens = peft.PeftModel.from_pretrained(small_model(), tmp_path / "out"), torch.tensor([[3, 1, 4, 1, 5]])
    model.add_weighted_adapter(["A", "B"], [0.7, -0.3], "sum", kind, **rank)
    model.set_adapter("sum")
    assert_parity(ours(tokens), model(tokens))

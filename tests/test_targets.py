import pytest
import torch
from torch import nn

from minilora import LoraConfig, TargetError, attach
from minilora.adapters.attach import find_target_modules
from tests.models import tiny_model
from tests.targets import TARGETS


def module(**children):
    """A module of these children; numbers are the sizes of linears."""
    found = nn.Module()
    for name, child in children.items():
        found.add_module(name, nn.Linear(child, child) if isinstance(child, int) else child)
    return found


def layers(make):
    return nn.ModuleList(make() for _ in range(2))


def mixer():
    found = module(in_proj=2, x_proj=2, out_proj=2)
    found.A_log, found.D = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    return found


# what the model is like -> the model, the names
MODELS = {
    "a decoder": (lambda: module(layers=layers(lambda: module(attn=module(q=2), up=2)), head=2), ["q", "up"]),
    "one layer": (lambda: module(layers=nn.ModuleList([module(up=2)]), head=2), ["up"]),
    "a name that the head has too": (
        lambda: module(layers=layers(lambda: module(mlp=module(dense=2))), pooler=module(dense=2)),
        ["mlp.dense"],
    ),
    "a name that ends like another": (lambda: module(layers=layers(lambda: module(up=2)), pre_up=2), ["up"]),
    "a name that something else has": (
        lambda: module(layers=layers(lambda: module(mlp=module(proj=2))), image=module(proj=nn.Conv1d(1, 1, 1))),
        ["mlp.proj"],
    ),
    "linears without a name": (
        lambda: module(layers=layers(lambda: module(mlp=nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))),
        ["mlp.0", "mlp.2"],
    ),
    "a head of several linears": (
        lambda: module(layers=layers(lambda: module(up=2)), classifier=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        ["up"],
    ),
    "a Mamba mixer": (
        lambda: module(layers=layers(lambda: module(mixer=mixer(), out_proj=2))),
        ["in_proj", "layers.0.out_proj", "layers.1.out_proj"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_shortest_names_for_the_linears_of_the_layers(case):
    make, expected = MODELS[case]
    assert find_target_modules(make()) == expected


def test_a_model_without_layers_has_none():
    with pytest.raises(TargetError, match="no linears in numbered layers"):
        find_target_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_our_decoder_is_adapted_as_a_llama():
    model = tiny_model()
    found = find_target_modules(model)
    assert found == sorted(TARGETS["llama"].linears)
    attach(model, LoraConfig(target_modules=found))
    assert find_target_modules(model) == found

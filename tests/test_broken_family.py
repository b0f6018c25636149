"""What an outsider broke in the family of adapters, and what is to happen instead."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import minilora as ml
from minilora import LoraConfig, files
from minilora.adapter import adapter_layers
from minilora.adapters.modules_to_save import ModulesToSave
from minilora.files import write_json, write_tensors
from minilora.testing.compare import assert_maths, assert_parity
from tests.models import fill_, randn


class Tied(nn.Module):
    """An embedding, a linear between, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        fill_(self.double(), 0)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))

    def get_input_embeddings(self):
        return self.embed


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def _fill_(model, seed):
    trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    fill_(trained, seed)


def _adapted(**adapters):
    """A model, and what it computes with each adapter alone."""
    model = Tied().eval()
    for seed, (name, config) in enumerate(adapters.items(), start=1):
        ml.attach(model, config, name, dtype=torch.float64)
        _fill_(model, seed)
    outputs = {}
    for name in adapters:
        ml.set_adapter(model, name)
        outputs[name] = model(IDS)
    return model, outputs


ROWS = LoraConfig(r=2, target_modules=[], trainable_token_indices=(1,))
EMBED = LoraConfig(r=2, target_modules=["embed"])
WHOLE = LoraConfig(r=2, target_modules=[], modules_to_save=["embed"])


@pytest.mark.parametrize("first", [ROWS, EMBED, WHOLE])
def test_adapters_of_two_kinds_do_not_share_a_module(first):
    model, outputs = _adapted(first=first)
    for other in (ROWS, EMBED, WHOLE):
        if other is not first:
            with pytest.raises(ml.TargetError, match="embed: another adapter changes it in another way"):
                ml.attach(model, other, "second")
    assert torch.equal(model(IDS), outputs["first"])


LINEAR = LoraConfig(r=2, target_modules=["0"])


def test_an_inner_block_has_the_say_and_the_outer_one_after_it():
    model, outputs = _adapted(a=LINEAR, b=LINEAR)
    ml.set_adapter(model, "a")
    with ml.merged(model), pytest.raises(ml.TargetError, match="the model has no adapter"):
        ml.set_adapter(model, "b")
    assert torch.equal(model(IDS), outputs["a"])
    ml.set_adapter(model, "b")
    assert torch.equal(model(IDS), outputs["b"])
    ml.set_adapter(model, ["a", "b"])
    with ml.disable_adapter(model):
        ml.delete_adapter(model, "a")
    assert torch.equal(model(IDS), outputs["b"])


def test_a_module_trained_in_full_has_no_adapter_within():
    model, _ = _adapted(inner=LINEAR)
    with pytest.raises(ml.TargetError, match=r"block\.0: is in block, which an adapter trains in full"):
        ml.attach(model, LoraConfig(target_modules=[], modules_to_save=["block"]), "outer")
    model, _ = _adapted(outer=LoraConfig(target_modules=[], modules_to_save=["block"]))
    with pytest.raises(ml.TargetError, match=r"block\.0: is in block"):
        ml.attach(model, LINEAR, "inner")


class Twice(Tied):
    """What a T5 of transformers 5 has: an embedding for others to share, which is not called itself."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(7, 4)
        self.shared.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.shared


def test_trained_rows_are_those_of_every_embedding_that_is_tied(tmp_path):
    model = Twice()
    ml.attach(model, ROWS, dtype=torch.float64)
    _fill_(model, 1)
    rows = next(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.embed(torch.tensor([1])), rows)
    ml.save_adapter(model, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [
        "base_model.model.shared.token_adapter.trainable_tokens_delta"
    ]
    loaded = Twice()
    ml.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    ml.merge(model)
    assert model.embed.weight is model.shared.weight
    assert_maths(model(IDS), loaded(IDS))


def _hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    return linear


def _overridden():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: 2 * x
    return linear


def test_a_layer_with_hooks_or_a_computed_weight_is_no_target():
    for layer, message in (
        (_hooked, "0: has hooks or a forward of its own"),
        (_overridden, "0: has hooks or a forward of its own"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "no module that can be adapted matches"),
        (lambda: prune.identity(nn.Linear(4, 4), "weight"), "no module that can be adapted matches"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "no module that can be adapted matches"),
    ):
        with pytest.raises(ml.TargetError, match=message):
            ml.attach(nn.Sequential(layer()), LINEAR)


def test_a_row_of_zeros_stays_a_number_under_dora():
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    model, x = nn.Sequential(linear), randn(0, 5, 4).float()
    expected = model(x)
    ml.attach(model, LoraConfig(r=2, use_dora=True))
    assert_parity(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_sum_beyond_the_numbers_that_there_are_is_refused():
    model, _ = _adapted(a=LINEAR, b=LINEAR)
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            if name.endswith("a.lora_B"):
                parameter.fill_(1e37)
    with pytest.raises(ml.MiniloraError, match="not finite"):
        ml.combine_adapters(model, {"a": 1e6, "b": 1}, "sum")


@pytest.mark.parametrize("wrapped", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_refused_for_its_names_would_fit_no_other(wrapped):
    with pytest.raises(ml.TargetError, match="adapt it, then wrap it"):
        ml.attach(wrapped(Tied()), LINEAR)


def test_a_loss_that_is_no_sum_and_count_is_told():
    for loss, message in (
        (lambda total: total, "must return"),
        (lambda total: None, "must return"),
        (lambda total: (total, -2), "must return"),
        (lambda total: (total, float("nan")), "must return"),
        (lambda total: (total.expand(2), 1), "must return"),
        (lambda total: (1.0, 1), "must return"),
        (lambda total: (total.detach(), 1), "a sum with a gradient"),
    ):
        model = Tied()
        ml.attach(model, LINEAR)
        with pytest.raises(ml.TrainingError, match=message):
            ml.train(
                model, [IDS], ml.TrainConfig(max_steps=1), loss=lambda m, x, loss=loss: loss(m(x[0]).square().sum())
            )


def test_an_adapter_of_many_tensors_is_read_in_one_go(tmp_path, monkeypatch):
    """To read the header again for each tensor takes hours where there are tens of thousands, as of experts."""
    model, outputs = _adapted(a=LINEAR)
    ml.save_adapter(model, tmp_path, "a")
    opened = []
    monkeypatch.setattr(files, "safe_open", lambda *args, **more: opened.append(args) or safe_open(*args, **more))
    loaded = Tied()
    ml.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(IDS), outputs["a"])
    assert len(opened) <= 3


def test_modules_that_peft_saves_by_the_end_of_a_name_are_loaded(tmp_path):
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.norm, self.input_norm, self.linear = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)

    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["norm"], "target_modules": ["linear"]}
    write_json(tmp_path / "adapter_config.json", values)
    tensors = {"linear.lora_A.weight": torch.ones(2, 4), "linear.lora_B.weight": torch.ones(4, 2)}
    tensors |= {f"{name}.{key}": torch.ones(4) for name in ("norm", "input_norm") for key in ("weight", "bias")}
    write_tensors(tmp_path / "adapter_model.safetensors", {f"base_model.model.{k}": t for k, t in tensors.items()})
    model = Normed()
    ml.load_adapter(model, tmp_path)
    copied = {path for path, place in adapter_layers(model).items() if isinstance(place, ModulesToSave)}
    assert copied == {"norm", "input_norm"}

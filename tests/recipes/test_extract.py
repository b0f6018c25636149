"""The adapter between two models: what was added is found again, and what a rank cannot hold is told."""

import copy

import pytest
import torch
from hypothesis import given

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import relative
from recipes.extract import extract, main
from tests.models import best_of_rank, examples, families, perturb_, randn, scales, seeds, tiny_model, token_ids

IDS = token_ids(0, 2, 5)
NEAR = 1e-5


def noisy(model, *ends, seed=0):
    """The model with every number of the parameters with these ends changed."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(ends):
                parameter += 0.1 * randn(seed + i, *parameter.shape).to(parameter.dtype)
    return model


@families
def test_an_adapter_that_was_merged_is_found_again_and_nothing_else(family):
    base, tuned = (tiny_model(family, dtype=torch.float32) for _ in range(2))
    ml.attach(tuned, ml.LoraConfig(r=3, lora_alpha=21))
    perturb_(tuned)
    ml.merge(tuned)
    errors, others = extract(base, tuned, ml.LoraConfig(r=3, lora_alpha=6))
    assert max(errors.values()) < NEAR
    assert others == []
    assert relative(base(IDS), tuned(IDS), NEAR) < 1


@examples(0.2)
@given(seeds, scales)
def test_the_adapter_is_the_best_of_its_rank_and_the_error_what_it_lacks(seed, scale):
    base = tiny_model(dtype=torch.float32, seed=seed, num_hidden_layers=1)
    tuned = noisy(copy.deepcopy(base), "up_proj.weight", "v_proj.weight", seed=seed)
    config = ml.LoraConfig(r=4, lora_alpha=4 * scale, rank_pattern={"v_proj": 2})
    errors, _ = extract(base, tuned, config)
    for path, layer in adapter_layers(base).items():
        adapter = layer.adapters["default"]
        delta = tuned.get_submodule(path).weight.detach().double() - layer.base.weight.double()
        best = best_of_rank(delta, config.rank(path))[0]
        assert relative(adapter.scale * adapter.lora_B @ adapter.lora_A, best, 10 * NEAR) < 1
        lost = (delta - torch.from_numpy(best)).norm() / max(delta.norm(), 1e-30)
        assert errors[path] == pytest.approx(lost.item(), rel=1e-4)
        assert (errors[path] > 0.1) == path.endswith(("up_proj", "v_proj"))


def test_what_no_adapter_of_these_modules_holds_is_named():
    base = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    tuned = noisy(copy.deepcopy(base), "up_proj.weight", "input_layernorm.weight", "embed_tokens.weight")
    _, others = extract(base, tuned, ml.LoraConfig(r=2, target_modules=("up_proj", "q_proj")))
    assert others == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]


def test_models_of_other_shapes_are_refused():
    base, other = tiny_model(), tiny_model(vocab_size=70)
    with pytest.raises(ml.TargetError, match="the same parameters, in the same shapes"):
        extract(base, other, ml.LoraConfig(r=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_directories_to_a_directory(tmp_path, capsys, dtype):
    base = tiny_model(dtype=dtype, num_hidden_layers=1)
    ml.save_model(base, tmp_path / "base")
    ml.save_model(noisy(base, "up_proj.weight", "norm.weight"), tmp_path / "tuned")
    main(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "out"), "2")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"adapter written to {tmp_path / 'out'}; it lacks at most ")
    assert second == "not in the adapter: 3 other parameters that differ, such as model.layers.0.input_layernorm.weight"
    model = ml.load_model(tmp_path / "base")
    ml.load_adapter(model, tmp_path / "out")
    assert adapter_layers(model)["model.layers.0.mlp.up_proj"].adapters["default"].lora_B.any()

"""The adapter between two models: what was added is found again, and what a rank cannot say is told."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import FormatError, TargetError
from minilora.adapter import adapter_layers
from minilora.adapters.layout import WEIGHTS_FILE, base_model_of, base_quantization
from minilora.cli.extract import extract_directory
from minilora.testing.compare import MATHS, assert_maths, relative
from tests.files import change
from tests.models import allocated, families, randn, randomize_adapters_, tiny_model

TARGETS = ("q_proj", "o_proj", "down_proj", "qkv_proj")


def write(path, family="llama", dtype=torch.float64, change=lambda model: None, **config):
    layers = {"num_hidden_layers": 2} if family == "llama" else {}
    model = tiny_model(family, dtype=dtype, **layers | config)
    with torch.no_grad():
        change(model)
    ml.save_model(model, path)
    return path


def with_adapter(model):
    """A model that an adapter of rank 3 was merged into."""
    targets = [name for name in TARGETS if any(path.endswith(name) for path, _ in model.named_modules())]
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=21, target_modules=targets))
    randomize_adapters_(model)
    ml.merge(model)


def noisy(*ends):
    """Every number of the parameters with these ends changed."""

    def change(model):
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(ends):
                parameter += 0.1 * randn(i, *parameter.shape)

    return change


def weights(directory):
    return {name: tensor.double().numpy() for name, tensor in load_file(directory / "model.safetensors").items()}


def delta(adapter, path):
    tensors = load_file(adapter / WEIGHTS_FILE)
    A, B = (tensors[f"base_model.model.{path}.lora_{letter}.weight"].double() for letter in "AB")
    return (B @ A).numpy()


CONFIG = ml.LoraConfig(r=3, lora_alpha=5, use_rslora=True)  # whose scale counts for nothing: that of the file is 1


@families
def test_an_adapter_that_was_merged_is_found_again_and_nothing_else(tmp_path, family):
    write(tmp_path / "base", family)
    write(tmp_path / "tuned", family, change=with_adapter)
    found = extract_directory(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", CONFIG)
    assert found.deviation.overall < 1e-6
    assert (found.left_out, found.share) == ((), 0)
    model, ids = ml.load_model(tmp_path / "base", "float64"), torch.tensor([[3, 1, 4, 1, 5]])
    ml.load_adapter(model, tmp_path / "adapter")
    expected = ml.load_model(tmp_path / "tuned", "float64")
    assert {path.rpartition(".")[2] for path in adapter_layers(model)} <= set(TARGETS)
    assert {layer.adapters["default"].scale for layer in adapter_layers(model).values()} == {1}
    assert relative(model(ids), expected(ids), 100 * MATHS) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_error_of_the_cut_is_that_of_the_svd_by_module_and_over_all(tmp_path, dtype):
    base = write(tmp_path / "base", dtype=dtype)
    tuned = write(tmp_path / "tuned", dtype=dtype, change=noisy("up_proj.weight", "v_proj.weight"))
    config = ml.LoraConfig(r=4, rank_pattern={"v_proj": 2})
    found = extract_directory(base, tuned, tmp_path / "adapter", config)
    before, after, lost, total = weights(base), weights(tuned), {}, {}
    for name in before:
        if name.endswith(("up_proj.weight", "v_proj.weight")):
            path, wanted = name.removesuffix(".weight"), after[name] - before[name]
            r = 2 if "v_proj" in name else 4
            sigma = np.linalg.svd(wanted, compute_uv=False)
            lost[path], total[path] = np.sum(sigma[r:] ** 2), np.sum(sigma**2)
            error = np.sum((wanted - delta(tmp_path / "adapter", path)) ** 2)
            assert error == pytest.approx(lost[path], rel=1e-5)
    deviation = found.deviation
    assert deviation.overall == pytest.approx((sum(lost.values()) / sum(total.values())) ** 0.5, rel=1e-5)
    worst = max(lost, key=lambda path: lost[path] / total[path])
    assert deviation.layer == worst
    assert deviation.worst == pytest.approx((lost[worst] / total[worst]) ** 0.5, rel=1e-5)


def test_an_energy_takes_the_least_rank_of_each_module_that_keeps_it(tmp_path):
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=noisy("up_proj.weight"))
    extract_directory(base, tuned, tmp_path / "adapter", ml.LoraConfig(r=20), energy=0.6)
    before, after, ranks = weights(base), weights(tuned), set()
    for i in range(2):
        path = f"model.layers.{i}.mlp.up_proj"
        sigma = np.linalg.svd(after[f"{path}.weight"] - before[f"{path}.weight"], compute_uv=False)
        shares = np.cumsum(sigma**2) / np.sum(sigma**2)
        r = np.linalg.matrix_rank(delta(tmp_path / "adapter", path))
        assert shares[r - 2] < 0.6 <= shares[r - 1]
        ranks.add(r)
    assert max(ranks) < 20


def test_what_no_adapter_of_these_modules_holds_is_named_with_its_share(tmp_path):
    base = write(tmp_path / "base")
    tuned = write(tmp_path / "tuned", change=noisy("up_proj.weight", "norm.weight", "embed_tokens.weight"))
    found = extract_directory(base, tuned, tmp_path / "adapter", CONFIG)
    before, after = weights(base), weights(tuned)
    squares = {name: np.sum((after[name] - before[name]) ** 2) for name in before}
    left = {name for name, square in squares.items() if square and not name.endswith("up_proj.weight")}
    assert set(found.left_out) == left
    assert "model.embed_tokens.weight" in left
    assert len(left) == 2 * 2 + 2
    expected = sum(squares[name] for name in left) / sum(squares.values())
    assert_maths(torch.tensor([found.share], dtype=torch.float64), [expected])


def test_embeddings_and_head_are_extracted_if_they_are_named(tmp_path):
    ends = ("embed_tokens.weight", "lm_head.weight")
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=noisy(*ends))
    config = ml.LoraConfig(r=61, target_modules=("embed_tokens", "lm_head"))
    assert extract_directory(base, tuned, tmp_path / "adapter", config).deviation.overall < 1e-6
    model, ids = ml.load_model(base, "float64"), torch.tensor([[3, 1, 4, 1, 5]])
    ml.load_adapter(model, tmp_path / "adapter")
    assert relative(model(ids), ml.load_model(tuned, "float64")(ids), 100 * MATHS) <= 1


def test_a_vocabulary_that_grew_is_named_and_the_rest_extracted(tmp_path):
    base = write(tmp_path / "base")
    tuned = write(tmp_path / "tuned", vocab_size=67, change=noisy("up_proj.weight"))
    model = ml.load_model(tuned, "float64")
    same = ml.load_model(base, "float64").state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape == same[name].shape:
                parameter.copy_(same[name])
    with_adapter(model)
    ml.save_model(model, tuned)
    found = extract_directory(base, tuned, tmp_path / "adapter", CONFIG)
    assert set(found.left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.deviation.overall < 1e-6


def test_the_adapter_names_its_base_and_how_that_is_held(tmp_path):
    base = write(tmp_path / "base", dtype=torch.float32)
    ml.save_model(ml.load_model(base, quantize="nf4"), tmp_path / "packed")
    model = ml.load_model(tmp_path / "packed")
    with_adapter(model)
    ml.save_model(model, tmp_path / "tuned")
    found = extract_directory(tmp_path / "packed", tmp_path / "tuned", tmp_path / "adapter", CONFIG)
    assert found.deviation.overall < 1e-5
    assert found.left_out == ()
    assert base_model_of(tmp_path / "adapter") == str(tmp_path / "packed")
    assert base_quantization(tmp_path / "adapter")["quantize"] == "nf4"


def test_what_is_held_at_a_time_is_two_weights_and_the_work_on_one(tmp_path):
    for name, alter in (("base", lambda model: None), ("tuned", noisy("up_proj.weight"))):
        model = tiny_model(dtype=torch.float32, num_hidden_layers=8)
        with torch.no_grad():
            alter(model)
        ml.save_model(model, tmp_path / name, shard_bytes=1)  # a file that is mapped counts as a whole
    paths = (tmp_path / name for name in ("base", "tuned", "adapter"))
    _, peak, _ = allocated(lambda: extract_directory(*paths, ml.LoraConfig(r=1)))
    largest = max(parameter.nbytes for parameter in model.parameters())
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter" / WEIGHTS_FILE).values())
    assert peak <= 2 * held + 10 * largest
    assert sum(p.nbytes for p in model.parameters()) > 2.5 * peak


def test_two_models_that_differ_in_other_modules_or_are_not_finite_have_no_adapter(tmp_path):
    base, other = write(tmp_path / "base"), write(tmp_path / "other", change=noisy("norm.weight"))
    with pytest.raises(TargetError, match="are equal in all selected modules"):
        extract_directory(base, other, tmp_path / "adapter", CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    change(other, {name: load_file(other / "model.safetensors")[name] * torch.inf})  # which minilora does not write
    with pytest.raises(FormatError, match=rf"{name} has numbers that are not finite"):
        extract_directory(base, other, tmp_path / "adapter", CONFIG)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "targets", "named"),
    [
        ({"intermediate_size": 44}, ("up_proj", "q_proj"), "model.layers.0.mlp.up_proj"),
        ({"vocab_size": 67}, ("lm_head",), "lm_head"),
        ({"num_hidden_layers": 1}, ("up_proj",), "model.layers.1.mlp.up_proj"),
        ({"tie_word_embeddings": True}, ("lm_head",), "lm_head"),
    ],
)
def test_modules_that_do_not_fit_are_refused_by_name(tmp_path, changes, targets, named):
    base, other = write(tmp_path / "base"), write(tmp_path / "other", **changes)
    with pytest.raises(TargetError, match=rf"\['{named}'.*\]: need a weight of its own"):
        extract_directory(base, other, tmp_path / "adapter", ml.LoraConfig(r=3, target_modules=targets))
    assert not (tmp_path / "adapter").exists()

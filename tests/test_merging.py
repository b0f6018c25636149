"""Merging a directory: the bytes of a merge in memory, one file held at a time, and how far it is from the training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from minilora import ConfigError, FormatError, TargetError, TrainingError, merging
from minilora.lora.files import WEIGHTS_FILE
from minilora.lora.find import linear_layers
from minilora.lora.layers import AdapterLinear
from minilora.merging import merge_directory, squared_norms
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.quant.nf4 import quantize
from minilora.storage import holds_files
from minilora.testing import reference_nf4 as reference
from minilora.train.memory import _Account
from tests.models import FAMILIES, randn, randomize_adapters_, scales, seeds, tiny_model
from tests.tolerance import assert_maths

NF4 = ml.QuantizeConfig("nf4", quantize_skip=("o_proj",))
SHARD = 9_000  # bytes: several shards for a tiny model


def write_base(path, family="llama", dtype=torch.float32, quantize=None, **changes):
    """A model's directory; with `quantize` in four bits."""
    ml.save_model(tiny_model(family, dtype=dtype, **changes), path)
    if quantize is not None:
        ml.save_model(ml.load_model(path, dtype, quantize=quantize), path)
    return path


def write_adapter(base, path, seed=1, quantize=None, **config):
    """An adapter with random factors, trained on that base."""
    model = ml.load_model(base, device="meta", quantize=quantize)
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **config}), seed=seed)
    randomize_adapters_(model, seed)
    ml.save_adapter(model, path)
    return path


def merge_in_memory(base, adapters, out, dtype, quantize=None):
    model = ml.load_model(base, dtype, quantize=quantize)
    for i, adapter in enumerate(adapters):
        ml.load_adapter(model, adapter, f"{i}")
    ml.set_adapter(model, [f"{i}" for i in range(len(adapters))])
    ml.merge(model)
    ml.save_model(model, out)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def things(tmp_path):
    """A base, the same in four bits, and an adapter of some of its modules."""
    write_base(tmp_path / "base")
    write_base(tmp_path / "packed", quantize=NF4)
    write_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=("q_proj", "o_proj", "down_proj"))
    return tmp_path


# --- what is written ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "dtype", "head"),
    [
        ("dense", torch.bfloat16, "lm_head"),
        ("quantized for the training", torch.float16, "lm_head"),
        ("quantized", torch.float32, "lm_head"),
        ("quantized", torch.bfloat16, "o_proj"),
    ],
)
def test_a_merged_directory_has_the_bytes_of_a_merge_in_memory(tmp_path, family, kind, dtype, head):
    base = write_base(tmp_path / "base", family, dtype, NF4 if kind == "quantized" else None)
    first = write_adapter(base, tmp_path / "first", use_rslora=True)
    targets = rf"{head}|.*(o_proj|layers\.2\..*down_proj)"
    second = write_adapter(base, tmp_path / "second", seed=2, r=2, target_modules=targets)
    asked = NF4 if kind == "quantized for the training" else None
    merge_in_memory(base, [first, second], tmp_path / "expected", dtype, asked)
    merge_directory(base, [first, second], tmp_path / "out", quantize=asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert contents(tmp_path / "out")["model.safetensors"] != contents(base)["model.safetensors"]


KINDS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "copies": {"modules_to_save": ("norm", "o_proj")},
    "head": {"modules_to_save": ("lm_head",)},
    "rows": {"trainable_token_indices": (3, 60)},
    "embedding": {"target_modules": ("embed_tokens", "up_proj")},
    "both ends": {"target_modules": ("embed_tokens", "lm_head")},
    "parameters": {"target_modules": (), "target_parameters": ("down_proj.weight",)},
}


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied-wide-heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_as_in_memory(tmp_path, monkeypatch, family, kind):
    monkeypatch.setattr(merging, "CHUNK", 48)
    base, changes = write_base(tmp_path / "base", family), {"target_modules": ("q_proj", "down_proj"), **KINDS[kind]}
    model = ml.load_model(base)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=21, **changes))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * randn(i, *parameter.shape))
    ml.save_adapter(model, tmp_path / "adapter")
    merge_in_memory(base, [tmp_path / "adapter"], tmp_path / "expected", "float32")
    deviation = merge_directory(base, [tmp_path / "adapter"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert deviation.overall is None or deviation.overall < 1e-6


def test_an_adapter_that_began_as_a_part_of_the_weights_is_read_with_them(things):
    path = things / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    merge_in_memory(things / "base", [things / "adapter"], things / "expected", "float32")
    merge_directory(things / "base", [things / "adapter"], things / "out")
    assert contents(things / "out") == contents(things / "expected")


def test_a_bias_that_the_model_has_no_place_for_is_refused_by_name(things):
    model = ml.load_model(things / "base")
    ml.attach(model, ml.LoraConfig(target_modules=("up_proj",), lora_bias=True))
    ml.save_adapter(model, things / "bias")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj: the adapters add \['bias'\].*llama has no place"):
        merge_directory(things / "base", [things / "bias"], things / "out")
    assert not holds_files(things / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("asked", [None, NF4])
def test_the_original_is_what_is_merged_into_if_that_is_asked_for(things, dtype, asked):
    merge_in_memory(things / "base", [things / "adapter"], things / "expected", dtype)
    merge_directory(things / "base", [things / "adapter"], things / "out", "original", asked, dtype)
    assert contents(things / "out") == contents(things / "expected")


@pytest.mark.parametrize("shard_bytes", [SHARD, 4 * SHARD])
def test_shards_are_those_of_a_merge_in_memory(things, shard_bytes):
    model = ml.load_model(things / "packed")
    ml.load_adapter(model, things / "adapter")
    ml.merge(model)
    ml.save_model(model, things / "expected", shard_bytes=shard_bytes)
    merge_directory(things / "packed", [things / "adapter"], things / "out", shard_bytes=shard_bytes)
    assert contents(things / "out") == contents(things / "expected")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_requantized_is_the_dequantized_result_quantized_again_and_the_rest_as_it_was(things, is_packed, double_quant):
    config = ml.QuantizeConfig("nf4", double_quant, ("o_proj",))
    packed = write_base(things / "four", quantize=config)
    base, asked = (packed, None) if is_packed else (things / "base", config)
    for target in ("dequantized", "requantized"):
        merge_directory(base, [things / "adapter"], things / target, target, asked)
    expected, before = ml.load_model(things / "dequantized"), linear_layers(ml.load_model(packed))
    result, stored = (load_file(path / "model.safetensors") for path in (things / "requantized", packed))
    model = ml.load_model(things / "requantized")
    for path, linear in linear_layers(model).items():
        assert type(linear) is type(before[path])
        if not isinstance(linear, NF4Linear):
            assert torch.equal(linear.weight, expected.get_submodule(path).weight)
        elif path.endswith(("q_proj", "down_proj")):
            again = NF4Linear.quantize(expected.get_submodule(path).weight, double_quant=double_quant)
            assert again.layout == linear.layout
            assert [None if part is None else part.tolist() for part in again.parts] == [
                None if part is None else part.tolist() for part in linear.parts
            ]
        else:
            names = [name for name in stored if name.startswith(f"{path}.")]
            assert all(torch.equal(result[name], stored[name]) for name in names)
            assert (f"{path}.weight.nested_absmax" in names) == double_quant
    configs = [json.loads((path / "config.json").read_text()) for path in (things / "requantized", packed)]
    assert configs[0] == configs[1]


def test_a_block_size_other_than_ours_is_kept(things):
    base = linear_layers(ml.load_model(things / "base"))["model.layers.0.self_attn.q_proj"]
    example = NF4Linear.quantize(base.weight, double_quant=False)
    packed, absmax = quantize(base.weight, 128)
    layout = replace(example.layout, block_size=128)
    example = NF4Linear(example.parts._replace(packed=packed, absmax=absmax), layout, None, torch.float32)
    again = merging._packed_like(example, dense_weight(example))
    assert again.layout == layout
    assert torch.equal(again.packed, example.packed)
    assert torch.equal(again.absmax, example.absmax)


def test_a_base_in_the_other_format_of_four_bits_is_made_dense_and_not_packed_again(things):
    model = ml.load_model(things / "packed")
    for linear in linear_layers(model).values():
        if isinstance(linear, NF4Linear):
            linear.layout = replace(linear.layout, quant_type="fp4")
    ml.save_model(model, things / "fp4")
    merge_in_memory(things / "fp4", [things / "adapter"], things / "expected", "float32")
    assert merge_directory(things / "fp4", [things / "adapter"], things / "out").worst < 1e-6
    assert contents(things / "out") == contents(things / "expected")
    with pytest.raises(ConfigError, match="fp4: the target 'requantized' needs linears held as nf4, found fp4"):
        merge_directory(things / "fp4", [things / "adapter"], things / "other", "requantized")


@pytest.mark.parametrize(
    ("is_packed", "asked", "target"),
    [(False, None, "original"), (False, NF4, "dequantized"), (True, None, "dequantized")],
)
def test_the_default_target_is_what_was_trained(things, is_packed, asked, target):
    base = things / ("packed" if is_packed else "base")
    for name, given_target in (("default", None), ("named", target)):
        merge_directory(base, [things / "adapter"], things / name, given_target, asked)
    assert contents(things / "default") == contents(things / "named")


# --- what is held ---


class Held(_Account):
    """Bytes of what has numbers."""

    def _hold(self, storage):
        if storage.device.type != "meta":
            super()._hold(storage)


@pytest.mark.parametrize(("target", "asked"), [("original", None), ("original", NF4), ("requantized", NF4)])
def test_what_is_held_at_a_time_is_one_shard_and_the_work_on_one_weight(tmp_path, monkeypatch, target, asked):
    monkeypatch.setattr(merging, "CHUNK", 48)
    base = tmp_path / "base"
    model = tiny_model(dtype=torch.float32, num_hidden_layers=12)
    ml.save_model(model, base, shard_bytes=1)  # a file that is mapped counts as a whole
    adapter = write_adapter(base, tmp_path / "adapter", r=1, target_modules=("up_proj",))
    largest = max(p.nbytes for p in model.parameters())
    with Held() as account:
        merge_directory(base, [adapter], tmp_path / "out", target, asked, shard_bytes=SHARD)
    held = sum(tensor.nbytes for tensor in load_file(adapter / WEIGHTS_FILE).values())
    assert SHARD < account.most <= SHARD + 2 * held + 6 * largest
    assert sum(p.nbytes for p in model.parameters()) > 4 * account.most


@pytest.mark.parametrize("after", [0, 5])
def test_an_interrupted_merge_leaves_nothing_that_looks_whole_and_can_be_done_again(things, monkeypatch, after):
    calls = []

    def interrupted(*values):
        calls.append(values)
        if len(calls) > after:
            raise KeyboardInterrupt
        return squared_norms(*values)

    monkeypatch.setattr(merging, "squared_norms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_directory(things / "base", [things / "adapter"], things / "out", shard_bytes=SHARD)
    monkeypatch.undo()
    assert not holds_files(things / "out")
    with pytest.raises(FormatError):
        ml.load_model(things / "out")
    merge_directory(things / "base", [things / "adapter"], things / "out", shard_bytes=SHARD)
    ml.load_model(things / "out")


# --- how far it is from what was trained ---


def numbers(weight):
    """What a weight stands for, by numpy alone."""
    if not isinstance(weight, NF4Linear):
        return weight.detach().double().numpy()
    packed, absmax = bytes(weight.packed.flatten().tolist()), weight.absmax.flatten().numpy()
    count = weight.out_features * weight.in_features
    exact = reference.nf4_dequantize(packed, absmax, count, weight.layout.block_size)
    return exact.astype(np.float32).astype(np.float64).reshape(weight.layout.shape)


@given(
    seeds,
    st.integers(1, 9),
    st.sampled_from([1, 9, 64, 100]),
    scales,
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.data(),
)
def test_the_norms_are_those_of_the_outputs_for_inputs_of_all_directions(seed, outer, inner, scale, ranks, data):
    kinds = st.sampled_from([torch.float64, torch.bfloat16, "nf4"])
    weights = []
    for i in range(2):
        kind, weight = data.draw(kinds), randn(seed + i, outer, inner)
        weights.append(NF4Linear.quantize(weight.float(), double_quant=False) if kind == "nf4" else weight.to(kind))
    layer = AdapterLinear(nn.Linear(inner, outer, device="meta"), "proj")
    for i, r in enumerate(ranks):
        lora_A, lora_B = randn(seed + 2 + i, r, inner), randn(seed + 9 + i, outer, r)
        layer.add(f"{i}", ml.LoraConfig(r=r, lora_alpha=scale * r), {"lora_A": lora_A, "lora_B": lora_B})
    layer.active = tuple(layer.configs)
    now, before = map(numbers, weights)
    error = effect = 0.0
    for x in np.eye(inner):
        delta = np.zeros(outer)
        for name in layer.active:
            lora_A, lora_B = (factor.detach().numpy() for factor in layer.adapters[name].factors())
            delta += scale * (lora_B @ (lora_A @ x))
        error += sum((now @ x - (before @ x + delta)) ** 2)
        effect += sum(delta**2)
    for found, expected in zip(squared_norms(*weights, layer), (error, effect), strict=True):
        assert_maths(torch.tensor([found], dtype=torch.float64), [expected])


def test_the_norms_are_the_same_whatever_is_widened_at_a_time(things, monkeypatch):
    whole = merge_directory(things / "base", [things / "adapter"], things / "a", "requantized", NF4)
    monkeypatch.setattr(merging, "CHUNK", 1)
    by_rows = merge_directory(things / "base", [things / "adapter"], things / "b", "requantized", NF4)
    assert by_rows.layer == whole.layer
    ours, expected = (torch.tensor([d.overall, d.worst], dtype=torch.float64) for d in (by_rows, whole))
    assert_maths(ours, expected)


def test_merging_into_what_was_trained_errs_by_rounding_and_into_another_weight_by_its_difference(things):
    errors = {
        target: merge_directory(things / "base", [things / "adapter"], things / target, target, NF4)
        for target in ("dequantized", "requantized", "original")
    }
    assert errors["dequantized"].worst < 1e-6
    assert errors["original"].overall > 1e-3
    assert errors["requantized"].overall > 1e-3
    held = linear_layers(ml.load_model(things / "base", quantize=NF4))
    plain = linear_layers(ml.load_model(things / "base"))
    model = ml.load_model(things / "base")
    ml.load_adapter(model, things / "adapter")
    ratios = {}
    for path, layer in ml.lora.attach.adapter_layers(model).items():
        delta = layer.merged_weight(torch.zeros_like(plain[path].weight, dtype=torch.float64))
        ratios[path] = ((plain[path].weight - dense_weight(held[path])).double().norm() / delta.norm()).item()
    worst = max(ratios, key=ratios.get)
    assert errors["original"].layer == worst
    assert errors["original"].worst == pytest.approx(ratios[worst], rel=1e-6)
    assert ratios["model.layers.0.self_attn.o_proj"] == 0  # it is dense in both


@pytest.mark.parametrize(("target", "asked"), [("original", None), ("dequantized", NF4), ("requantized", NF4)])
@pytest.mark.parametrize("trained", ["none", NF4, ml.QuantizeConfig("nf4", False)])
def test_the_error_is_the_distance_to_what_was_trained_whatever_is_merged_into(things, target, asked, trained):
    found = merge_directory(things / "base", [things / "adapter"], things / "out", target, asked, trained=trained)
    result, known = (
        linear_layers(ml.load_model(*each[:1], quantize=each[1]))
        for each in ((things / "out", None), (things / "base", trained))
    )
    model = ml.load_model(things / "base")
    ml.load_adapter(model, things / "adapter")
    error = effect = 0.0
    for path, layer in ml.lora.attach.adapter_layers(model).items():
        delta = layer.merged_weight(torch.zeros(layer.base.weight.shape, dtype=torch.float64))
        before, now = (dense_weight(linears[path]).double() for linears in (known, result))
        error, effect = error + (now - before - delta).norm() ** 2, effect + delta.norm() ** 2
    assert found.overall == pytest.approx((error / effect).sqrt().item(), rel=1e-3, abs=1e-7)


def test_a_trained_base_that_cannot_be_had_is_refused_before_anything_is_written(things):
    asked = ml.QuantizeConfig("nf4", quantize_skip=("up_proj",))
    for base in ("base", "packed"):
        with pytest.raises(ConfigError, match="quantize_skip"):
            merge_directory(
                things / base,
                [things / "adapter"],
                things / "out",
                trained=replace(asked, quantize_skip=("typo",)) if base == "base" else asked,
            )
    assert not (things / "out").exists()


def test_a_base_of_both_formats_of_four_bits_is_not_requantized(things):
    model = ml.load_model(things / "packed")
    linear = model.get_submodule("model.layers.3.mlp.down_proj")
    linear.layout = replace(linear.layout, quant_type="fp4")
    ml.save_model(model, things / "both")
    with pytest.raises(ConfigError, match="both: the target 'requantized' needs linears held as nf4, found fp4"):
        merge_directory(things / "both", [things / "adapter"], things / "out", "requantized")
    assert not (things / "out").exists()


def test_a_layer_without_effect_is_not_the_worst_and_an_adapter_without_one_has_no_error(things):
    tensors = load_file(things / "adapter" / WEIGHTS_FILE)
    changing = "model.layers.1.self_attn.q_proj"
    for silent in ((lambda name: changing not in name), (lambda name: True)):
        changed = {name: t * 0 if "lora_B" in name and silent(name) else t for name, t in tensors.items()}
        save_file(changed, things / "adapter" / WEIGHTS_FILE)
        found = merge_directory(things / "base", [things / "adapter"], things / "out", "original", NF4)
        if silent(changing):
            assert (found.overall, found.worst, found.layer) == (None, None, None)
        else:
            assert found.layer == changing
            assert found.worst < found.overall  # which counts the errors of the others


# --- what is refused ---


@pytest.mark.parametrize(
    ("base", "target", "asked", "phrase"),
    [
        (
            "packed",
            "original",
            None,
            r"packed: is quantized as nf4; .*'original' needs the 16-bit model.*'dequantized'",
        ),
        ("base", "requantized", None, r"base: .*'requantized' needs linears held as nf4, found none; .*--quantize nf4"),
        (
            "base",
            "somewhere",
            None,
            r"target is 'somewhere', accepted are \['original', 'dequantized', 'requantized'\]",
        ),
    ],
)
def test_a_target_that_the_base_does_not_allow_is_refused_before_anything_is_written(
    things, base, target, asked, phrase
):
    with pytest.raises(ConfigError, match=phrase):
        merge_directory(things / base, [things / "adapter"], things / "out", target, asked)
    assert not (things / "out").exists()


def test_merging_no_adapter_is_refused(things):
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_directory(things / "base", [], things / "out")


def test_numbers_that_are_not_finite_are_refused_by_name(things):
    path = things / "adapter" / WEIGHTS_FILE
    tensors = load_file(path)
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * torch.inf}, path)
    with pytest.raises(FormatError, match=name):
        merge_directory(things / "base", [things / "adapter"], things / "out")
    save_file(tensors | {name: tensors[name] * 1e6}, path)
    with pytest.raises(TrainingError, match=r"model\.layers\.2\.mlp\.down_proj: .*not finite in torch.float16"):
        merge_directory(things / "base", [things / "adapter"], things / "out", dtype="float16")
    assert not holds_files(things / "out")


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_copy_of_the_base_s_weight_beside_the_adapter_is_compared(tmp_path, is_tied, is_same):
    base = write_base(tmp_path / "base", tie_word_embeddings=is_tied)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=("lm_head",))
    head = ml.load_model(base).lm_head.weight.detach().clone()
    copy = {"base_model.model.lm_head.base_layer.weight": head if is_same else head + 1}
    save_file(load_file(adapter / WEIGHTS_FILE) | copy, adapter / WEIGHTS_FILE)
    if is_same:
        merge_in_memory(base, [adapter], tmp_path / "expected", "float32")
        merge_directory(base, [adapter], tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    else:
        with pytest.raises(TargetError, match=r"lm_head\.base_layer\.weight is not the weight of this model"):
            merge_directory(base, [adapter], tmp_path / "out")
        assert not (tmp_path / "out").exists()

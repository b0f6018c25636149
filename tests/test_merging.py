"""Merging a directory: the bytes of a merge in memory, one file held at a time, and how far it is from the training."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import ConfigError, FormatError, TargetError, TrainingError
from minilora.adapter import adapter_layers, linear_layers
from minilora.adapters.layers import as_matrix
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.files import publishing
from minilora.lora import merge_weight
from minilora.models import checkpoint
from minilora.models.bitsandbytes import FP4_LEVELS
from minilora.nf4 import NF4Linear
from minilora.runs.lock import holds_files
from minilora.tools import merging
from minilora.tools.merging import Merge, Squares, merge_directory, relative_error
from tests.files import SHARD, edit, save_file, write_adapter, write_base
from tests.models import WHOLE, allocated, long, matrix, randn, tiny_model
from tests.runs import everything

NF4 = ml.QuantizeConfig("nf4")


def write_for(base, path, seed=1, **config):
    """An adapter with random factors, trained on that base."""
    return write_adapter(ml.load_model(base, device="meta"), path, seed, **{"r": 3, "lora_alpha": 21, **config})


def merge_in_memory(base, adapters, out, dtype, quantize=None):
    model = ml.load_model(base, dtype, quantize=quantize)
    for i, adapter in enumerate(adapters):
        ml.load_adapter(model, adapter, f"{i}")
    ml.set_adapter(model, [f"{i}" for i in range(len(adapters))])
    ml.merge(model)
    ml.save_model(model, out)


def deltas(base, adapter):
    """ΔW of each linear that an adapter changes, by its path."""
    model = ml.load_model(base)
    ml.load_adapter(model, adapter)
    found = {}
    for path, layer in adapter_layers(model).items():
        zeros = as_matrix(layer.base, torch.zeros(layer.base.weight.shape, dtype=torch.float64))
        found[path] = as_matrix(layer.base, merge_weight(zeros, [layer.adapters[name] for name in layer.active]))
    return found


def merge(things, target=None, quantize=None, base="base", adapter="adapter", out="out", dtype="auto"):
    """Merge one of these adapters into one of these bases, as a directory; return the error."""
    what = Merge(things / base, [things / adapter], target, ml.QuantizeConfig.of(quantize), dtype)
    with publishing(things / out) as directory:
        error = merge_directory(what, directory)
    assert error is None or error.margin == 0  # the weights have few rows
    return error and error.value


def assert_as_in_memory(things, dtype="auto", quantize=None, base="base", adapter="adapter"):
    """What `merge` wrote in `out` are the bytes of a merge in memory."""
    merge_in_memory(things / base, [things / adapter], things / "expected", dtype, quantize)
    assert everything(things / "out") == everything(things / "expected")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    write_base(directory / "base", num_hidden_layers=2)
    write_base(directory / "packed", quantize=NF4, num_hidden_layers=2)
    write_for(directory / "base", directory / "adapter", target_modules=("q_proj", "o_proj", "down_proj"))
    return directory


@pytest.fixture
def things(made, tmp_path):
    """A base, the same in four bits, and an adapter of some of its modules."""
    return shutil.copytree(made, tmp_path / "things")


CASES = {  # how the base is held, its dtype, and another linear that is adapted
    "dense": (None, torch.bfloat16, "lm_head"),
    "quantized for the training": (None, torch.float16, "lm_head"),
    "quantized": (NF4, torch.float32, "lm_head"),
    "quantized, in bfloat16": (NF4, torch.bfloat16, "o_proj"),
}


@matrix(3, case=CASES, family=(WHOLE, "qwen3.5"))
def test_a_merged_directory_has_the_bytes_of_a_merge_in_memory(tmp_path, family, case):
    """By default into what was trained."""
    held, dtype, head = CASES[case]
    base = write_base(tmp_path / "base", family, dtype, held, num_hidden_layers=2)
    first = write_for(base, tmp_path / "first", use_rslora=True)
    targets = rf"{head}|.*(o_proj|layers\.1\..*down_proj)"
    second = write_for(base, tmp_path / "second", seed=2, r=2, target_modules=targets)
    asked = NF4 if case == "quantized for the training" else None
    merge_in_memory(base, [first, second], tmp_path / "expected", dtype, asked)
    with publishing(tmp_path / "out") as out:
        merge_directory(Merge(base, [first, second], None, ml.QuantizeConfig.of(asked)), out)
    assert everything(tmp_path / "out") == everything(tmp_path / "expected")
    assert (tmp_path / "out/model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


KINDS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "copies": {"modules_to_save": ("norm", "o_proj")},
    "head": {"modules_to_save": ("lm_head",)},
    "rows": {"trainable_token_indices": (3, 60)},
    "rows of the head": {"trainable_token_indices": {"embed_tokens": (3,), "lm_head": (3, 60)}},
    "embedding": {"target_modules": ("embed_tokens", "up_proj")},
    "both ends": {"target_modules": ("embed_tokens", "lm_head")},
}


UNTIED = [(kind, "llama") for kind in KINDS]


@pytest.mark.parametrize(("kind", "family"), [*((kind, WHOLE) for kind in KINDS), UNTIED[-1], *long(*UNTIED[:-1])])
def test_every_kind_of_adapter_is_merged_as_in_memory(tmp_path, family, kind):
    base = write_base(tmp_path / "base", family, num_hidden_layers=2)
    model = ml.load_model(base)
    targets = {"target_modules": ("q_proj", "down_proj")}
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **targets, **KINDS[kind]}))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * randn(i, *parameter.shape))
    ml.save_adapter(model, tmp_path / "adapter")
    error = merge(tmp_path)
    assert_as_in_memory(tmp_path)
    assert error is None or error < 1e-6


def test_an_adapter_that_began_as_a_part_of_the_weights_is_read_with_them(things):
    edit(things / "adapter", init_lora_weights="pissa")
    merge(things)
    assert_as_in_memory(things)


def test_a_bias_that_the_model_has_no_place_for_is_refused_by_name(things):
    model = ml.load_model(things / "base")
    ml.attach(model, ml.LoraConfig(target_modules=("up_proj",), lora_bias=True))
    ml.save_adapter(model, things / "bias")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj: the adapters add \['bias'\]"):
        merge(things, adapter="bias")
    ml.merge(model)
    with pytest.raises(ConfigError, match=r"up_proj\.bias'.*lora_bias adds biases"):
        ml.save_model(model, things / "out")
    assert not holds_files(things / "out")


@pytest.mark.parametrize(("asked", "dtype"), [(None, "float64"), (NF4, "float32"), (NF4, "bfloat16")])
def test_the_original_is_what_is_merged_into_if_that_is_asked_for(things, dtype, asked):
    merge(things, "original", asked, dtype=dtype)
    assert_as_in_memory(things, dtype)


@pytest.mark.parametrize("shard_bytes", [SHARD, 4 * SHARD])
def test_shards_are_those_of_a_merge_in_memory(things, monkeypatch, shard_bytes):
    monkeypatch.setattr(merging, "SHARD_BYTES", shard_bytes)
    model = ml.load_model(things / "packed")
    ml.load_adapter(model, things / "adapter")
    ml.merge(model)
    ml.save_model(model, things / "expected", shard_bytes=shard_bytes)
    merge(things, base="packed")
    assert everything(things / "out") == everything(things / "expected")


@pytest.mark.parametrize(("is_packed", "double_quant"), [(True, True), (False, False)])
def test_requantized_is_the_dequantized_result_quantized_again_and_the_rest_as_it_was(things, is_packed, double_quant):
    config = ml.QuantizeConfig("nf4", double_quant)
    packed = write_base(things / "four", quantize=config, num_hidden_layers=2)
    base, asked = ("four", None) if is_packed else ("base", config)
    for target in ("dequantized", "requantized"):
        merge(things, target, asked, base, out=target)
    expected, before = ml.load_model(things / "dequantized"), linear_layers(ml.load_model(packed))
    result, stored = (load_file(path / "model.safetensors") for path in (things / "requantized", packed))
    model = ml.load_model(things / "requantized")
    for path, linear in linear_layers(model).items():
        assert type(linear) is type(before[path])
        if not isinstance(linear, NF4Linear):
            assert torch.equal(linear.weight, expected.get_submodule(path).weight)
        elif path.endswith(("q_proj", "o_proj", "down_proj")):
            again = NF4Linear.quantize(expected.get_submodule(path).weight, double_quant=double_quant)
            assert again.layout == linear.layout
            for found, expected_part in zip(linear.parts, again.parts, strict=True):
                assert found is expected_part or torch.equal(found, expected_part)
        else:
            names = [name for name in stored if name.startswith(f"{path}.")]
            assert all(torch.equal(result[name], stored[name]) for name in names)
            assert (f"{path}.weight.nested_absmax" in names) == double_quant
    configs = [json.loads((path / "config.json").read_text()) for path in (things / "requantized", packed)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("end", ["_proj", "layers.1.mlp.down_proj"])
def test_a_base_in_the_other_format_of_four_bits_is_made_dense_and_not_packed_again(things, end):
    """Also where that format is only one linear's."""
    model = ml.load_model(things / "packed")
    for path, linear in linear_layers(model).items():
        if isinstance(linear, NF4Linear) and path.endswith(end):
            linear.layout = replace(linear.layout, levels=FP4_LEVELS)
    ml.save_model(model, things / "fp4")
    with pytest.raises(ConfigError, match="fp4: the target 'requantized' needs linears quantized as nf4, found fp4"):
        merge(things, "requantized", base="fp4")
    assert not holds_files(things / "out")
    assert merge(things, base="fp4") < 1e-6
    assert_as_in_memory(things, base="fp4")


@pytest.mark.parametrize(
    ("target", "asked"),
    [("requantized", NF4), *(pytest.param("original", asked, marks=pytest.mark.long) for asked in (None, NF4))],
)
def test_what_is_held_at_a_time_is_the_work_on_one_weight(tmp_path, monkeypatch, target, asked):
    """And what is small of all others. Those that are read and merged ahead have a law of their own."""
    monkeypatch.setattr(checkpoint, "prefetch", lambda items: items)  # the profiler sees one thread
    base = tmp_path / "base"
    model = tiny_model(dtype=torch.float32, num_hidden_layers=14, hidden_size=64, intermediate_size=64)
    ml.save_model(model, base, shard_bytes=1)  # a file that is mapped counts as a whole
    adapter = write_for(base, tmp_path / "adapter", r=1, target_modules=("up_proj",))
    largest = max(p.nbytes for p in model.parameters())
    what = Merge(base, [adapter], target, ml.QuantizeConfig.of(asked))
    _, peak, _ = allocated(lambda: merge_directory(what, tmp_path / "out"))
    held = sum(tensor.nbytes for tensor in load_file(adapter / WEIGHTS_FILE).values())
    small = 512 * len(linear_layers(model)) + 14 * 64 * 16  # two numbers of each row that is measured
    assert peak <= 2 * held + 10 * largest + small
    assert sum(p.nbytes for p in model.parameters()) > 4 * peak


def test_items_are_made_in_order_and_not_too_far_ahead_and_an_error_comes_where_its_item_would():
    made = []

    def items():
        for i in range(9):
            made.append(i)
            yield i
        raise KeyError("the tenth")

    found = checkpoint.prefetch(items())
    for i in range(9):
        assert next(found) == i
        assert len(made) <= i + 1 + checkpoint.PREFETCHED
    with pytest.raises(KeyError, match="the tenth"):
        next(found)


def test_merging_into_what_was_trained_errs_by_rounding_and_into_another_weight_by_its_difference(things):
    errors = {target: merge(things, target, NF4) for target in ("dequantized", "requantized", "original")}
    assert errors["dequantized"] < 1e-6
    assert errors["original"] > 1e-3
    assert errors["requantized"] > 1e-3
    held, plain = (linear_layers(ml.load_model(things / "base", quantize=quantize)) for quantize in (NF4, None))
    lost = effect = 0.0
    for path, delta in deltas(things / "base", things / "adapter").items():
        lost += (plain[path].weight - held[path].weight).double().square().sum().item()
        effect += delta.square().sum().item()
    assert errors["original"] == pytest.approx(math.sqrt(lost / effect), rel=1e-6)


@pytest.mark.parametrize("target", ["original", "requantized"])
def test_the_error_on_drawn_rows_is_that_of_all_within_its_interval_and_the_bytes_are_the_same(tmp_path, target):
    write_base(tmp_path / "base", hidden_size=64, intermediate_size=192)
    write_for(tmp_path / "base", tmp_path / "adapter")
    found = []
    for rows in (40, 10**9):
        what = Merge(tmp_path / "base", [tmp_path / "adapter"], target, NF4, rows=rows)
        found.append(merge_directory(what, tmp_path / f"{rows}"))
    drawn, whole = found
    assert whole.margin == 0 < drawn.margin < 0.1 * whole.value
    assert 0 < abs(drawn.value - whole.value) < 2 * drawn.margin
    assert everything(tmp_path / "40") == everything(tmp_path / f"{10**9}")


def test_the_interval_has_the_true_error_in_19_of_20_draws():
    generator = torch.Generator().manual_seed(0)
    weights = [randn(seed, 2, 500).square() * (seed + 1) for seed in range(3)]
    truth = relative_error([Squares(*weight, 500) for weight in weights])
    hits = 0
    for _ in range(400):
        drawn = [weight[:, torch.randperm(500, generator=generator)[:100]] for weight in weights]
        found = relative_error([Squares(*each, 500) for each in drawn])
        hits += abs(found.value - truth.value) <= found.margin
    assert truth.margin == 0
    assert 0.91 <= hits / 400 <= 0.98


def test_an_adapter_without_effect_has_no_error(things):
    tensors = load_file(things / "adapter" / WEIGHTS_FILE)
    silent = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(silent, things / "adapter" / WEIGHTS_FILE)
    assert merge(things, "original", NF4) is None


@pytest.mark.parametrize(
    ("base", "target", "phrase"),
    [
        ("packed", "original", r"packed: is quantized as nf4; .*'original' needs the 16-bit model.*'dequantized'"),
        ("base", "requantized", r"base: .*'requantized' needs linears quantized as nf4, found none"),
    ],
)
def test_a_target_that_the_base_does_not_allow_is_refused_before_anything_is_written(things, base, target, phrase):
    with pytest.raises(ConfigError, match=phrase):
        merge(things, target, base=base)
    assert not holds_files(things / "out")


def test_numbers_that_are_not_finite_are_refused_by_name(things):
    path = things / "adapter" / WEIGHTS_FILE
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * torch.inf}, path)
    with pytest.raises(FormatError, match=name):
        merge(things)
    save_file(tensors | {name: tensors[name] * 1e6}, path)
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .*not finite in torch.float16"):
        merge(things, dtype="float16")
    assert not holds_files(things / "out")


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_copy_of_the_base_s_weight_beside_the_adapter_is_compared(tmp_path, is_tied, is_same):
    base = write_base(tmp_path / "base", tie_word_embeddings=is_tied, num_hidden_layers=1)
    adapter = write_for(base, tmp_path / "adapter", target_modules=("lm_head",))
    head = ml.load_model(base).lm_head.weight.detach().clone()
    copy = {"base_model.model.lm_head.base_layer.weight": head if is_same else head + 1}
    save_file(load_file(adapter / WEIGHTS_FILE) | copy, adapter / WEIGHTS_FILE)
    if is_same:
        merge(tmp_path)
        assert_as_in_memory(tmp_path)
    else:
        with pytest.raises(TargetError, match=r"lm_head\.base_layer\.weight is not the weight of this model"):
            merge(tmp_path)
        assert not holds_files(tmp_path / "out")

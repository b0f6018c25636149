"""4-bit model directories in and out, in bitsandbytes' bytes; quantizing while loading; what cannot be read."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from minilora import ConfigError, FormatError
from minilora.adapter import linear_layers
from minilora.files import TensorFile, read_json, write_json
from minilora.models.bitsandbytes import (
    CODEBOOKS,
    QuantizeConfig,
    describe_quantization,
    packed_tensors,
    packed_weights,
    read_packed,
)
from minilora.models.checkpoint import DTYPES, SHARD_BYTES
from minilora.nf4 import DYNAMIC_MAP, NF4Linear, quantize_absmax
from minilora.testing.compare import assert_parity
from tests.files import SHARD, change, same_state, write_base
from tests.golden.make_quantized import FILE, KINDS
from tests.models import allocated, default_dtype, four_bit, layouts, long, matrix, tiny_model, token_ids
from tests.runs import everything

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj"
W = f"{UP}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
LAST_BITS = 2**-22  # of a float32, relative
doubles = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "plain"])


def small_base(directory, **changes):
    """Write a model of two layers."""
    return write_base(directory, num_hidden_layers=2, **changes)


def packed_linears(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}


def read_state(tensors, name=STATE):
    return json.loads(bytes(tensors[name].tolist()))


def as_tensor(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def packed_entry(path, name):
    """The parts and the layout of a packed weight in a file."""
    file = TensorFile(path)
    files = dict.fromkeys(file.shapes, file)
    return read_packed(files, packed_weights(files)[name], CPU, copy=True)


@pytest.mark.parametrize("case", KINDS)
def test_the_tensors_of_a_packed_weight_are_those_of_bitsandbytes(case):
    frozen, (kind, is_double) = load_file(FILE), KINDS[case]
    theirs = {name: tensor for name, tensor in frozen.items() if name.startswith(f"{case}.weight")}
    if kind == "nf4":
        linear = NF4Linear.quantize(frozen["dense"], double_quant=is_double)
    else:  # is read only; and written as it was read
        linear = NF4Linear(*packed_entry(FILE, f"{case}.weight"), None)
    ours = packed_tensors(f"{case}.weight", linear)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        if name.endswith("nested_quant_map"):  # whose last bits are the processor's
            assert_parity(tensor, theirs[name], LAST_BITS)
        elif "quant_state" in name:
            assert_same_text(*(bytes(each.tolist()).decode() for each in (tensor, theirs[name])))
        else:
            assert torch.equal(tensor, theirs[name]), name


def assert_same_text(ours, theirs):
    """But for the last bits of a mean, which are the processor's."""
    offset, expected = (json.loads(text).get("nested_offset", 0.0) for text in (ours, theirs))
    assert abs(offset - expected) <= LAST_BITS * expected
    assert ours == theirs.replace(json.dumps(expected), json.dumps(offset))


def test_absmaxes_are_rounded_as_bitsandbytes_does_on_the_cpu():
    frozen = load_file(FILE)
    codes, scales, _ = quantize_absmax(frozen["absmax"])
    assert torch.equal(codes, frozen["absmax.codes"])
    assert torch.equal(scales, frozen["absmax.scales"])


@layouts
@pytest.mark.parametrize(("shard_bytes", "double_quant"), [(SHARD_BYTES, True), (SHARD, False)])
def test_a_saved_4_bit_model_loads_bit_for_bit_and_is_saved_in_the_same_bytes(
    family, shard_bytes, double_quant, tmp_path
):
    write_base(tmp_path / "dense", family)
    model = ml.load_model(tmp_path / "dense", quantize=QuantizeConfig("nf4", double_quant))
    ml.save_model(model, tmp_path / "a", shard_bytes=shard_bytes)
    loaded = ml.load_model(tmp_path / "a")
    same_state(loaded, model)
    linears = [path for path, module in tiny_model(family).named_modules() if isinstance(module, nn.Linear)]
    assert list(packed_linears(loaded)) == [path for path in linears if path != "lm_head"]
    assert {linear.scales is not None for linear in packed_linears(loaded).values()} == {double_quant}
    layouts, before = ([linear.layout for linear in packed_linears(each).values()] for each in (loaded, model))
    assert layouts == before
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not any(p.requires_grad for linear in packed_linears(loaded).values() for p in linear.parameters())
    ml.save_model(loaded, tmp_path / "b", shard_bytes=shard_bytes)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert (len(everything(tmp_path / "a")) > 3) == (shard_bytes == SHARD)


def test_a_4_bit_model_does_not_change_when_its_file_is_replaced(tmp_path):
    small_base(tmp_path, quantize="nf4")
    model = ml.load_model(tmp_path)
    before = copy.deepcopy(model)
    other = copy.deepcopy(model)
    for linear in packed_linears(other).values():
        linear.packed.data.zero_()
    ml.save_model(other, tmp_path)
    same_state(model, before)
    same_state(ml.load_model(tmp_path), other)


def make_fp4(directory):
    """Say that the codes of a directory are fp4's."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("__nf4")]:
        state = json.dumps(read_state(tensors, name) | {"quant_type": "fp4"})
        tensors[name.removesuffix("nf4") + "fp4"] = as_tensor(state)
        tensors[name.partition(".quant_state")[0] + ".quant_map"] = torch.tensor(CODEBOOKS["fp4"])
        del tensors[name]
    save_file(tensors, directory / "model.safetensors")


@layouts
def test_embeddings_norms_biases_and_head_are_held_in_the_dtype_of_the_computation(family, tmp_path):
    write_base(tmp_path, family, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = ml.load_model(tmp_path, dtype, quantize="nf4")
        linears, parts = packed_linears(model), ("packed", "absmax", "scales", "offset")
        inside = {f"{path}.{name}" for path in linears for name in parts}
        assert {parameter.dtype for name, parameter in model.named_parameters() if name not in inside} == {dtype}
        assert {linear.dtype for linear in linears.values()} == {dtype}
        assert isinstance(model.lm_head, nn.Linear)


@matrix(3, dtype=(torch.float32, torch.bfloat16), stored=list(DTYPES))
def test_the_numbers_of_the_file_are_quantized_whatever_the_dtype(stored, dtype, tmp_path):
    small_base(tmp_path, dtype=DTYPES[stored])
    linears = packed_linears(ml.load_model(tmp_path, dtype, quantize="nf4"))
    tensors = load_file(tmp_path / "model.safetensors")
    for path, linear in linears.items():
        expected = NF4Linear.quantize(tensors[f"{path}.weight"])
        assert linear.layout == expected.layout
        assert all(map(torch.equal, linear.parts, expected.parts))
    linear = linears[UP]
    written = read_state(packed_tensors(W, linear))["dtype"]
    assert written == ("float32" if stored == "float64" else stored)  # bitsandbytes has no float64


def mixed(directory):
    """Write a model of two layers in four bits, except for its o_proj; the directory."""
    ml.save_model(four_bit(tiny_model(dtype=torch.float32, num_hidden_layers=2), dense="o_proj"), directory)
    return directory


def test_linears_that_are_dense_in_a_checkpoint_stay_so(tmp_path):
    model = ml.load_model(mixed(tmp_path / "a"))
    assert {path.rpartition(".")[2] for path in linear_layers(model).keys() - packed_linears(model)} == (
        {"lm_head", "o_proj"}
    )
    ml.save_model(model, tmp_path / "b")
    same_state(ml.load_model(tmp_path / "b"), model)


def test_an_unknown_quantization_is_refused(tmp_path):
    small_base(tmp_path)
    for asked in ("fp4", "int8", "NF4", QuantizeConfig):
        with pytest.raises(ConfigError, match=r"quantize is .*nf4"):
            ml.load_model(tmp_path, quantize=asked)


def test_a_head_that_others_packed_is_read_and_written_as_it_is(tmp_path):
    directory = mixed(tmp_path / "a")
    before = ml.load_model(directory)
    linear = NF4Linear.quantize(before.lm_head.weight)
    change(directory, packed_tensors("lm_head.weight", linear))
    model, tokens = ml.load_model(directory), token_ids(0, 2, 9)
    with torch.no_grad():
        before.lm_head.weight.copy_(linear.weight)
        assert_parity(model(tokens), before(tokens))
    ml.save_model(model, tmp_path / "b")
    assert read_json(tmp_path / "b/config.json")["quantization_config"]["llm_int8_skip_modules"] == ["o_proj"]
    same_state(ml.load_model(tmp_path / "b"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *long(torch.float32)])
def test_while_loading_nothing_is_held_but_the_4_bit_model_and_one_dense_tensor(dtype, tmp_path):
    write_base(tmp_path, dtype=dtype, **LARGE)
    torch.set_num_threads(1)  # each has scratch of its own
    ml.load_model(tmp_path, dtype, quantize="nf4")  # tables that are made once
    mapped = (tmp_path / "model.safetensors").stat().st_size
    _, peak, model = allocated(lambda: ml.load_model(tmp_path, dtype, quantize="nf4"), mapped)
    held = sum(p.nbytes for p in model.parameters())
    one = 5 * 512 * 1024  # in float32, and the scratch of a tile
    dense = sum(math.prod(linear.layout.shape) for linear in packed_linears(model).values()) * dtype.itemsize
    assert held < peak <= held + one < dense


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("good"), quantize="nf4", **WIDE)


@pytest.fixture
def packed(good, tmp_path):
    return shutil.copytree(good, tmp_path / "a")


def longer(tensor):
    return torch.cat([tensor, tensor[:1]])


def ending_with(number):
    return lambda tensor: torch.cat([tensor[:-1], torch.tensor([number])])


def with_fourth_scaled(factor):
    return lambda tensor: torch.where(torch.arange(len(tensor)) == 3, factor, 1.0) * tensor


def given(tensor):
    return lambda _: tensor


def missing(_):
    return None


WRONG = {  # of the keys of the JSON object, which are missing too
    "shape": ([8192], "ab", [128.0, 64.0], [True, 64], [64, 128], [10**30, 64], [2**40, 2**40], [0, 64], [-128, -64]),
    "quant_type": ("int4", "fp4", 5),
    "blocksize": (0, 48, "64", 64.0, 8192, 128),
    "dtype": ("int8", 5),
    "nested_offset": (math.nan, 1e39, "0.1", True),
    "nested_blocksize": (128,),
}
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
HOSTILE = [  # the tensor that is changed, which the error names, and how
    *((f"{W}{part}", changed) for part in ("", *STATISTICS) for changed in (missing, longer, torch.Tensor.int)),
    (f"{W}.nested_absmax", torch.Tensor.half),
    (f"{W}.absmax", torch.Tensor.float),
    (W, given(torch.tensor(1.0))),
    ("model.norm.weight.absmax", given(torch.zeros(1))),
    *((f"{W}.nested_absmax", ending_with(number)) for number in (math.nan, math.inf)),
    *((f"{W}{part}", with_fourth_scaled(1.001)) for part in STATISTICS if part.endswith("quant_map")),
    (f"{W}.quant_map", with_fourth_scaled(math.nan)),
    (f"{W}.quant_map", given(torch.tensor(CODEBOOKS["fp4"]))),
    *((STATE, given(state)) for state in (as_tensor("{'a': 5}"), as_tensor("[1, 2]"), torch.zeros(2**20).byte())),
    (STATE, torch.Tensor.int),
]


def assert_refused(directory, changes, key):
    change(directory, changes)
    with pytest.raises(FormatError) as error:
        ml.load_model(directory)
    assert str(directory) in str(error.value)
    assert key in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("name", "changed"), HOSTILE)
def test_a_tensor_of_a_packed_weight_that_cannot_be_right_is_refused_by_name(name, changed, packed):
    assert_refused(packed, {name: changed(load_file(packed / "model.safetensors").get(name))}, name)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in (*values, None)])
def test_a_state_that_cannot_be_right_is_refused_by_the_name_of_its_weight(key, value, packed):
    state = read_state(load_file(packed / "model.safetensors")) | {key: value}
    written = {key: value for key, value in state.items() if value is not None}
    assert_refused(packed, {STATE: as_tensor(json.dumps(written))}, W)


def test_a_state_belongs_to_one_linear_that_is_there(good, tmp_path):
    tensors = load_file(good / "model.safetensors")
    embeddings = NF4Linear.quantize(tensors["model.embed_tokens.weight"])
    cases = (
        ({STATE: None}, W),
        ({STATE.replace("nf4", "fp4"): tensors[STATE]}, STATE.replace("nf4", "fp4")),  # a second one
        ({STATE.replace("up_", "x_"): tensors[STATE]}, "x_"),
        ({STATE.replace(UP, "lm_head"): tensors[STATE]}, "lm_head"),
        (packed_tensors("model.embed_tokens.weight", embeddings), "packed: model.embed_tokens.weight"),
    )
    for i, (changes, key) in enumerate(cases):
        directory = shutil.copytree(good, tmp_path / f"{i}")
        assert_refused(directory, copy.deepcopy(changes), key)


def test_neither_the_default_dtype_nor_the_default_device_changes_what_is_read(packed):
    before = ml.load_model(packed)
    with default_dtype(torch.bfloat16), torch.device("meta"):
        same_state(ml.load_model(packed), before)


def test_levels_whose_last_bits_are_another_machine_s_are_read(packed):
    before = ml.load_model(packed)
    nested = torch.nextafter(DYNAMIC_MAP, torch.full((256,), 2.0))
    assert not torch.equal(nested, load_file(packed / "model.safetensors")[f"{W}.nested_quant_map"])
    change(packed, {f"{W}.nested_quant_map": torch.where(DYNAMIC_MAP == 0, DYNAMIC_MAP, nested)})
    same_state(ml.load_model(packed), before)


def test_config_json_and_the_tensors_have_to_agree(packed, tmp_path):
    dense = small_base(tmp_path / "dense", **WIDE)
    shutil.copy(packed / "config.json", dense)
    with pytest.raises(FormatError, match=r"dense: .*quantization_config.*0 weights are packed"):
        ml.load_model(dense)
    config = read_json(packed / "config.json")
    others = {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "load_in_4bit": True}
    in_8_bits = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    for entry in (*others, in_8_bits, {"load_in_4bit": "yes"}, {}, "nf4", None):
        write_json(packed / "config.json", config | {"quantization_config": entry})
        with pytest.raises((ConfigError, FormatError), match="quantization_config"):
            ml.load_model(packed)


def test_a_model_that_is_quantized_is_loaded_as_it_is_and_not_otherwise(packed):
    same_state(ml.load_model(packed, quantize="nf4"), ml.load_model(packed))
    with pytest.raises(ConfigError, match="is quantized already, as nf4; leave out quantize"):
        ml.load_model(packed, quantize=QuantizeConfig("nf4", double_quant=False))
    make_fp4(packed)
    with pytest.raises(ConfigError, match="is quantized already, as fp4"):
        ml.load_model(packed, quantize="nf4")
    assert packed_linears(ml.load_model(packed, quantize="none"))


def test_a_description_says_fp4_of_a_model_that_has_it_in_one_linear(tmp_path):
    model = ml.load_model(mixed(tmp_path))
    assert describe_quantization(model) == {"quantize": "nf4", "double_quant": True, "block_size": 64}
    last = packed_linears(model)["model.layers.1.mlp.down_proj"]
    last.layout = replace(last.layout, levels=CODEBOOKS["fp4"])
    assert describe_quantization(model)["quantize"] == "fp4"


def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path):
    weight = load_file(write_base(tmp_path) / "model.safetensors")[W]
    weight[3, 5] = math.inf
    change(tmp_path, {W: weight})
    with pytest.raises(FormatError, match=rf"model\.safetensors: {re.escape(W)}.*not finite"):
        ml.load_model(tmp_path, quantize="nf4")

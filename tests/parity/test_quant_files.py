"""4-bit model directories of transformers with bitsandbytes, and ours: the same bytes, the same logits.

Theirs are run as for training and in float32: while evaluating, on a processor with AVX512-BF16, they round more.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.files import read_json
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.nf4 import NF4Linear, dequantize, quantize
from minilora.testing.compare import assert_parity
from tests.models import randn, tiny_model, token_ids

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {  # biases, a tied head
    "llama": {},
    "llama-bias-tied-wide-heads": {"head_dim": 32},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
}
TOKENS = token_ids(0, 2, 12)
doubles = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "plain"])


def save_dense(path, family="llama", dtype=torch.bfloat16, **changes):
    ml.save_model(tiny_model(family, dtype=dtype, **SIZES | FAMILIES[family] | changes), path)
    return path


def theirs_model(path, dtype=torch.float32, **options):
    """transformers' model, quantized as it is loaded, or as it lies; it computes in float32."""
    if options:
        options = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **options)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, **options)
    return model.train()


def theirs_logits(model, tokens=TOKENS):
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.data = parameter.data.float()
    with torch.no_grad():
        return model(input_ids=tokens).logits


def ours_logits(path):
    with torch.no_grad():
        return ml.load_model(path, "float32")(TOKENS)


def options_of(double_quant=True, kind="nf4", **others):
    return {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant, **others}


def tensors_of(path):
    return load_file(path / "model.safetensors")


def same_files(ours, theirs):
    """Tensors, JSON and what config.json says of quantization."""
    one, other = tensors_of(ours), tensors_of(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor, other[name]), name
    ours_entry, theirs_entry = (read_json(path / "config.json")["quantization_config"] for path in (ours, theirs))
    assert json.dumps(ours_entry) == json.dumps(theirs_entry)


def assert_each_loads_the_other_s(ours, theirs, model):
    """Two directories, and their model of the same."""
    expected = theirs_logits(model)
    assert_parity(ours_logits(theirs), expected)
    assert_parity(theirs_logits(theirs_model(ours)), expected)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (129, 65), (300, 576)])  # rows that end within a block, odd ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_and_absmaxes_are_theirs(size, dtype):
    weight = 0.02 * randn(0, *size)
    weight.view(-1)[::100] *= 1000
    weight.view(-1)[:128] *= len(weight) % 2  # a zero block, or none
    theirs, state = functional.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4")
    packed, absmax = quantize(weight.to(dtype))
    assert torch.equal(packed, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    if size[1] % 64 == 0:  # their kernel takes the wrong absmax for rows that end within a block
        assert torch.equal(dequantize(packed, absmax, size, dtype), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("family", FAMILIES)
@doubles
def test_a_4_bit_directory_is_theirs_byte_for_byte_and_each_loads_the_other_s(family, double_quant, tmp_path):
    dense, ours, theirs = save_dense(tmp_path / "dense", family), tmp_path / "ours", tmp_path / "theirs"
    ml.save_model(ml.load_model(dense, "bfloat16", quantize=QuantizeConfig("nf4", double_quant)), ours)
    model = theirs_model(dense, torch.bfloat16, **options_of(double_quant, bnb_4bit_compute_dtype=torch.bfloat16))
    model.save_pretrained(theirs)
    same_files(ours, theirs)
    assert_each_loads_the_other_s(ours, theirs, model)


@pytest.mark.parametrize("skip", [["down_proj"], ["model.layers.1"], ["q_proj", "model.layers.0.mlp"]])
def test_what_stays_dense_is_the_same_to_both(skip, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = theirs_model(save_dense(tmp_path / "dense"), **options_of(llm_int8_skip_modules=[*skip, "lm_head"]))
    model.save_pretrained(theirs)
    ml.save_model(ml.load_model(theirs, "float32"), ours)
    assert tensors_of(ours).keys() == tensors_of(theirs).keys()
    assert_each_loads_the_other_s(ours, theirs, model)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@doubles
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_their_formats_and_storages_are_read(kind, double_quant, storage, tmp_path):
    model = theirs_model(
        save_dense(tmp_path / "dense", "qwen2"), **options_of(double_quant, kind, bnb_4bit_quant_storage=storage)
    )
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path)["model.layers.0.mlp.up_proj.weight"].dtype == storage
    assert_parity(ours_logits(tmp_path), theirs_logits(model))


def test_shards_that_part_a_weight_from_its_statistics_are_read_and_ours_by_them(tmp_path):
    ours, theirs, files = tmp_path / "ours", tmp_path / "theirs", {}
    model = theirs_model(save_dense(tmp_path / "dense"), **options_of())
    model.save_pretrained(theirs, max_shard_size=5000)
    ml.save_model(ml.load_model(theirs, "float32"), ours, shard_bytes=20_000)
    for name, file in read_json(theirs / "model.safetensors.index.json")["weight_map"].items():
        files.setdefault(name.partition(".weight")[0], set()).add(file)
    assert max(map(len, files.values())) > 1
    assert_each_loads_the_other_s(ours, theirs, model)


def test_a_head_that_they_pack_is_read(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = theirs_model(save_dense(tmp_path / "dense", vocab_size=64), **options_of(llm_int8_skip_modules=[]))
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    model.save_pretrained(theirs)
    loaded = ml.load_model(theirs, "float32")
    assert isinstance(loaded.lm_head, NF4Linear)
    ml.save_model(loaded, ours)
    assert_each_loads_the_other_s(ours, theirs, model)

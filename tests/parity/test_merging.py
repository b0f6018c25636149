"""What we merge: PEFT's own merge within a rounding, and directories that transformers opens."""

import pytest
import torch

import minilora as ml
from minilora.testing.compare import assert_parity, assert_precision
from minilora.tools.merging import Merge, merge_directory
from tests.models import randomize_adapters_, tiny_model, token_ids
from tests.parity.theirs import theirs_loaded

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

NF4 = ml.QuantizeConfig("nf4")
SIZES = {"hidden_size": 64, "intermediate_size": 128}
IDS = token_ids(3, 2, 7)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])


def merge(things, target, config=NF4, adapter="adapter", out="merged"):
    merge_directory(Merge(things / "base", [things / adapter], target, config), things / out)


@pytest.fixture
def make(tmp_path):
    """A base, an adapter trained on it in four bits, and the dense model that those four bits stand for."""

    def write(family, dtype, **config):
        ml.save_model(tiny_model(family, dtype=dtype, **SIZES), tmp_path / "base")
        model = ml.load_model(tmp_path / "base", dtype, quantize="nf4")
        ml.attach(model, ml.LoraConfig(r=3, lora_alpha=21, **config))
        ml.save_adapter(model, tmp_path / "nothing")
        merge(tmp_path, "dequantized", adapter="nothing", out="dense")
        randomize_adapters_(model)
        ml.save_adapter(model, tmp_path / "adapter")
        return tmp_path

    return write


@dtypes
@families
def test_peft_s_merge_into_the_weights_that_were_trained_on_is_ours_within_a_rounding(make, family, dtype):
    things = make(family, dtype)
    merge(things, "dequantized")
    ours = ml.load_model(things / "merged", dtype).state_dict()
    base = theirs_loaded(things / "dense", dtype)
    before = {name: weight.double() for name, weight in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, things / "adapter")
    factors = {name: factor.double() for name, factor in adapted.state_dict().items() if ".lora_" in name}
    theirs = adapted.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, weight in ours.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if (lora_A := factors.get(f"{prefix}.lora_A.default.weight")) is None:
            assert torch.equal(weight, theirs[name])
        else:
            exact = before[name] + 7 * factors[f"{prefix}.lora_B.default.weight"] @ lora_A
            assert_precision(weight, theirs[name], exact)
            assert_parity(weight, theirs[name], torch.finfo(dtype).eps)
            changed += 1
    assert changed == len(factors) // 2 > 0


@families
@pytest.mark.parametrize("target", ["original", "dequantized"])
def test_transformers_opens_a_merged_directory_to_the_logits_of_the_adapted_model(make, family, target):
    targets = ("o_proj", "down_proj", "lm_head")
    things = make(family, torch.float32, target_modules=targets)
    merge(things, target)
    model = ml.load_model(things / "base", quantize="nf4" if target == "dequantized" else None)
    ml.load_adapter(model, things / "adapter")
    theirs = theirs_loaded(things / "merged", torch.float32)
    assert_parity(model(IDS), theirs(IDS).logits)
    assert torch.equal(theirs.lm_head.weight, ml.load_model(things / "merged").lm_head.weight)


@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_opens_a_requantized_directory_to_our_logits(make, double_quant):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    things = make("llama", torch.float32)
    config = ml.QuantizeConfig("nf4", double_quant)
    merge(things, "requantized", config)
    theirs = theirs_loaded(things / "merged", torch.float32).train()  # while evaluating it rounds more
    packed = [module for module in theirs.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 4 * 7
    assert_parity(ml.load_model(things / "merged")(IDS), theirs(IDS).logits)

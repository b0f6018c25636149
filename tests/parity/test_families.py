"""`attach` on models that minilora did not build, and PEFT on copies of them: the same choice, numbers and files."""

import pytest
import torch

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.modules_to_save import ModulesToSave
from minilora.testing.compare import assert_parity
from tests.models import perturb_, randn, token_ids
from tests.parity.families import FAMILIES, family_model
from tests.targets import TARGETS

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}
IDS = 3 + token_ids(1, 2, 7, high=37)  # none of them special
EMBEDDINGS = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "embed_tokens"}
TIED = {("gpt2", "embedding"), ("t5", "embedding")}  # where PEFT's merge changes what shares the weight too
USUAL = FAMILIES.keys() - {"mamba", "mixtral", "distilbert"}  # where "all-linear" is the same to PEFT, see below
# what is adapted -> the families, and the fields for a family
CONFIGS = {
    "all-linear": (USUAL, lambda family: {"target_modules": "all-linear"}),
    "table": (FAMILIES.keys() - USUAL, lambda family: {"target_modules": list(TARGETS[family].linears)}),
    "dora": (FAMILIES, lambda family: {"target_modules": list(TARGETS[family].linears), "use_dora": True}),
    "bias": (USUAL, lambda family: {"target_modules": "all-linear", "bias": "lora_only", "use_rslora": True}),
    "embedding": (
        EMBEDDINGS,
        lambda family: {
            "target_modules": [EMBEDDINGS[family], TARGETS[family].linears[0]],
            "alpha_pattern": {EMBEDDINGS[family]: 3},
        },
    ),
    "head": (
        ["llama", "gpt2", "falcon"],
        lambda family: {"target_modules": [TARGETS[family].linears[0]], "modules_to_save": ["lm_head"]},
    ),
}
CASES = [(family, what) for what, (families, _) in CONFIGS.items() for family in sorted(families)]
cases = pytest.mark.parametrize(("family", "what"), CASES)


def fields(family, what):
    """Those of a `LoraConfig`, ours or PEFT's; the scale is not 1."""
    return {"r": 3, "lora_alpha": 7, "task_type": TASKS.get(FAMILIES[family][0]), **CONFIGS[what][1](family)}


def logits(model, family):
    if family == "vit":
        return model(pixel_values=randn(2, 2, 3, 8, 8, dtype=torch.float32)).logits
    if family == "whisper":
        return model(input_features=randn(2, 2, 8, 32, dtype=torch.float32), decoder_input_ids=IDS).logits
    return model(IDS, **({"decoder_input_ids": IDS.flip(1)} if family == "t5" else {})).logits


def ours_with(family, what):
    model = family_model(family)
    ml.attach(model, ml.LoraConfig(**fields(family, what)))
    return model


def theirs_with(family, what):
    return peft.get_peft_model(family_model(family), peft.LoraConfig(**fields(family, what)))


@cases
def test_peft_loads_what_we_save_and_chooses_and_trains_the_same(family, what, tmp_path):
    ours = ours_with(family, what)
    perturb_(ours)
    ml.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(family_model(family), tmp_path)
    assert_parity(logits(ours, family), logits(theirs, family))
    theirs = theirs_with(family, what)
    low_rank = {path for path, layer in adapter_layers(ours).items() if not isinstance(layer, ModulesToSave)}
    chosen = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert low_rank == {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in chosen}
    trainable, total = theirs.get_nb_trainable_parameters()
    if what == "bias":  # PEFT trains the base's own; ours has them twice
        biases = [p for name, p in theirs.named_parameters() if p.requires_grad and name.endswith("base_layer.bias")]
        total += sum(bias.numel() for bias in biases)
    assert tuple(ml.count_parameters(ours)) == (trainable, total)


def load(family, directory):
    """A model with the adapter, whose logits without it are the base's."""
    model, base = family_model(family), logits(family_model(family).requires_grad_(False), family)
    ml.load_adapter(model, directory)
    with ml.disable_adapter(model):
        assert torch.equal(logits(model, family), base)
    assert (logits(model, family) - base).abs().max() > 0.01 * base.abs().max()  # or nothing would be compared
    return model


@cases
def test_we_load_what_peft_saves_and_merge_to_the_same(family, what, tmp_path):
    theirs = theirs_with(family, what)
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    ours, expected = load(family, tmp_path), logits(theirs, family)
    assert_parity(logits(ours, family), expected)
    ml.merge(ours)
    assert_parity(logits(ours, family), expected)
    if (family, what) not in TIED:
        assert_parity(logits(ours, family), logits(theirs.merge_and_unload(), family))


def test_all_linear_leaves_out_the_experts_of_mixtral_unlike_in_peft(tmp_path):
    theirs = theirs_with("mixtral", "all-linear")
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    assert theirs.peft_config["default"].target_parameters == {"gate.weight", "gate_up_proj", "down_proj"}
    with pytest.raises(ml.FormatError, match=r"it is a recipe: see recipes/experts\.py"):
        ml.load_adapter(family_model("mixtral"), tmp_path)
    fresh = ours_with("mixtral", "all-linear")
    assert {path.split(".")[-1] for path in adapter_layers(fresh)} == set(TARGETS["mixtral"].linears)


def test_what_is_trained_in_full_gets_no_adapter_where_peft_gives_it_one_and_fails():
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        theirs_with("distilbert", "all-linear")
    layers = adapter_layers(ours_with("distilbert", "all-linear"))
    assert {path for path in layers if "classifier" in path} == {"classifier", "pre_classifier"}
    assert all(isinstance(layers[path], ModulesToSave) for path in ("classifier", "pre_classifier"))

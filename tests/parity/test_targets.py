"""Ours and PEFT's: the same names mean the same modules, in models of every family that people adapt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers, base_modules
from minilora.adapters.attach import find_target_modules, path_of
from minilora.adapters.build import find_targets, wrapper_class
from minilora.adapters.config import is_target
from tests.parity.families import FAMILIES, family_model
from tests.targets import TARGETS
from tests.test_lora_config import MEANT, NOT_MEANT, named

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")


def theirs_means(path, fields):
    return bool(tuners_utils.check_target_module_exists(peft.LoraConfig(**fields), path))


@pytest.mark.parametrize(("path", "names"), [(path, names) for path, *names in MEANT + NOT_MEANT])
def test_peft_says_the_same_of_its_table(path, names):
    assert theirs_means(path, named(*names)) == is_target(path, ml.LoraConfig(**named(*names)))


PARTS = st.sampled_from(["layers", "h", "0", "1", "10", "attn", "q", "qq"])
PATHS = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
ENTRIES = st.lists(PARTS, min_size=1, max_size=2).map(".".join)
NAMES = st.lists(ENTRIES, min_size=1, max_size=3)
PATTERNS = st.sampled_from([r".*\.q", r"(layers|h)\.\d+\..*", "attn", r".*1.*"])


@st.composite
def fields(draw):
    found = {
        "target_modules": draw(NAMES | PATTERNS),
        "exclude_modules": draw(st.none() | NAMES | PATTERNS),
        "modules_to_save": draw(st.none() | NAMES),
    }
    if isinstance(found["target_modules"], list) and draw(st.booleans()):
        found["layers_to_transform"] = draw(st.lists(st.sampled_from([0, 1, 10]), min_size=1, max_size=2))
        found["layers_pattern"] = draw(st.none() | st.lists(st.sampled_from(["layers", "h"]), min_size=1, max_size=2))
    return found


@given(PATHS, fields())
def test_names_layers_and_exclusions_mean_what_they_mean_to_peft(path, fields):
    if "layers_to_transform" in fields and path in fields["target_modules"]:
        return  # a full name is adapted there whatever its layer
    assert theirs_means(path, fields) == is_target(path, ml.LoraConfig(**fields))


def ours_chosen(model, **fields):
    return set(find_targets(base_modules(model), ml.LoraConfig(**fields), path_of(model, "get_output_embeddings")))


def test_where_fused_kernels_read_the_weights_themselves_an_adapter_is_refused_as_by_peft():
    model = family_model("mamba")
    with pytest.warns(UserWarning, match=r"leaves out \{'Linear': \d+\}, such as 'backbone\.layers\.0\.mixer\.\w+'"):
        assert {path.rpartition(".")[2] for path in ours_chosen(model)} == {"in_proj"}
    for name in ("out_proj", "conv1d"):
        with pytest.raises(ml.TargetError, match=f"'{name}'"):
            ours_chosen(model, target_modules=[name])
        with pytest.raises(ValueError, match="incompatible"):
            peft.get_peft_model(family_model("mamba"), peft.LoraConfig(target_modules=[name]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_can_be_adapted_and_the_table_has_what_the_model_has(family):
    model, row = family_model(family), TARGETS[family]
    assert all(wrapper_class(module) for module in base_modules(model).values() if isinstance(module, nn.Linear))
    assert find_target_modules(model) == sorted(row.linears)
    adapted = ours_chosen(model, target_modules=row.linears)
    rest = {
        path
        for path, module in base_modules(model).items()
        if path.split(".")[0] not in ("lm_head", "classifier", "pre_classifier", "proj_out", "embed_out")
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    left = {path.rpartition(".")[2] for path in rest - adapted if any(map(str.isdecimal, path.split(".")))}
    assert left == set(row.leave)


def test_every_row_of_the_table_is_tested_and_what_is_adapted_already_is_found_as_before():
    assert TARGETS.keys() == FAMILIES.keys()
    model = family_model("llama")
    found = find_target_modules(model)
    ml.attach(model, ml.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert adapter_layers(model)
    assert find_target_modules(model) == found


@pytest.mark.parametrize("targets", [r".*\.(0\.self_attn\.q_proj|1\.mlp\.up_proj)", ["embed_tokens", "lm_head"]])
def test_the_names_of_tensors_name_the_modules_that_peft_would_inject(targets):
    """The expression that docs/migration.md has for it."""
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), family_model("llama"))
    tensors = peft.get_peft_model_state_dict(theirs)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(), family_model("llama"), state_dict=tensors)
    names = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    injected = {path for path, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert ours_chosen(family_model("llama"), target_modules=names) == injected

"""`inspect` on the whole family: each change is that of the merged weights, each verdict what such a reader does.

The readers here are restated from the sources of vLLM and of llama.cpp, as loops over names: what they refuse, and the
weights that they compute. A verdict has to say yes exactly where the model that comes out is the right one.
"""

import json

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from minilora.adapters.find import adapter_layers
from minilora.storage import write_json
from minilora.tools.export import export_adapter
from minilora.tools.inspect_adapter import adapter_facts
from tests.files import edit, write_base
from tests.models import randn, tiny_model
from tests.test_inspect import CHANGES, assert_number, spoilt
from tests.tolerance import PARITY, assert_parity, relative

IDS = torch.arange(12).view(2, 6)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def disturb_(model, seed=0):
    """Everything that an adapter trains becomes another, so that what a reader leaves out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place in adapter_layers(model).values():
            for name in place.configs:
                for parameter in place.trained(name):
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def write(directory, model, **config):
    """The model with a trained adapter, which is saved."""
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 6, **config}))
    disturb_(model)
    ml.save_adapter(model, directory)
    return model


class RefusedError(Exception):
    """A reader takes no such adapter."""


def vllm_changes(values, tensors):
    if values["use_dora"] or values["modules_to_save"] or values["bias"] != "none":
        raise RefusedError
    scale = values["lora_alpha"] / (values["r"] ** 0.5 if values["use_rslora"] else values["r"])
    found = {}
    for name, tensor in tensors.items():
        words = name.removeprefix("base_model.model.").split(".")
        if name.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")):
            continue
        if words[-1] == "weight" and words[-2] in ("lora_A", "lora_B"):
            module, side = words[:-2], words[-2]
        elif words[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, side = words[:-1], words[-1].replace("embedding_", "")
        else:
            raise RefusedError
        if module[-1] not in (*LINEARS, "embed_tokens", "lm_head"):
            raise RefusedError
        found.setdefault(".".join(module), {})[side] = tensor
    return {where: scale * (pair["lora_B"] @ pair["lora_A"]) for where, pair in found.items()}


def llama_cpp_changes(values, tensors):
    found = {}
    for name, tensor in tensors.items():
        sides = [side for side in ("A", "B") if f".lora_{side}.weight" in name or f".lora_embedding_{side}" in name]
        if not sides and ".base_layer.weight" in name:
            continue
        if not sides and ("_layernorm" in name or ".norm" in name):
            continue  # converted, and passed over when it is loaded
        if not sides:
            raise RefusedError
        where = name.replace("base_model.model.", "").replace(f".lora_{sides[0]}.weight", "")
        found.setdefault(where.replace(f".lora_embedding_{sides[0]}", ""), {})[sides[0]] = tensor
    return {w: values["lora_alpha"] / each["B"].shape[-1] * (each["B"] @ each["A"]) for w, each in found.items()}


def logits(base, changes):
    """Of the model whose weights these changes are added to."""
    model = ml.load_model(base)
    with torch.no_grad():
        for where, change in changes.items():
            weight = model.get_submodule(where).weight
            weight += change if change.shape == weight.shape else change.T
        return model(IDS)


READERS = {"vLLM": vllm_changes, "llama.cpp": llama_cpp_changes}


def is_right(base, changes, directory, expected):
    """Has the model that a reader makes of a base and an adapter these logits?"""
    values, tensors = json.loads((directory / CONFIG_FILE).read_text()), load_file(directory / WEIGHTS_FILE)
    try:
        return relative(logits(base, changes(values, tensors)), expected, PARITY) <= 1
    except RefusedError:
        return False


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), attention_bias=True, mlp_bias=True)


targets = st.lists(st.sampled_from(LINEARS), min_size=1, max_size=3, unique=True)
configs = st.fixed_dictionaries(
    {"target_modules": targets.map(tuple) | targets.map(lambda names: (*names, "embed_tokens"))},
    optional={
        "use_rslora": st.just(True),
        "use_dora": st.just(True),
        "bias": st.sampled_from(["lora_only", "all"]),
        "lora_bias": st.just(True),
        "modules_to_save": st.sampled_from([("lm_head",), ("norm",), ("input_layernorm",)]),
        "trainable_token_indices": st.just((3, 5)),
        "rank_pattern": st.just(5),
        "alpha_pattern": st.sampled_from([10, 4.5]),
    },
)


@given(configs)
def test_a_verdict_says_yes_where_the_reader_s_model_is_the_right_one(tmp_path_factory, base, config):
    directory = tmp_path_factory.mktemp("adapter")
    first = config["target_modules"][0]
    config |= {key: {first: config[key]} for key in ("rank_pattern", "alpha_pattern") if key in config}
    try:
        model = write(directory, ml.load_model(base), **config)
    except ml.MiniloraError:
        assume(False)
    for measured in (None, base):
        problems = adapter_facts(directory, measured).problems
        assert problems["minilora"] == problems["PEFT"] == []
        for tool, changes in READERS.items():
            event(f"{tool}: {not problems[tool]}")
            assert (not problems[tool]) == is_right(base, changes, directory, model(IDS)), (tool, problems[tool])


@given(configs)
def test_what_has_a_plain_form_is_read_by_all_once_it_is_written(tmp_path_factory, base, config):
    first, plain = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("plain")
    target = config["target_modules"][0]
    few = {key: config[key] for key in ("target_modules", "use_rslora") if key in config}
    more = {key: {target: config[key]} for key in ("rank_pattern", "alpha_pattern") if key in config}
    model = write(first, ml.load_model(base), **few, **more)
    export_adapter(first, plain)
    problems = adapter_facts(plain, base).problems
    assert [tool for tool, reasons in problems.items() if reasons] == ["mlx-lm"]
    assert all(is_right(base, changes, plain, model(IDS)) for changes in READERS.values())


MORE = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")  # llama.cpp looks for their tensors alone
BOTH = ("use_dora", "target_parameters", "fan_in_fan_out")


@pytest.mark.parametrize(
    ("tool", "field"), [("vLLM", key) for key in MORE + BOTH] + [("llama.cpp", key) for key in BOTH]
)
def test_a_field_that_a_reader_cannot_follow_is_enough(tmp_path, base, tool, field):
    write(tmp_path, ml.load_model(base), target_modules=("q_proj",))
    assert not adapter_facts(tmp_path).problems[tool]
    edit(tmp_path, **{field: "all" if field == "bias" else ["lm_head"]})
    assert any(reason.startswith(f"{field}: ") for reason in adapter_facts(tmp_path).problems[tool])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_llama_cpp_has_one_tensor_for_a_tied_embedding_and_head(tmp_path, target, is_tied):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=is_tied)
    ml.save_model(model, tmp_path / "base")
    write(tmp_path / "adapter", model, target_modules=(target,))
    assert not adapter_facts(tmp_path / "adapter").problems["llama.cpp"]
    assert bool(adapter_facts(tmp_path / "adapter", tmp_path / "base").problems["llama.cpp"]) == is_tied


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_the_change_of_a_module_is_what_merging_does_to_its_weight(tmp_path, base, config):
    model = write(tmp_path, ml.load_model(base), target_modules=(*LINEARS, "embed_tokens"), **config)
    places, facts = adapter_layers(model), adapter_facts(tmp_path, base)
    assert {each.module for each in facts.modules} == set(places)
    for each in facts.modules:
        place = places[each.module]
        weight, merged = (w.detach().double() for w in (place.base.weight, place.weight))
        assert_number(each.delta_norm, (merged - weight).norm().item(), assert_parity)
        assert_number(each.relative_norm, ((merged - weight).norm() / weight.norm()).item(), assert_parity)
    alone = adapter_facts(tmp_path).modules
    assert all((each.delta_norm is None) == bool(config) for each in alone)
    assert [each.effective_rank for each in alone] == [each.effective_rank for each in facts.modules]


def test_copies_biases_and_rows_are_told_with_how_far_they_are_from_the_base(tmp_path, base):
    config = {"bias": "all", "modules_to_save": ("lm_head",), "trainable_token_indices": (5, 3), "use_dora": True}
    write(tmp_path, ml.load_model(base), target_modules=("q_proj",), **config)
    held, old = load_file(tmp_path / WEIGHTS_FILE), load_file(base / "model.safetensors")
    others = adapter_facts(tmp_path, base).other_tensors
    assert set(others) == {name for name in held if ".lora_A" not in name and ".lora_B" not in name}
    for name, each in others.items():
        where = name.removeprefix("base_model.model.")
        assert each.shape == tuple(held[name].shape)
        if "magnitude" in name:
            expected = old[where.replace("lora_magnitude_vector", "weight")].norm(dim=1)
        elif "token_adapter" in name:
            expected = old["model.embed_tokens.weight"][[5, 3]]
        else:
            expected = old[where.replace(".base_layer", "")]
        ratio = (held[name] - expected).norm() / expected.norm()
        assert ratio > 0
        assert_number(each.relative_change, ratio.item(), assert_parity)
    assert all(each.relative_change is None for each in adapter_facts(tmp_path).other_tensors.values())
    copies = ("lm_head.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta")
    assert {f"base_model.model.{name}" for name in copies} <= set(others)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.up = torch.nn.Parameter(randn(0, 3, 10, 4, dtype=torch.float32))
        self.experts.down = torch.nn.Parameter(randn(1, 3, 4, 5, dtype=torch.float32))
        self.conv = torch.nn.Conv1d(4, 6, 3)


def test_stacked_experts_and_convolutions_have_the_norms_of_their_changes(tmp_path):
    model = Experts()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    names = ("experts.up", "experts.down")
    write(tmp_path, model, target_modules=("conv",), target_parameters=names, rank_pattern={"conv": 2})
    facts = {each.module: each for each in adapter_facts(tmp_path, tmp_path / "base").modules}
    place, conv = (adapter_layers(model)[path] for path in ("experts", "conv"))
    expected = {name: [place.base.get_parameter(name), place.changed_parameters()[name]] for name in ("up", "down")}
    conv_weights = [conv.base.weight, conv.weight]
    expected = {"experts.base_layer": expected["up"], "experts": expected["down"], "conv": conv_weights}
    assert facts.keys() == expected.keys()
    for where, (old, new) in expected.items():
        assert facts[where].rank == (2 if where == "conv" else 3)
        assert_number(facts[where].delta_norm, (new - old).norm().item(), assert_parity)
        assert_number(facts[where].base_norm, old.norm().item(), assert_parity)


@pytest.mark.parametrize("pattern", [{"experts.up": 1}, {"experts.up": 4, "experts.down": 4}])
def test_the_rank_of_stacked_experts_is_unknown_where_the_config_has_two_or_one_that_does_not_fit(tmp_path, pattern):
    write(tmp_path, Experts(), target_modules=(), target_parameters=("experts.up", "experts.down"))
    edit(tmp_path, rank_pattern=pattern)
    assert all(each.scale is None and each.delta_norm is None for each in adapter_facts(tmp_path).modules)


ENDINGS = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_A.other.weight"),
    *("lora_magnitude_vector", "base_layer.weight", "base_layer.bias", "weight"),
    "token_adapter.trainable_tokens_delta",
)
PATHS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp", "model.embed_tokens", "lm_head", "model.norm", "x")
FIELDS = {
    "use_dora": [True, 3],
    "fan_in_fan_out": [True],
    "target_parameters": [["mlp.up_proj"], ["layers.0.mlp"], [3], "x"],
    "trainable_token_indices": [[3], [10**9], {"embed_tokens": [1, 2]}, {"embed_tokens": "x"}, {"x": [[1]]}],
    "modules_to_save": [["lm_head"], [None], 1],
    "rank_pattern": [{"up_proj": 2}, {"mlp": 0}, [1]],
    "init_lora_weights": ["pissa", [1]],
}
names = st.builds(
    "{}{}.{}".format, st.sampled_from(["base_model.model.", ""]), st.sampled_from(PATHS), st.sampled_from(ENDINGS)
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 24, 40, 61]), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
fields = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in FIELDS.items()})


@given(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=4), fields)
def test_whatever_tensors_and_fields_there_are_each_is_told_once(tmp_path_factory, base, tensors, values):
    directory = tmp_path_factory.mktemp("any")
    save_file({k: torch.ones(shape).to(dtype) for k, (shape, dtype) in tensors.items()}, directory / WEIGHTS_FILE)
    write_json(directory / CONFIG_FILE, {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **values})
    for measured in (None, base):
        facts = adapter_facts(directory, measured)
        assert 2 * len(facts.modules) + len(facts.other_tensors) == len(tensors)
        assert set(facts.other_tensors) <= set(tensors)


UNASKED = (
    *("another size", "another layer", "ranks that differ", "no matrix", "a whole head"),  # only the base tells
    "a wild pattern",  # which PEFT tries for minutes
)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", [case for case in CHANGES if case not in UNASKED])
def test_the_verdict_on_peft_comes_true(tmp_path, base, case):
    """It reads an adapter if it loads it, lacks nothing, and leaves nothing over."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    write_base(tmp_path / "base")
    spoilt(tmp_path / "adapter", CHANGES[case])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(tmp_path / "adapter"), "default")
        found = model.load_adapter(tmp_path / "adapter", "default")
        is_read = not found.unexpected_keys and not [key for key in found.missing_keys if "lora_" in key]
    except Exception:  # of whatever kind: PEFT checks little
        is_read = False
    assert (not adapter_facts(tmp_path / "adapter").problems["PEFT"]) == is_read

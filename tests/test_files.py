import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.lora.attach import adapter_layers
from minilora.lora.files import BASE, CONFIG_FILE, WEIGHTS_FILE, base_quantization
from minilora.storage import write_tensors
from tests.models import FAMILIES, randomize_adapters_, scales, seeds, tiny_model, token_ids
from tests.tolerance import assert_parity

IDS = token_ids(3, 2, 7)
GOLDEN = Path(__file__).parent / "golden" / "adapters"


def saved(directory, family="llama", seed=0, **config):
    """A model with a random adapter, saved in `directory`."""
    model = tiny_model(family, dtype=torch.float32)
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **config}), seed=seed)
    randomize_adapters_(model, seed)
    ml.save_adapter(model, directory)
    return model


def edit(directory, **changes):
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HELD = {"quantize": "nf4", "double_quant": True, "block_size": 64, "quantize_skip": ["down_proj"]}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '"nf4"', "{}", '{"quantize": "none", "quantize_skip": ["a"]}', "[" * 100_000),
        *(json.dumps({**HELD, "quantize": value}) for value in ("int8", ["nf4"], None)),
        *(json.dumps({**HELD, "double_quant": value}) for value in ("no", 1, None)),
        *(json.dumps({**HELD, "block_size": value}) for value in (0, 48, "64", "\x1b[31m")),
        *(json.dumps({**HELD, "quantize_skip": value}) for value in ("down_proj", {"a": 1}, [1], ["\x1b[31m"])),
        *(json.dumps({key: value for key, value in HELD.items() if key != lacking}) for lacking in HELD),
    ],
)
def test_what_an_adapter_says_of_its_base_is_refused_where_it_is_not_understood(text, tmp_path):
    write_tensors(tmp_path / WEIGHTS_FILE, {"a": torch.ones(2, 2)}, {BASE: text})
    with pytest.raises(ml.FormatError) as error:
        base_quantization(tmp_path)
    assert WEIGHTS_FILE in str(error.value)
    assert BASE in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("held", [{"quantize": "none"}, HELD, {**HELD, "quantize": "fp4", "quantize_skip": []}])
def test_what_an_adapter_says_of_its_base_is_read_without_what_nobody_knows(held, tmp_path):
    more = held if held == {"quantize": "none"} else {**held, "later": 1}
    write_tensors(tmp_path / WEIGHTS_FILE, {"a": torch.ones(2, 2)}, {BASE: json.dumps(more)})
    assert base_quantization(tmp_path) == held


@given(st.sampled_from(sorted(FAMILIES)), seeds, scales, st.booleans())
def test_what_was_saved_loads_equal_and_saves_the_same_bytes(tmp_path_factory, family, seed, scale, use_rslora):
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    model = saved(first, family, seed, lora_alpha=3 * scale, use_rslora=use_rslora)
    again = tiny_model(family, dtype=torch.float32)
    ml.load_adapter(again, first)
    assert torch.equal(again(IDS), model(IDS))
    ml.save_adapter(again, second)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_adapters_that_peft_wrote_have_the_logits_that_peft_computed(case):
    model = tiny_model(dtype=torch.float32)
    ml.load_adapter(model, GOLDEN / case)
    assert_parity(model(IDS), load_file(GOLDEN / case / "logits.safetensors")["logits"])


@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        ({"layers.1.self_attn.q_proj": 5, "q_proj": 2}, {"layers.1.self_attn.q_proj": 50, "q_proj": 4}),
        ({r"(q|v)_proj": 2}, {r"layers\.[01]\..*": 5}),
        ({"^model.layers.0.mlp.up_proj": 1}, {}),
    ],
)
def test_patterns_survive_the_file_in_their_order(tmp_path, rank_pattern, alpha_pattern):
    model = saved(tmp_path, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    again = tiny_model(dtype=torch.float32)
    ml.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    ours, theirs = adapter_layers(model), adapter_layers(again)
    assert {path: layer.scales for path, layer in ours.items()} == {
        path: layer.scales for path, layer in theirs.items()
    }


def test_the_layout_is_peft_s(tmp_path):
    model = saved(tmp_path, target_modules=("q_proj", "down_proj"))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert len(tensors) == 2 * 2 * 4
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], model.model.layers[0].self_attn.q_proj.lora_A["default"])
    assert tensors[f"{prefix}.lora_B.weight"].shape == (24, 3)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert list(config) == sorted(config)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 21)
    assert config["target_modules"] == ["down_proj", "q_proj"]


def test_target_modules_are_full_paths_where_endings_would_mean_more(tmp_path):
    saved(tmp_path, target_modules=("layers.1.self_attn.q_proj",))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_the_base_model_s_name_is_written(tmp_path):
    model = tiny_model()
    model.name_or_path = "somebody/something"
    ml.attach(model, ml.LoraConfig())
    ml.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "somebody/something"


def test_a_loaded_adapter_is_active_and_frozen_unless_it_is_to_be_trained(tmp_path):
    saved(tmp_path)
    model = tiny_model(dtype=torch.float32)
    ml.load_adapter(model, tmp_path)
    assert ml.count_parameters(model).trainable == 0
    ml.load_adapter(model, tmp_path, name="second", trainable=True)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    assert all(layer.active == ("second",) for layer in adapter_layers(model).values())


def test_a_bfloat16_file_becomes_float32_on_a_bfloat16_base(tmp_path):
    model = saved(tmp_path)
    save_file({k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS_FILE).items()}, tmp_path / WEIGHTS_FILE)
    other = tiny_model(dtype=torch.bfloat16)
    ml.load_adapter(other, tmp_path)
    theirs, ours = (adapter_layers(m)["model.layers.0.mlp.up_proj"].lora_A["default"] for m in (model, other))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.bfloat16().float())


def test_names_with_the_adapter_s_own_name_in_them_load(tmp_path):
    model = saved(tmp_path)
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    other = tiny_model(dtype=torch.float32)
    ml.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_a_copy_of_the_base_s_weight_must_be_this_base_s(tmp_path):
    model = saved(tmp_path, target_modules=("lm_head", "q_proj"))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.base_layer.weight"] = model.lm_head.base.weight.detach().clone()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    again = tiny_model(dtype=torch.float32)
    ml.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(ml.TargetError, match=r"lm_head\.base_layer\.weight"):
        ml.load_adapter(tiny_model(seed=1, dtype=torch.float32), tmp_path)


def test_ranks_come_from_the_tensors(tmp_path):
    model = saved(tmp_path, rank_pattern={"q_proj": 2}, use_rslora=True)
    edit(tmp_path, rank_pattern={"q_proj": 7})
    other = tiny_model(dtype=torch.float32)
    ml.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_loading_onto_other_shapes_names_both(tmp_path):
    saved(tmp_path)
    with pytest.raises(ml.TargetError, match=r"q_proj: the adapter has A \(3, 24\) and B \(24, 3\), .*\(32, 32\)"):
        ml.load_adapter(tiny_model(hidden_size=32, dtype=torch.float32), tmp_path)


def test_loading_onto_another_architecture_names_what_is_not_there(tmp_path):
    saved(tmp_path)
    model = tiny_model("phi3", dtype=torch.float32)
    with pytest.raises(ml.TargetError, match=r"q_proj: the model has no such linear(.|\n)*and 10 more"):
        ml.load_adapter(model, tmp_path)
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa"},
        {"auto_map": {"AutoModel": "evil.py"}},
        {"alpha_pattern": {r"([a-z0-9_.]+)+!": 3}},
        {"rank_pattern": ["q_proj"]},
        {"r": "many"},
        {"lora_alpha": -1},
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_key(tmp_path, change):
    saved(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ml.FormatError, match=rf"{CONFIG_FILE}(.|\n)*{next(iter(change))}"):
        ml.load_adapter(tiny_model(dtype=torch.float32), tmp_path)


def test_an_unknown_key_that_says_nothing_is_accepted(tmp_path):
    model = saved(tmp_path)
    edit(tmp_path, invented_tomorrow=None, also_invented=False, and_this={})
    other = tiny_model(dtype=torch.float32)
    ml.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_ranks_need_no_pattern_whatever_the_file_s_says(tmp_path):
    model = saved(tmp_path, rank_pattern={"q_proj": 2})
    edit(tmp_path, rank_pattern={r"([a-z0-9_.]+)+!": 7, r".*\.v_proj": 9})
    other = tiny_model(dtype=torch.float32)
    ml.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    ml.save_adapter(other, tmp_path)
    ml.load_adapter(other, tmp_path, name="again")
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("lora_B.weight", "lora_magnitude_vector"),
        lambda name: name.replace("layers.0.self_attn.q_proj.lora_B", "layers.9.self_attn.q_proj.lora_B"),
    ],
)
def test_unexpected_tensors_are_refused_by_name(tmp_path, rename):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ml.FormatError, match=WEIGHTS_FILE):
        ml.load_adapter(tiny_model(dtype=torch.float32), tmp_path)


def test_a_missing_file_is_told_by_name(tmp_path):
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        saved(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ml.FormatError, match=name):
            ml.load_adapter(tiny_model(dtype=torch.float32), tmp_path)


def test_saving_an_adapter_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ml.TargetError, match="'default'"):
        ml.save_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("spoil", [lambda t: t.long(), lambda t: t * torch.nan, lambda t: t.bool()])
def test_factors_that_are_no_finite_numbers_are_refused_by_name(tmp_path, spoil):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = sorted(tensors)[0]
    save_file({**tensors, name: spoil(tensors[name])}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ml.FormatError, match=name):
        ml.load_adapter(tiny_model(dtype=torch.float32), tmp_path)


def test_a_factor_that_is_there_twice_is_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = sorted(tensors)[0]
    save_file({**tensors, name.replace(".weight", ".other.weight"): tensors[name] + 1}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ml.FormatError, match="more than one"):
        ml.load_adapter(tiny_model(dtype=torch.float32), tmp_path)

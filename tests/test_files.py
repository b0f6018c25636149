import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import files
from minilora.adapter import adapter_layers
from minilora.adapters.layout import BASE_METADATA, CONFIG_FILE, WEIGHTS_FILE, base_quantization
from minilora.files import write_tensors
from minilora.testing.compare import PARITY, relative
from tests.files import edit, save_file, saved
from tests.models import (
    CONFIGS,
    WHOLE,
    randomize_adapters_,
    tiny_model,
    token_ids,
    train_a_little,
    trained_of,
)

IDS = token_ids(3, 2, 7)
HELD = {"quantize": "nf4", "double_quant": True, "block_size": 64}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
E = "base_model.model.model.embed_tokens"


def loaded(directory, family="llama", **changes):
    """A fresh model with the adapter of a directory."""
    model = tiny_model(family, dtype=torch.float32, **changes)
    ml.load_adapter(model, directory)
    return model


def small_model():
    return tiny_model(WHOLE, dtype=torch.float32, num_hidden_layers=2)


def with_adapter(case):
    """A model with a new adapter of `CONFIGS`."""
    model = small_model()
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **CONFIGS[case]}))
    return model


def tensors_of(directory):
    return load_file(directory / WEIGHTS_FILE)


def write_changed(directory, change):
    """Write the tensors of an adapter again; `change` makes of a name and its tensor what stands there instead."""
    save_file(dict(change(name, tensor) for name, tensor in tensors_of(directory).items()), directory / WEIGHTS_FILE)


def same_bytes(one, other):
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", "[" * 100_000),
        *(
            json.dumps({**HELD, **wrong})
            for wrong in ({"quantize": None}, {"double_quant": 1}, {"block_size": "\x1b[31m"})
        ),
    ],
)
def test_what_an_adapter_says_of_its_base_is_refused_where_it_is_not_understood(text, tmp_path):
    write_tensors(tmp_path / WEIGHTS_FILE, {"a": torch.ones(2, 2)}, {BASE_METADATA: text})
    with pytest.raises(ml.FormatError, match=WEIGHTS_FILE) as error:
        base_quantization(tmp_path)
    assert BASE_METADATA in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("held", [{"quantize": "none"}, HELD, {**HELD, "quantize": "fp4"}])
def test_what_an_adapter_says_of_its_base_is_read_without_what_nobody_knows(held, tmp_path):
    more = held if held == {"quantize": "none"} else {**held, "later": 1}
    write_tensors(tmp_path / WEIGHTS_FILE, {"a": torch.ones(2, 2)}, {BASE_METADATA: json.dumps(more)})
    assert base_quantization(tmp_path) == held


@pytest.mark.parametrize("case", CONFIGS)
def test_all_that_a_config_can_ask_for_loads_equal_and_saves_the_same_bytes(tmp_path, case):
    """And no weight is in the file but what was trained."""
    model = with_adapter(case)
    train_a_little(model, IDS, steps=2)
    ml.save_adapter(model, tmp_path / "first")
    assert sum(tensor.numel() for tensor in tensors_of(tmp_path / "first").values()) == numbers_of_a_file(model)
    base, again = small_model(), loaded(tmp_path / "first", WHOLE, num_hidden_layers=2)
    assert torch.equal(again(IDS), model(IDS))
    ml.save_adapter(again, tmp_path / "second")
    same_bytes(tmp_path / "first", tmp_path / "second")
    with ml.disable_adapter(again):
        assert torch.equal(again(IDS), base(IDS))
    ml.detach(again)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in again.state_dict().items())


def numbers_of_a_file(model):
    """As many as are trained; with their start if they began as a part of the weights."""
    factors = 2 if "start_A" in str([name for name, _ in model.named_buffers()]) else 1
    trained = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    return sum(factors ** (kind in ("lora_A", "lora_B")) * p.numel() for kind, p in trained)


def test_what_began_as_a_part_of_the_weights_is_a_plain_adapter_of_twice_the_rank(tmp_path):
    model = tiny_model(dtype=torch.float32)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=21, init_lora_weights="pissa"))
    train_a_little(model, IDS)
    ml.save_adapter(model, tmp_path)
    values, tensors = json.loads((tmp_path / CONFIG_FILE).read_text()), tensors_of(tmp_path)
    assert (values["r"], values["lora_alpha"], values["init_lora_weights"]) == (6, 42, True)
    name = "model.layers.2.mlp.up_proj"
    layer = adapter_layers(model)[name]
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    assert (A.shape, B.shape) == ((6, 24), (40, 6))
    assert relative(layer.base.weight.double() + 7 * B @ A, layer.merged_weight(), PARITY) < 1


def test_target_modules_are_full_paths_where_endings_would_mean_more(tmp_path):
    saved(tmp_path, target_modules=("layers.1.self_attn.q_proj",))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_a_loaded_adapter_is_active_and_frozen_unless_it_is_to_be_trained(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    assert ml.count_parameters(model).trainable == 0
    ml.load_adapter(model, tmp_path, name="second", trainable=True)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    assert all(layer.active == ("second",) for layer in adapter_layers(model).values())


@pytest.mark.parametrize("is_trained", [False, True])
def test_dropout_of_a_loaded_adapter_acts_only_if_it_is_to_be_trained(is_trained, tmp_path):
    """Whatever mode the model is in: one that is built is in training mode."""
    saved(tmp_path, lora_dropout=0.5)
    model = small_model().train()
    with pytest.raises(ml.TargetError):
        ml.load_adapter(model, tmp_path)
    assert model.training
    model = tiny_model(dtype=torch.float32).train()
    ml.load_adapter(model, tmp_path, trainable=is_trained)
    assert torch.equal(model(IDS), model(IDS)) != is_trained


def test_a_bfloat16_file_becomes_float32_on_a_bfloat16_base(tmp_path):
    model = saved(tmp_path)
    write_changed(tmp_path, lambda name, tensor: (name, tensor.bfloat16()))
    other = tiny_model(dtype=torch.bfloat16)
    ml.load_adapter(other, tmp_path)
    theirs, ours = (adapter_layers(m)["model.layers.0.mlp.up_proj"].adapters["default"].lora_A for m in (model, other))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.bfloat16().float())


@pytest.mark.parametrize("case", ["LoRA", "rsLoRA with patterns", "PiSSA by DoRA", "the embedding adapted"])
def test_a_scale_that_was_set_is_the_one_that_is_saved(case, tmp_path):
    model = with_adapter(case)
    randomize_adapters_(model)
    for i, layer in enumerate(adapter_layers(model).values()):
        layer.adapters["default"].scale *= 1 + i % 3
    ml.save_adapter(model, tmp_path)
    again = loaded(tmp_path, WHOLE, num_hidden_layers=2)
    assert relative(again(IDS), model(IDS), PARITY) < 1


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"q_proj": 7}},  # ranks come from the tensors
        {"rank_pattern": {r"([a-z0-9_.]+)+!": 7, r".*\.v_proj": 9}},  # so no pattern is tried
        {"bias": "all"},  # of which this model has none
        {"invented_tomorrow": None, "also_invented": False, "and_this": {}},
    ],
)
def test_what_a_config_says_in_vain_changes_nothing(tmp_path, change):
    model = saved(tmp_path, rank_pattern={"q_proj": 2}, use_rslora=True)
    edit(tmp_path, **change)
    other = loaded(tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    ml.save_adapter(other, tmp_path)
    assert torch.equal(loaded(tmp_path)(IDS), model(IDS))


def test_an_adapter_that_does_not_fit_a_model_names_both_shapes_and_the_model_that_it_was_trained_on(tmp_path):
    saved(tmp_path)
    shapes = r"\n.*down_proj.lora_B: the adapter has \(24, 3\), the model needs \(32, 3\)\n"
    for base, said in (("org/base", "; it was trained on 'org/base'"), (None, "")):
        edit(tmp_path, base_model_name_or_path=base)
        with pytest.raises(ml.TargetError, match=f"does not fit the model{said}:{shapes}"):
            loaded(tmp_path, hidden_size=32)


def test_loading_onto_another_architecture_names_what_is_not_there(tmp_path):
    saved(tmp_path)
    model = tiny_model("qwen3.5-linear", dtype=torch.float32)
    with pytest.raises(ml.TargetError, match=r"o_proj: the model has no such layer\n  … and \d+ more"):
        ml.load_adapter(model, tmp_path)
    assert not adapter_layers(model)


NOT_IN_THE_TENSORS = {
    "use_dora": (True, "yes"),
    "bias": ("some",),
    "lora_bias": (True,),
    "modules_to_save": (["lm_head"], "lm_head", [r"lm_.*"]),
    "trainable_token_indices": ([3, 4], [-1], {"embed_tokens": "3"}),
    "target_parameters": ([r"up_proj\.(weight)"], "up_proj.weight"),
    "init_lora_weights": ("pissa_niter_4", "corda", "lora_ga", "loftq"),
    "alpha_pattern": ({r"([a-z0-9_.]+)+!": 3},),
    "rank_pattern": (["q_proj"],),
    "r": ("many",),
    "lora_alpha": (-1,),
    "task_type": ("CHESS",),
    "peft_type": ("IA3",),
    "auto_map": ({"AutoModel": "evil.py"},),
}


@pytest.mark.parametrize(
    ("case", "key", "values"),
    [
        *(("LoRA", key, values) for key, values in NOT_IN_THE_TENSORS.items()),
        ("DoRA", "use_dora", (False,)),
        ("DoRA", "bias", ("lora_only", "all")),
        ("a bias of B", "lora_bias", (False,)),
    ],
)
def test_a_config_that_does_not_go_with_its_tensors_is_refused_by_key(tmp_path, case, key, values):
    ml.save_adapter(with_adapter(case), tmp_path)
    for value in values:
        edit(tmp_path, **{key: value})
        with pytest.raises(ml.FormatError, match=rf"{CONFIG_FILE}(.|\n)*{key}"):
            loaded(tmp_path, WHOLE, num_hidden_layers=2)


def test_what_is_no_adapter_is_refused_by_the_file_that_is_missing(tmp_path):
    """PEFT saves an adapter with another name than "default" in a folder of that name."""
    ml.save_model(tiny_model(), tmp_path / "model")
    for name in ("several/first", "several/second", CONFIG_FILE, WEIGHTS_FILE):
        saved(tmp_path / name)
        (tmp_path / name / name).unlink(missing_ok=True)
    folders = f"'{tmp_path}/several/first', '{tmp_path}/several/second'"
    for name, said in (
        ("model", CONFIG_FILE),
        ("several", folders),
        *((name, name) for name in (CONFIG_FILE, WEIGHTS_FILE)),
    ):
        with pytest.raises(ml.FormatError, match=f"{tmp_path / name}.*{said}"):
            loaded(tmp_path / name)


def test_what_cannot_be_saved_leaves_no_file_behind(tmp_path):
    with pytest.raises(ml.TargetError, match="the model has no adapter"):
        ml.save_adapter(tiny_model(), tmp_path / "none")
    model = with_adapter("LoRA")
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(ml.TrainingError, match="not finite"):
        ml.save_adapter(model, tmp_path / "nan")
    ml.detach(model)
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(ml.TrainingError, match="not finite"):
        ml.save_model(model, tmp_path / "model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def renamed(old, new):
    return lambda name, tensor: (name.replace(old, new), tensor)


def shaped(end, change):
    return lambda name, tensor: (name, change(tensor).clone() if name.endswith(end) else tensor)


def beside(end, more, change=lambda tensor: tensor):
    """One more tensor, made of one that there is."""
    return lambda name, tensor: (name, tensor, more, change(tensor).clone()) if name.endswith(end) else (name, tensor)


HOSTILE = {
    "a name without its prefix": ("DoRA", renamed("base_model.model.", ""), "names have to begin"),
    "a B that is a magnitude": ("LoRA", renamed("lora_B.weight", "lora_magnitude_vector"), f"{WEIGHTS_FILE}.*lora_A"),
    "a layer that is not there": ("DoRA", renamed("layers.0.self_attn.q_proj.lora_B", "layers.9.lora_B"), "need lora"),
    "a factor of whole numbers": ("DoRA", shaped("q_proj.lora_A.weight", torch.Tensor.long), "q_proj.lora_A.*int64"),
    "a factor that is there twice": ("DoRA", beside("1.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.x.weight"), "one"),
    "a factor that is NaN": ("DoRA", shaped("q_proj.lora_A.weight", lambda t: t * torch.nan), "lora_A.*not finite"),
    "a factor that is a number": (
        "DoRA",
        shaped("q_proj.lora_A.weight", lambda t: t.sum()),
        r"A.* \(\), need a matrix",
    ),
    "no tensors": ("LoRA", lambda name, tensor: (), "has no tensors"),
    "one magnitude missing": ("DoRA", renamed("1.self_attn.q_proj.lora_magnitude_vector", "1.x.y"), "1.x.y"),
    "a bias of A": ("a bias of B", renamed("q_proj.lora_B.bias", "q_proj.lora_A.bias"), "q_proj.lora_A.bias"),
    "a bias of another size": ("all biases", shaped("up_proj.bias", lambda t: t[:3]), r"up_proj\.bias.*\(3,\)"),
    "a head of another size": ("the head in full", shaped("head.weight", lambda t: t[:5]), r"lm_head.*\(5, 24\)"),
    "rows too few": ("rows of tokens", shaped("tokens_delta", lambda t: t[:2]), r"embed_tokens.*\(2, 24\)"),
    "rows of a linear": ("rows of tokens", renamed("model.embed_tokens", "model.layers.1.mlp.up_proj"), "up_proj"),
    "a stack for a matrix": ("LoRA", shaped("up_proj.lora_A.weight", lambda t: t[None]), "up_proj"),
    "an embedding's bias": ("the embedding adapted", beside("ding_A", f"{E}.lora_B.bias", lambda t: t[0]), "embed"),
    "a head that is infinite": ("the head in full", shaped("head.weight", lambda t: t * torch.inf), "not finite"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_does_not_fit_is_refused_by_name_and_the_model_stays_as_it_is(tmp_path, case):
    config, change, named = HOSTILE[case]
    ml.save_adapter(with_adapter(config), tmp_path)
    before = tensors_of(tmp_path)
    changed = [change(name, tensor) for name, tensor in before.items()]
    tensors = {each[i]: each[i + 1].contiguous() for each in changed for i in range(0, len(each), 2)}
    is_kept = all(name in tensors and torch.equal(tensors[name], before[name]) for name in before)
    assert not is_kept or len(tensors) > len(before), "nothing was changed"
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    model, base = small_model(), small_model()
    with pytest.raises(ml.MiniloraError, match=rf"(?s){named}"):
        ml.load_adapter(model, tmp_path)
    assert not adapter_layers(model)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert torch.equal(model(IDS), base(IDS))


@pytest.mark.parametrize(
    "wanted",
    [[7, 2], [7, 2, 2], [7, 2, 61], {"embed_tokens": [7, 2]}, {r"embed_\w+": [7, 2, 40]}, {"norm": [7, 2, 40]}],
)
def test_rows_of_other_tokens_than_the_config_s_are_refused(tmp_path, wanted):
    ml.save_adapter(with_adapter("rows of tokens"), tmp_path)
    edit(tmp_path, trainable_token_indices=wanted)
    with pytest.raises(ml.MiniloraError, match=r"embed_tokens|trainable_token_indices"):
        ml.load_adapter(small_model(), tmp_path)


def test_an_adapter_of_many_tensors_is_read_in_one_go(tmp_path, monkeypatch):
    """To read the header again for each tensor takes hours where there are tens of thousands, as of experts."""
    saved(tmp_path)
    opened, safe_open = [], files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda *args, **more: opened.append(args) or safe_open(*args, **more))
    loaded(tmp_path)
    assert len(opened) <= 3


def test_modules_that_peft_saves_by_the_end_of_a_name_are_loaded(tmp_path):
    model = saved(tmp_path, modules_to_save=("norm", "input_layernorm", "post_attention_layernorm"))
    edit(tmp_path, modules_to_save=["norm"])
    assert adapter_layers(loaded(tmp_path)).keys() == adapter_layers(model).keys()


@pytest.mark.parametrize("init", [False, "orthogonal", "eva"])
def test_start_values_that_leave_the_weights_alone_do_not_matter_to_a_loaded_adapter(tmp_path, init):
    model = saved(tmp_path)
    edit(tmp_path, init_lora_weights=init, eva_config={"rho": 2.0} if init == "eva" else None)
    assert torch.equal(loaded(tmp_path)(IDS), model(IDS))


def test_where_only_some_layers_have_a_start_each_is_written_with_its_own_rank_and_scale(tmp_path):
    """PEFT takes "olora" for True on an embedding, so only the linears of such a file begin in the weights."""
    fields = {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}
    model = saved(tmp_path, **fields)
    for layer in adapter_layers(model).values():
        trained_of(layer.adapters["default"])["lora_A"].data.add_(0.1)
    ml.save_adapter(model, tmp_path)
    edit(tmp_path, init_lora_weights="olora")
    model = loaded(tmp_path)
    ml.save_adapter(model, tmp_path / "again")
    assert relative(loaded(tmp_path / "again")(IDS), model(IDS), PARITY) <= 1

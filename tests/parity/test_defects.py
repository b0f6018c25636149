"""What PEFT 0.21.2 does wrong: each time it still does, and we do not.

A test that fails because PEFT has mended something is good news: its second half stays.
"""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from minilora.lora.attach import attach, merged
from minilora.lora.find import adapter_layers
from minilora.lora.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.lora.serve import hotswap_adapter
from tests.models import allocated, fill_, randn, token_ids
from tests.parity.test_family import logits, ours_of, perturb_, saved_by_peft, theirs_of
from tests.tolerance import PARITY, assert_parity, assert_precision, relative

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

hotswap = pytest.importorskip("peft.utils.hotswap")

IDS = token_ids(3, 2, 7)
OVERLAPPING = {"layers.1.self_attn.q_proj": 3, "q_proj": 1, "self_attn.q_proj": 2}
REVERSED = {"self_attn.q_proj": 3, "layers.0.self_attn.q_proj": 1}


def scales(model):
    """Path -> s."""
    return {path: layer.adapters["default"].scale for path, layer in adapter_layers(model).items()}


def layer_of(theirs, path="model.layers.0.self_attn.q_proj"):
    return theirs.base_model.model.get_submodule(path)


def with_adapter(seed=0, is_tied=False, dtype=torch.float32, **fields):
    """Our model with a random adapter."""
    model = ours_of(is_tied, dtype)
    attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, "target_modules": ["q_proj", "v_proj"], **fields}))
    perturb_(model, seed)
    return model


# No. 1


def test_overlapping_rank_patterns_survive_the_file(tmp_path):
    fields = {"rank_pattern": REVERSED}
    saved_by_peft(tmp_path / "theirs", **fields)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(theirs_of(), tmp_path / "theirs")
    ours = with_adapter(**fields)
    ml.save_adapter(ours, tmp_path / "ours")
    again = ours_of()
    ml.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    ml.load_adapter(ours_of(), tmp_path / "theirs")  # ranks are those of the tensors


def test_overlapping_alpha_patterns_survive_the_file(tmp_path):
    fields = {"alpha_pattern": REVERSED}
    theirs = saved_by_peft(tmp_path / "theirs", **fields)
    again = peft.PeftModel.from_pretrained(theirs_of(), tmp_path / "theirs")
    assert [layer_of(model).scaling["default"] for model in (theirs, again)] == [3 / 3, 1 / 3]
    ours = with_adapter(**fields)
    ml.save_adapter(ours, tmp_path / "ours")
    back = ours_of()
    ml.load_adapter(back, tmp_path / "ours")
    assert scales(back) == scales(ours)
    assert layer_of(peft.PeftModel.from_pretrained(theirs_of(), tmp_path / "ours")).scaling["default"] == 3 / 3


# No. 2


def test_a_swapped_adapter_has_the_scales_of_its_patterns(tmp_path):
    fields = {"rank_pattern": {"q_proj": 6}}
    saved_by_peft(tmp_path, **fields)
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"]))
    hotswap.hotswap_adapter(theirs, tmp_path, adapter_name="default", torch_device="cpu")
    expected = peft.PeftModel.from_pretrained(theirs_of(), tmp_path)
    assert (layer_of(theirs).scaling["default"], layer_of(expected).scaling["default"]) == (21 / 3, 21 / 6)
    ours = with_adapter(seed=5, **fields)
    hotswap_adapter(ours, tmp_path)
    assert_parity(logits(ours), logits(expected))


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_all_that_an_adapter_has_is_swapped(fields, tmp_path):
    theirs = saved_by_peft(tmp_path, **fields)
    with pytest.raises(KeyError):
        hotswap.hotswap_adapter(copy.deepcopy(theirs), tmp_path, adapter_name="default", torch_device="cpu")
    ours = with_adapter(seed=5, **fields)
    hotswap_adapter(ours, tmp_path)
    assert_parity(logits(ours), logits(theirs))


# No. 4


def test_a_float32_adapter_keeps_its_digits_on_a_bfloat16_base(tmp_path):
    saved_by_peft(tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    exact = load_file(tmp_path / WEIGHTS_FILE)[name]
    theirs = peft.PeftModel.from_pretrained(theirs_of().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(layer_of(theirs).lora_A["default"].weight, exact.bfloat16().float())
    ours = ours_of().bfloat16()
    ml.load_adapter(ours, tmp_path)
    assert torch.equal(adapter_layers(ours)["model.layers.0.self_attn.q_proj"].adapters["default"].lora_A, exact)


def test_a_raw_pissa_loads_whatever_is_said_of_memory(tmp_path):
    theirs = saved_by_peft(tmp_path, init_lora_weights="pissa")
    with pytest.raises(RuntimeError, match="set_data"):
        peft.PeftModel.from_pretrained(theirs_of(), tmp_path, low_cpu_mem_usage=True)
    ours = ours_of()
    ml.load_adapter(ours, tmp_path)
    assert_parity(logits(ours), logits(theirs))


# No. 5


def test_a_bias_of_b_is_merged_into_four_bits_with_its_scale():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    dense = nn.Sequential(nn.Linear(64, 64))
    fill_(dense, 0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32))
    base.load_state_dict(dense.state_dict())
    base = base.to("cpu")
    base.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], lora_bias=True))
    layer = theirs.base_model.model[0]
    fill_(layer.lora_B, 1)
    before, added = layer.bias.detach().clone(), layer.lora_B["default"].bias.detach().clone()
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        layer.merge(safe_merge=True)
    layer.merge()
    assert_parity(layer.bias - before, added)  # and not 4 times it
    ours = ml.quant.linear.NF4Linear.quantize(dense[0].weight, dense[0].bias)
    model = nn.Sequential(ours)
    attach(model, ml.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], lora_bias=True))
    model[0].adapters["default"].lora_bias.data.copy_(added)
    assert_parity(model[0].merged_bias() - before, 4 * added)


# No. 6


def test_layers_that_are_repeated_are_refused_where_a_merge_would_be_wrong(tmp_path):
    theirs = saved_by_peft(tmp_path, layer_replication=[[0, 2], [0, 2]])
    before = logits(theirs)
    assert relative(logits(theirs.merge_and_unload()), before, PARITY) > 1000
    with pytest.raises(ml.FormatError, match="layer_replication: found"):
        ml.load_adapter(ours_of(), tmp_path)


# No. 7


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_leaves_what_shared_the_weight_as_it_was(name, tmp_path):
    ours = with_adapter(is_tied=True, target_modules=[name])
    ml.save_adapter(ours, tmp_path)
    expected = logits(ours)
    theirs = peft.PeftModel.from_pretrained(theirs_of(is_tied=True), tmp_path)
    assert_parity(logits(theirs), expected)
    assert relative(logits(theirs.merge_and_unload()), expected, PARITY) > 1000
    ml.merge(ours)
    assert_parity(logits(ours), expected)


# No. 8


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_new_dora_is_the_identity_on_a_bfloat16_base(has_bias):
    """But for one rounding, where there is a bias: it is added last."""
    base = nn.Sequential(nn.Linear(64, 48, bias=has_bias))
    fill_(base, 0)
    exact, base, x = copy.deepcopy(base).double(), base.bfloat16(), randn(1, 30, 64, dtype=torch.bfloat16)
    exact.load_state_dict(base.state_dict())
    ours, theirs, before = copy.deepcopy(base), copy.deepcopy(base), base(x)
    config = {"r": 4, "target_modules": ["0"], "use_dora": True}
    attach(ours, ml.LoraConfig(**config))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    lengths = torch.linalg.vector_norm(exact[0].weight, dim=1)
    assert relative(theirs.base_model.model[0].lora_magnitude_vector["default"].weight, lengths, PARITY) > 100
    assert_parity(ours[0].adapters["default"].magnitude, lengths)
    assert not torch.equal(theirs(x), before)
    assert_precision(ours(x), before, exact(x.double()))
    assert has_bias or torch.equal(ours(x), before)


def test_two_doras_with_dropout_that_drops_nothing_train_as_they_evaluate():
    fields = {"r": 3, "lora_alpha": 21, "target_modules": ["q_proj"], "use_dora": True, "lora_dropout": 1e-7}
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    theirs.add_adapter("second", peft.LoraConfig(**fields))
    theirs.base_model.set_adapter(["default", "second"])
    perturb_(theirs, 0)
    assert relative(logits(theirs.train()), logits(theirs.eval()), PARITY) > 100
    ours = ours_of()
    for name in ("default", "second"):
        attach(ours, ml.LoraConfig(**fields), name)
        perturb_(ours, 0)
    ml.set_adapter(ours, ["default", "second"])
    ml.set_dropout_step(ours, 0, 0)
    assert_parity(logits(ours.train()), logits(ours.eval()))


# No. 9


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_moved_out_of_a_bfloat16_weight_and_what_is_left_are_the_weight(init):
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "init_lora_weights": init}
    theirs = layer_of(peft.get_peft_model(theirs_of().bfloat16(), peft.LoraConfig(**fields)))
    weight = theirs_of().bfloat16().model.layers[0].self_attn.q_proj.weight
    again = theirs.get_base_layer().weight + theirs.get_delta_weight("default").to(torch.bfloat16)
    assert not torch.equal(again, weight)
    ours = ours_of().bfloat16()
    attach(ours, ml.LoraConfig(**fields))
    assert torch.equal(adapter_layers(ours)["model.layers.0.self_attn.q_proj"].merged_weight(), weight)


# No. 10


def test_a_target_that_means_nothing_is_an_error_beside_one_that_means_something():
    fields = {"target_modules": ["q_proj", "query"]}
    peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    with pytest.raises(ml.TargetError, match=r"'query'.*q_proj"):
        attach(ours_of(), ml.LoraConfig(**fields))


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_tensors_that_belong_nowhere_are_an_error(prefix, tmp_path):
    saved_by_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors = {
        name.replace("base_model.model.", prefix).replace("layers.0", "blocks.0"): t for name, t in tensors.items()
    }
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    theirs = peft.PeftModel.from_pretrained(theirs_of(), tmp_path)  # warns of what is missing at most
    assert not layer_of(theirs).lora_B["default"].weight.any()
    with pytest.raises(ml.MiniloraError, match=r"blocks\.0"):
        ml.load_adapter(ours_of(), tmp_path)


# No. 11


def test_a_merge_outlasts_a_look_at_the_base():
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(target_modules=["q_proj"])).eval()
    perturb_(theirs, 0)
    theirs.merge_adapter()
    with theirs.disable_adapter():
        logits(theirs)
    assert not layer_of(theirs).merged
    ours = with_adapter()
    with merged(ours):
        inside = logits(ours)
        with ml.disable_adapter(ours):
            pass
        assert torch.equal(logits(ours), inside)


# No. 12


def test_modules_to_save_means_whole_names():
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    assert sum(isinstance(module, peft.utils.ModulesToSaveWrapper) for module in theirs.modules()) == 1 + 2 * 2
    ours = ours_of()
    attach(ours, ml.LoraConfig(**fields))
    assert [path for path in adapter_layers(ours) if "norm" in path] == ["model.norm"]


# No. 13


def test_layers_to_transform_holds_for_full_names():
    name = "model.layers.1.self_attn.q_proj"
    fields = {"target_modules": [name, "v_proj"], "layers_to_transform": [0]}
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    assert isinstance(layer_of(theirs, name), peft.tuners.lora.LoraLayer)
    ours = ours_of()
    attach(ours, ml.LoraConfig(**fields))
    assert list(adapter_layers(ours)) == ["model.layers.0.self_attn.v_proj"]


def test_dropout_drops_on_an_embedding():
    fields = {"target_modules": ["embed_tokens"], "lora_dropout": 0.5}
    theirs = peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    perturb_(theirs, 0)
    assert torch.equal(logits(theirs.train()), logits(theirs.eval()))
    ours = with_adapter(**fields)
    ml.set_dropout_step(ours, 0, 0)
    assert not torch.equal(logits(ours.train()), logits(ours.eval()))


def test_start_values_that_an_embedding_cannot_have_are_an_error():
    fields = {"target_modules": ["embed_tokens"], "init_lora_weights": "nonsense"}
    peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields))
    with pytest.raises(ml.ConfigError, match="nonsense"):
        attach(ours_of(), ml.LoraConfig(**fields))


# No. 14


def test_trained_rows_do_not_copy_the_vocabulary():
    vocabulary, dim = 20_000, 16
    fields = {"target_modules": ["1"], "trainable_token_indices": {"0": [3, 5]}}
    base = nn.Sequential(nn.Embedding(vocabulary, dim), nn.Linear(dim, dim))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**fields))
    attach(ours, ml.LoraConfig(**fields))
    whole = vocabulary * dim * 4
    assert allocated(lambda: theirs.base_model.model(IDS))[1] > whole
    assert allocated(lambda: ours(IDS))[1] < whole / 20


# No. 15


def test_loftq_works_on_a_cpu():
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "loftq"}
    with pytest.raises((ImportError, ValueError, RuntimeError, AssertionError)):
        peft.get_peft_model(theirs_of(), peft.LoraConfig(**fields, loftq_config=peft.LoftQConfig()))
    ours = ours_of()
    before = ours.model.layers[0].self_attn.q_proj.weight
    attach(ours, ml.LoraConfig(**fields))
    layer = adapter_layers(ours)["model.layers.0.self_attn.q_proj"]
    left, lost = (torch.linalg.norm(before - weight) for weight in (layer.merged_weight(), dense(layer.base)))
    assert left < 0.9 * lost


def dense(base):
    return ml.quant.linear.dense_weight(base)


# No. 16


def test_there_is_one_merge_and_it_rounds_once():
    config = peft.LoraConfig(r=3, lora_alpha=21, target_modules=["q_proj"])
    theirs = layer_of(peft.get_peft_model(theirs_of().bfloat16(), config))
    perturb_(theirs, 0)
    weight, delta = theirs.get_base_layer().weight.clone(), theirs.get_delta_weight("default")
    exact = weight.double() + 7 * theirs.lora_B["default"].weight.double() @ theirs.lora_A["default"].weight.double()
    found = []
    for safe_merge in (False, True):
        layer = copy.deepcopy(theirs)
        layer.merge(safe_merge=safe_merge)
        found.append(layer.get_base_layer().weight)
    assert not torch.equal(*found)
    assert not all(is_rounded_once(weight, exact) for weight in found)
    ours = nn.Sequential(copy.deepcopy(theirs.get_base_layer()))
    attach(ours, ml.LoraConfig(r=3, lora_alpha=21, target_modules=["0"]))
    for letter in ("A", "B"):
        factor = getattr(theirs, f"lora_{letter}")["default"].weight
        getattr(ours[0].adapters["default"], f"lora_{letter}").data.copy_(factor)
    assert delta.dtype == torch.float32
    assert is_rounded_once(ours[0].merged_weight(), exact)


def is_rounded_once(found, exact):
    """Whether `found` is `exact` after float32's error and one rounding: beside a tie either neighbour."""
    error = 2**-20 * exact.abs().max()
    low, high = ((exact + sign * error).to(found.dtype) for sign in (-1, 1))
    return bool(((low <= found) & (found <= high)).all())


# No. 17


def test_what_was_loaded_to_be_used_stays_frozen_when_it_is_chosen(tmp_path):
    saved_by_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs_of(), tmp_path)
    assert theirs.get_nb_trainable_parameters()[0] == 0
    theirs.set_adapter("default")
    assert theirs.get_nb_trainable_parameters()[0] > 0
    ours = ours_of()
    ml.load_adapter(ours, tmp_path)
    ml.set_adapter(ours, "default")
    assert ml.count_parameters(ours).trainable == 0


# No. 18


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    """PEFT keeps names in a set, whose order is another one in every process."""
    names = ["q_proj", "v_proj", "up_proj", "o_proj", "k_proj", "down_proj"]
    assert isinstance(peft.LoraConfig(target_modules=names).target_modules, set)
    written = []
    for turn in range(4):
        random.Random(turn).shuffle(names)
        ml.save_adapter(with_adapter(target_modules=list(names)), tmp_path / str(turn))
        files = [tmp_path / str(turn) / file for file in (CONFIG_FILE, WEIGHTS_FILE)]
        written.append([file.read_bytes() for file in files])
    assert all(files == written[0] for files in written)
    assert json.loads(written[0][0])["target_modules"] == sorted(names)


# Found beside them


def test_the_norm_of_a_grouped_convolution_is_that_of_its_weight():
    """PEFT makes the sum as if B had the rows of one group and twice its columns."""
    base, x = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), randn(1, 2, 4, 9, dtype=torch.float32)
    fill_(base, 0)
    ours, fields = copy.deepcopy(base), {"r": 2, "lora_alpha": 14, "target_modules": ["0"], "use_dora": True}
    attach(ours, ml.LoraConfig(**fields))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**fields))
    fill_(ours[0].adapters, 1)
    weights = {f"lora_{letter}": getattr(theirs.base_model.model[0], f"lora_{letter}")["default"] for letter in "AB"}
    for name, layer in (weights | {"magnitude": theirs.base_model.model[0].lora_magnitude_vector["default"]}).items():
        layer.weight.data.copy_(getattr(ours[0].adapters["default"], name))
    lengths = torch.linalg.vector_norm(ours[0].merged_weight().flatten(1), dim=1)
    assert_parity(lengths, ours[0].adapters["default"].magnitude.abs().flatten())
    assert_parity(ours(x), ours[0].merged()(x))
    assert relative(theirs(x), ours(x), PARITY) > 1000

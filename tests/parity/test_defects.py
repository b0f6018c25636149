"""What PEFT 0.21.2 does wrong: each time it still does, and we do not.

A test that fails because PEFT has mended something is good news: its second half stays.
"""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.attach import merged
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.nf4 import NF4Linear
from minilora.testing.compare import PARITY, assert_parity, assert_precision, relative
from tests.files import save_file
from tests.models import allocated, fill_, perturb_, randn, token_ids
from tests.parity.test_family import (
    Q_PROJ,
    loaded,
    logits,
    ours_of,
    saved_by_peft,
    theirs_attached,
    theirs_loading,
    theirs_of,
)

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

IDS = token_ids(3, 2, 7)
REVERSED = {"self_attn.q_proj": 3, "layers.0.self_attn.q_proj": 1}


def scales(model):
    """Path -> s."""
    return {path: layer.adapters["default"].scale for path, layer in adapter_layers(model).items()}


def layer_of(theirs, path=Q_PROJ):
    return theirs.base_model.model.get_submodule(path)


def attached(base=None, **fields):
    model = ours_of() if base is None else base
    ml.attach(model, ml.LoraConfig(**fields))
    return model


def with_adapter(seed=0, is_tied=False, **fields):
    fields = {"r": 3, "lora_alpha": 21, "target_modules": ["q_proj", "v_proj"], **fields}
    model = attached(ours_of(is_tied), **fields)
    perturb_(model, seed)
    return model


def test_overlapping_patterns_survive_the_file(tmp_path):
    fields = {"rank_pattern": REVERSED}
    saved_by_peft(tmp_path / "theirs", **fields)
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs_loading(tmp_path / "theirs")
    ours = with_adapter(**fields)
    ml.save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(loaded(tmp_path / "ours")), logits(ours))
    loaded(tmp_path / "theirs")  # ranks are those of the tensors
    fields = {"alpha_pattern": REVERSED}
    theirs = saved_by_peft(tmp_path / "theirs", **fields)
    again = theirs_loading(tmp_path / "theirs")
    assert [layer_of(model).scaling["default"] for model in (theirs, again)] == [3 / 3, 1 / 3]
    ours = with_adapter(**fields)
    ml.save_adapter(ours, tmp_path / "ours")
    assert scales(loaded(tmp_path / "ours")) == scales(ours)
    assert layer_of(theirs_loading(tmp_path / "ours")).scaling["default"] == 3 / 3


def test_a_float32_adapter_keeps_its_digits_on_a_bfloat16_base(tmp_path):
    saved_by_peft(tmp_path)
    exact = load_file(tmp_path / WEIGHTS_FILE)[f"base_model.model.{Q_PROJ}.lora_A.weight"]
    theirs = theirs_loading(tmp_path, theirs_of().bfloat16(), low_cpu_mem_usage=True)
    assert torch.equal(layer_of(theirs).lora_A["default"].weight, exact.bfloat16().float())
    ours = loaded(tmp_path, ours_of().bfloat16())
    assert torch.equal(adapter_layers(ours)[Q_PROJ].adapters["default"].lora_A, exact)


def test_a_raw_pissa_loads_whatever_is_said_of_memory(tmp_path):
    theirs = saved_by_peft(tmp_path, init_lora_weights="pissa")
    with pytest.raises(RuntimeError, match="set_data"):
        theirs_loading(tmp_path, low_cpu_mem_usage=True)
    assert_parity(logits(loaded(tmp_path)), logits(theirs))


def test_a_bias_of_b_is_merged_into_four_bits_with_its_scale():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    dense = nn.Sequential(nn.Linear(64, 64))
    fill_(dense, 0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32))
    base.load_state_dict(dense.state_dict())
    base = base.to("cpu")
    base.is_loaded_in_4bit = True
    fields = {"r": 2, "lora_alpha": 8, "target_modules": ["0"], "lora_bias": True}
    layer = layer_of(theirs_attached(base, **fields), "0")
    fill_(layer.lora_B, 1)
    before, added = layer.bias.detach().clone(), layer.lora_B["default"].bias.detach().clone()
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        layer.merge(safe_merge=True)
    layer.merge()
    assert_parity(layer.bias - before, added)  # and not 4 times it
    ours = attached(nn.Sequential(NF4Linear.quantize(dense[0].weight, dense[0].bias)), **fields)[0]
    ours.adapters["default"].lora_bias.data.copy_(added)
    assert_parity(ours.merged_bias() - before, 4 * added)


def test_layers_that_are_repeated_are_refused_where_a_merge_would_be_wrong(tmp_path):
    theirs = saved_by_peft(tmp_path, layer_replication=[[0, 2], [0, 2]])
    before = logits(theirs)
    assert relative(logits(theirs.merge_and_unload()), before, PARITY) > 1000
    with pytest.raises(ml.FormatError, match="layer_replication: found"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_leaves_what_shared_the_weight_as_it_was(name, tmp_path):
    ours = with_adapter(is_tied=True, target_modules=[name])
    ml.save_adapter(ours, tmp_path)
    expected = logits(ours)
    theirs = theirs_loading(tmp_path, theirs_of(is_tied=True))
    assert_parity(logits(theirs), expected)
    assert relative(logits(theirs.merge_and_unload()), expected, PARITY) > 1000
    ml.merge(ours)
    assert_parity(logits(ours), expected)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_new_dora_is_the_identity_on_a_bfloat16_base(has_bias):
    """But for one rounding, where there is a bias: it is added last."""
    base = nn.Sequential(nn.Linear(64, 48, bias=has_bias))
    fill_(base, 0)
    exact, base, x = copy.deepcopy(base).double(), base.bfloat16(), randn(1, 30, 64, dtype=torch.bfloat16)
    exact.load_state_dict(base.state_dict())
    before, fields = base(x), {"r": 4, "target_modules": ["0"], "use_dora": True}
    ours, theirs = attached(copy.deepcopy(base), **fields), theirs_attached(copy.deepcopy(base), **fields)
    lengths = torch.linalg.vector_norm(exact[0].weight, dim=1)
    assert relative(layer_of(theirs, "0").lora_magnitude_vector["default"].weight, lengths, PARITY) > 100
    assert_parity(ours[0].adapters["default"].magnitude, lengths)
    assert not torch.equal(theirs(x), before)
    assert_precision(ours(x), before, exact(x.double()))
    assert has_bias or torch.equal(ours(x), before)


def test_two_doras_with_dropout_that_drops_nothing_train_as_they_evaluate():
    fields = {"r": 3, "lora_alpha": 21, "target_modules": ["q_proj"], "use_dora": True, "lora_dropout": 1e-7}
    theirs = theirs_attached(**fields)
    theirs.add_adapter("second", peft.LoraConfig(**fields))
    theirs.base_model.set_adapter(["default", "second"])
    perturb_(theirs, 0)
    assert relative(logits(theirs.train()), logits(theirs.eval()), PARITY) > 100
    ours = ours_of()
    for name in ("default", "second"):
        ml.attach(ours, ml.LoraConfig(**fields), name)
        perturb_(ours, 0)
    ml.set_adapter(ours, ["default", "second"])
    ml.set_dropout_step(ours, 0, 0)
    assert_parity(logits(ours.train()), logits(ours.eval()))


def test_what_was_moved_out_of_a_bfloat16_weight_and_what_is_left_are_the_weight():
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    theirs = layer_of(theirs_attached(theirs_of().bfloat16(), **fields))
    weight = theirs_of().bfloat16().get_submodule(Q_PROJ).weight
    again = theirs.get_base_layer().weight + theirs.get_delta_weight("default").to(torch.bfloat16)
    assert not torch.equal(again, weight)
    ours = attached(ours_of().bfloat16(), **fields)
    assert torch.equal(adapter_layers(ours)[Q_PROJ].merged_weight(), weight)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_tensors_that_belong_nowhere_are_an_error(prefix, tmp_path):
    saved_by_peft(tmp_path)
    file = tmp_path / WEIGHTS_FILE
    names = {
        name: name.replace("base_model.model.", prefix).replace("layers.0", "blocks.0") for name in load_file(file)
    }
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file)
    theirs = theirs_loading(tmp_path)  # warns of what is missing at most
    assert not layer_of(theirs).lora_B["default"].weight.any()
    with pytest.raises(ml.MiniloraError, match=r"blocks\.0"):
        loaded(tmp_path)


def test_a_merge_outlasts_a_look_at_the_base():
    theirs = theirs_attached(target_modules=["q_proj"]).eval()
    perturb_(theirs, 0)
    theirs.merge_adapter()
    with theirs.disable_adapter():
        logits(theirs)
    assert not layer_of(theirs).merged
    ours = with_adapter()
    with merged(ours):
        inside = logits(ours)
        with pytest.raises(ml.TargetError, match="or it is merged"), ml.disable_adapter(ours):
            pass
        assert torch.equal(logits(ours), inside)


def test_modules_to_save_means_whole_names():
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    theirs = theirs_attached(**fields)
    assert sum(isinstance(module, peft.utils.ModulesToSaveWrapper) for module in theirs.modules()) == 1 + 2 * 2
    assert [path for path in adapter_layers(attached(**fields)) if "norm" in path] == ["model.norm"]


def test_layers_to_transform_holds_for_full_names():
    name = "model.layers.1.self_attn.q_proj"
    fields = {"target_modules": [name, "v_proj"], "layers_to_transform": [0]}
    assert isinstance(layer_of(theirs_attached(**fields), name), peft.tuners.lora.LoraLayer)
    assert list(adapter_layers(attached(**fields))) == ["model.layers.0.self_attn.v_proj"]


def test_dropout_drops_on_an_embedding():
    fields = {"target_modules": ["embed_tokens"], "lora_dropout": 0.5}
    theirs = theirs_attached(**fields)
    perturb_(theirs, 0)
    assert torch.equal(logits(theirs.train()), logits(theirs.eval()))
    ours = with_adapter(**fields)
    ml.set_dropout_step(ours, 0, 0)
    assert not torch.equal(logits(ours.train()), logits(ours.eval()))


def test_trained_rows_do_not_copy_the_vocabulary():
    vocabulary, dim = 20_000, 16
    fields = {"target_modules": ["1"], "trainable_token_indices": {"0": [3, 5]}}
    base = nn.Sequential(nn.Embedding(vocabulary, dim), nn.Linear(dim, dim))
    ours, theirs = attached(copy.deepcopy(base), **fields), theirs_attached(base, **fields)
    whole = vocabulary * dim * 4
    assert allocated(lambda: theirs.base_model.model(IDS))[1] > whole
    assert allocated(lambda: ours(IDS))[1] < whole / 20


def test_there_is_one_merge_and_it_rounds_once():
    theirs = layer_of(theirs_attached(theirs_of().bfloat16(), r=3, lora_alpha=21, target_modules=["q_proj"]))
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
    ours = attached(nn.Sequential(copy.deepcopy(theirs.get_base_layer())), r=3, lora_alpha=21, target_modules=["0"])
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


def test_what_was_loaded_to_be_used_stays_frozen_when_it_is_chosen(tmp_path):
    saved_by_peft(tmp_path)
    theirs = theirs_loading(tmp_path)
    assert theirs.get_nb_trainable_parameters()[0] == 0
    theirs.set_adapter("default")
    assert theirs.get_nb_trainable_parameters()[0] > 0
    ours = loaded(tmp_path)
    ml.set_adapter(ours, "default")
    assert ml.count_parameters(ours).trainable == 0


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

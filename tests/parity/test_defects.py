"""What PEFT 0.21.2 does wrong and no other test is about: each time it still does, and we do not.

A test that fails because PEFT has mended something is good news: its second half stays.
"""

import pytest
import torch

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import PARITY, assert_parity, relative
from tests.models import perturb_, token_ids
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


def layer_of(theirs, path=Q_PROJ):
    return theirs.base_model.model.get_submodule(path)


def attached(base=None, **fields):
    model = ours_of() if base is None else base
    ml.attach(model, ml.LoraConfig(**fields))
    return model


def test_layers_that_are_repeated_are_refused_where_a_merge_would_be_wrong(tmp_path):
    theirs = saved_by_peft(tmp_path, layer_replication=[[0, 2], [0, 2]])
    before = logits(theirs)
    assert relative(logits(theirs.merge_and_unload()), before, PARITY) > 1000
    with pytest.raises(ml.FormatError, match="layer_replication: found"):
        loaded(tmp_path)


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


def test_trained_rows_are_lost_in_a_weighted_sum():
    fields = {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}
    theirs = theirs_attached(**fields)
    perturb_(theirs)
    theirs.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    rows = layer_of(theirs, "model.embed_tokens").token_adapter.trainable_tokens_delta
    assert torch.equal(rows["sum"], theirs_of().model.embed_tokens.weight[[3, 1]])
    assert not torch.equal(rows["sum"], rows["default"])
    with pytest.raises(ml.ConfigError, match="cannot be combined"):
        ml.combine_adapters(attached(**fields), {"default": 1.0}, "sum")


def test_what_was_loaded_to_be_used_stays_frozen_when_it_is_chosen(tmp_path):
    saved_by_peft(tmp_path)
    theirs = theirs_loading(tmp_path)
    assert theirs.get_nb_trainable_parameters()[0] == 0
    theirs.set_adapter("default")
    assert theirs.get_nb_trainable_parameters()[0] > 0
    ours = loaded(tmp_path)
    ml.set_adapter(ours, "default")
    assert ml.count_parameters(ours).trainable == 0

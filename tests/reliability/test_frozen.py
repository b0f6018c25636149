"""The base's bytes are the same after 50 steps of training with adapters of every kind."""

import copy
import hashlib
import itertools

import pytest
import torch

import minilora as ml
from tests.models import CONFIGS, WHOLE, four_bit, long, tiny_model
from tests.training import random_rows, weights

pytestmark = pytest.mark.reliability
ONLY_DENSE = ("norms in full",)  # what four bits cannot have


def base_digests(model):
    """The SHA-256 of each tensor of a model when its adapters are removed."""
    model = copy.deepcopy(model)
    ml.detach(model)
    tensors = {name: tensor.detach().contiguous().flatten() for name, tensor in model.state_dict().items()}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


QUICK = [("dense", kind) for kind in ("DoRA", "norms in full", "rows of tokens", "PiSSA")]
QUICK += [("four bits", "PiSSA"), ("four bits, doubly quantized", "the tied head adapted")]
FOUR_BITS = itertools.product(("four bits", "four bits, doubly quantized"), CONFIGS.keys() - {*ONLY_DENSE})
OTHERS = {*(("dense", kind) for kind in CONFIGS), *FOUR_BITS} - {*QUICK}


@pytest.mark.parametrize(("base", "kind"), [*QUICK, *long(*sorted(OTHERS))])
def test_fifty_steps_change_no_byte_of_the_base(base, kind):
    model, rows = tiny_model(WHOLE, num_hidden_layers=2), random_rows(1, 20)
    if base != "dense":
        model = four_bit(model, double_quant="doubly" in base)
    config = ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **CONFIGS[kind]})
    ml.attach(model, config)
    before, fresh = base_digests(model), weights(model)
    ml.train(model, rows, ml.TrainConfig(max_steps=50, batch_size=2, learning_rate=0.01, weight_decay=0.1))
    assert not torch.equal(weights(model), fresh)
    assert base_digests(model) == before

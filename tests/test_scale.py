"""What one of several ranks holds, against the tensors of a model."""

from dataclasses import replace

import pytest
import torch

import minilora as ml
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.runs import forecast as forecasts
from minilora.runs.forecast import Plan
from minilora.runs.settings import TrainConfig
from tests.models import four_bit, tiny_config, tiny_model

CPU = torch.device("cpu")
T, M = 33, 11  # tokens of a document, and labelled ones


def plan(config, lora, quantize="none", dtype=torch.float32, ranks=1, shard="none"):
    quantization = QuantizeConfig("none" if quantize == "none" else "nf4", quantize == "double")
    return Plan(config, lora, TrainConfig(batch_size=1), quantization, dtype, CPU, [(T, M)], ranks=ranks, shard=shard)


def forecast(plan):
    return forecasts.forecast(plan)["none"]


def model_of(quantize, dtype=torch.bfloat16):
    model = tiny_model(dtype=dtype)
    return four_bit(model, quantize == "double") if quantize != "none" else model


# --- bytes of a rank ---


@pytest.mark.parametrize("quantize", ["none", "nf4", "double"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_a_rank_holds_its_share_of_each_tensor_of_a_block_up_to_a_row_and_the_others_whole(quantize, ranks):
    model = model_of(quantize)
    parameters = dict(model.named_parameters())
    blocks = {name for name in parameters if name.startswith("model.layers.")}
    held = sum(p.chunk(ranks)[0].nbytes if name in blocks else p.nbytes for name, p in parameters.items())
    rows = sum(parameters[name][0].nbytes for name in blocks)  # the first rank has one more where a tensor is uneven
    planned = plan(model.config, ml.LoraConfig(), quantize, torch.bfloat16, ranks, "base")
    assert held - rows <= forecast(planned).weights <= held


def test_a_sharded_base_adds_two_gathered_blocks_and_changes_nothing_else_but_its_weights():
    config, model = tiny_config(), tiny_model(dtype=torch.float32)
    one = forecast(plan(config, ml.LoraConfig()))
    assert forecast(plan(config, ml.LoraConfig(), ranks=4)) == one
    sharded = forecast(plan(config, ml.LoraConfig(), ranks=4, shard="base"))
    gathered = 2 * max(sum(4 * p.chunk(4)[0].nbytes for p in block.parameters()) for block in model.model.layers)
    assert sharded.working == one.working + gathered
    assert sharded.weights < one.weights
    assert replace(sharded, weights=0, working=0, overhead=0) == replace(one, weights=0, working=0, overhead=0)
    alone = plan(config, ml.LoraConfig(), ranks=1, shard="base")
    assert forecast(alone) == one  # nothing is gathered

"""A 4-bit model with adapters, sharded over two processes by PyTorch's own FSDP."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import minilora as ml
from minilora.nf4 import NF4Linear
from minilora.testing.compare import assert_parity
from tests.models import randn, randomize_adapters_
from tests.ranks import on_ranks


def adapted():
    """A linear whose rows are whole blocks, of a number that does not halve; and one whose rows end within blocks."""
    wide = NF4Linear.quantize(randn(0, 65, 128, dtype=torch.float32), randn(1, 65, dtype=torch.float32))
    model = nn.Sequential(wide, nn.Tanh(), NF4Linear.quantize(randn(2, 128, 65, dtype=torch.float32)))
    ml.attach(model, ml.LoraConfig(r=4, lora_alpha=28, target_modules=["0", "2"]))
    randomize_adapters_(model)
    return model


def compare():
    """In one of the processes: outputs and gradients of the sharded model and of one that is not."""
    alone, sharded = adapted(), adapted()
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module)
    x = randn(3, 7, 128, dtype=torch.float32)
    outputs = [model(x) for model in (alone, sharded)]
    for y in outputs:
        y.square().mean().backward()
    assert_parity(*outputs)
    for (name, one), other in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        if one.requires_grad:
            assert_parity(one.grad, other.grad.full_tensor())
        else:
            assert other.grad is None, name
            assert other.to_local().numel() < one.numel() or one.numel() == 1, name


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_a_sharded_model_gives_outputs_and_gradients_of_one_that_is_not():
    on_ranks(2, compare)

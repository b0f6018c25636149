"""What the strategies draw is what they say: right implementations take it, and readers of files are not confused."""

from contextlib import suppress

import numpy as np
import torch
from hypothesis import given
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.torch import load as load_torch

from minilora.testing import Chat, laws, strategies
from minilora.testing.directory_laws import FIELDS
from minilora.testing.implementations import nf4_dequantize, nf4_quantize, render_chat
from minilora.testing.nf4_cases import HALF_GAP, NORMAL


@given(strategies.conversations())
def test_the_mask_of_a_conversation_of_any_text_is_right(messages):
    case = Chat(tuple((message["role"], message["content"]) for message in messages))
    laws("chat_mask")["turns"].check(render_chat, case)


@given(strategies.adapter_configs())
def test_a_config_has_the_types_and_ranges_of_peft_s(config):
    assert all(is_right(config.get(key, default)) for key, (default, is_right, _) in FIELDS.items())


@given(strategies.safetensors_files())
def test_a_file_can_be_read(content):
    assert all(array.dtype == np.float32 for array in load(content).values())


@given(strategies.safetensors_files(mutated=True))
def test_a_mutated_file_is_refused_or_read_and_nothing_else(content):
    with suppress(SafetensorError, KeyError, ValueError):  # the last two for a dtype that the reader does not know
        load_torch(content)


@given(strategies.nf4_blocks())
def test_blocks_are_quantized_within_half_the_widest_gap(blocks):
    W = torch.from_numpy(blocks)
    packed, absmax = nf4_quantize(W, 64)
    bound = (HALF_GAP * absmax * (1 + 1e-6) + NORMAL).repeat_interleave(64)[: len(W)]
    assert ((W - nf4_dequantize(packed, absmax, W.shape, 64)).abs() <= bound).all()


@given(strategies.weights(max_size=9), strategies.lora_shapes())
def test_sizes_are_at_least_one_and_weights_are_finite(weight, shape):
    assert weight.dtype == np.float32
    assert np.isfinite(weight).all()
    assert min(*weight.shape, *shape) >= 1

"""The public checks raise no false alarm: 10,000 drawn cases of right implementations."""

import pytest
import torch
from hypothesis import given, settings

from minilora.cli.selftest import implementations as ours
from minilora.testing import implementations, laws
from minilora.testing.strategies import WEIGHT_KINDS, adapted_linears, nf4_weights

pytestmark = pytest.mark.long
LAYER_LAWS = ("forward", "identity", "merge", "gradients", "scale", "sums", "frozen")
EXACT = ("ties", "layout", "kept", "idempotence", "powers")  # laws of codes; of denormal blocks any code is right
many = settings(max_examples=2500, deadline=None)


def cases(*methods):
    return adapted_linears(methods=methods, dtypes=("float64", "float32", "bfloat16"), weights=WEIGHT_KINDS)


@many
@given(cases("lora", "dora").filter(lambda case: (case.method, case.weight) != ("dora", "tiny")))  # norms ≥ 1e-38 here
def test_of_our_layers(case):
    for name in LAYER_LAWS:
        laws(case.method)[name].check(ours(torch.device("cpu"))[case.method], case)


@many
@given(cases("lora"))
def test_of_a_plain_layer(case):
    for name in LAYER_LAWS:
        laws("lora")[name].check(implementations.LoRALayer, case)


@pytest.mark.parity
@many
@given(cases("lora"))
def test_of_peft_s_layers(case):
    from benchmarks.peer_callables import peft_linear

    for name in LAYER_LAWS:
        laws("lora")[name].check(peft_linear, case)


@pytest.mark.parity
@many
@given(nf4_weights())
def test_of_bitsandbytes_nf4(case):
    from benchmarks.peer_nf4 import bitsandbytes_dequantize_flat, bitsandbytes_quantize

    left_out = ("views", "16-bit", *(EXACT if case.kind == "tiny" else ()))
    for law in laws("nf4").values():
        if law.name not in left_out:
            law.check((bitsandbytes_quantize, bitsandbytes_dequantize_flat), case)

"""The public checks raise no false alarm: 10,000 drawn cases of right implementations."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.cli.selftest import implementations as ours
from minilora.testing import NF4Weight, implementations, laws
from minilora.testing.nf4_cases import DrawnKind
from minilora.testing.strategies import WEIGHT_KINDS, adapted_linears, seeds

pytestmark = pytest.mark.long
LAYER_LAWS = ("forward", "identity", "merge", "gradients", "scale", "sums", "frozen")
many = settings(max_examples=2500, deadline=None)
float32_weights = st.builds(
    NF4Weight, st.integers(1, 9), st.integers(1, 200), kind=st.sampled_from(get_args(DrawnKind)), seed=seeds
)


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
@given(float32_weights)
def test_of_bitsandbytes_nf4(case):
    from benchmarks.peer_nf4 import bitsandbytes_dequantize_flat, bitsandbytes_quantize

    for law in laws("nf4").values():
        if law.name not in ("views", "16-bit"):
            law.check((bitsandbytes_quantize, bitsandbytes_dequantize_flat), case)

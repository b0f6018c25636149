"""Check anybody's LoRA, DoRA, NF4, loss masking and adapter files: see `checks`.

`minilora.testing.strategies` draws hypothesis examples; nothing else here needs the extra `testing`.
"""

from minilora.testing.bounds import Bounded
from minilora.testing.cases import AdaptedLinear
from minilora.testing.checks import (
    check,
    check_adapter_sum,
    check_dora_linear,
    check_gradients,
    check_lora_linear,
    check_merge,
    laws,
    on_numpy,
    parametrize_laws,
)
from minilora.testing.compare import assert_maths, assert_parity, assert_precision
from minilora.testing.laws import CheckFailure, NotApplicable
from minilora.testing.merge_laws import AdapterSum

__all__ = [
    "AdaptedLinear",
    "AdapterSum",
    "Bounded",
    "CheckFailure",
    "NotApplicable",
    "assert_maths",
    "assert_parity",
    "assert_precision",
    "check",
    "check_adapter_sum",
    "check_dora_linear",
    "check_gradients",
    "check_lora_linear",
    "check_merge",
    "laws",
    "on_numpy",
    "parametrize_laws",
]

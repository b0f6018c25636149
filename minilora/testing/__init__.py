"""Check anybody's LoRA, DoRA, NF4, loss masking and adapter files: see `checks`.

The module `strategies` draws layers with Hypothesis; nothing else needs the extra `testing`.
"""

from minilora.testing.cases import AdaptedLinear
from minilora.testing.chat_laws import Chat, MarkedWords
from minilora.testing.checks import (
    check,
    check_accumulation,
    check_adapter_directory,
    check_adapter_sum,
    check_adapters,
    check_chat_mask,
    check_dora_linear,
    check_double_quant,
    check_generation,
    check_linear4bit,
    check_lora_linear,
    check_loss_masking,
    check_merge,
    check_merge_cycle,
    check_nf4,
    check_packing,
    check_recompute,
    check_resume,
    check_roundtrip,
    laws,
    on_numpy,
    parametrize_laws,
)
from minilora.testing.compare import Bounded, assert_maths, assert_parity, assert_precision
from minilora.testing.data_cases import MaskedLogits, MicroBatches
from minilora.testing.kernel_laws import check_kernel
from minilora.testing.laws import CheckFailure, NotApplicable, Report
from minilora.testing.lifecycle_laws import AdaptedModel, Stops
from minilora.testing.merge_laws import AdapterSum
from minilora.testing.nf4_cases import AbsmaxVector, NF4Weight, QuantizedLinear
from minilora.testing.sequence_laws import Lengths
from minilora.testing.step_laws import check_trains_everything

__all__ = [
    "AbsmaxVector",
    "AdaptedLinear",
    "AdaptedModel",
    "AdapterSum",
    "Bounded",
    "Chat",
    "CheckFailure",
    "Lengths",
    "MarkedWords",
    "MaskedLogits",
    "MicroBatches",
    "NF4Weight",
    "NotApplicable",
    "QuantizedLinear",
    "Report",
    "Stops",
    "assert_maths",
    "assert_parity",
    "assert_precision",
    "check",
    "check_accumulation",
    "check_adapter_directory",
    "check_adapter_sum",
    "check_adapters",
    "check_chat_mask",
    "check_dora_linear",
    "check_double_quant",
    "check_generation",
    "check_kernel",
    "check_linear4bit",
    "check_lora_linear",
    "check_loss_masking",
    "check_merge",
    "check_merge_cycle",
    "check_nf4",
    "check_packing",
    "check_recompute",
    "check_resume",
    "check_roundtrip",
    "check_trains_everything",
    "laws",
    "on_numpy",
    "parametrize_laws",
]

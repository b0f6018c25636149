"""Check anybody's LoRA, DoRA, NF4, loss masking and adapter files: see `checks`.

The module `strategies` draws layers with Hypothesis; nothing else needs the extra `testing`.
"""

from minilora.testing.cases import AdaptedLinear as AdaptedLinear
from minilora.testing.chat_laws import Chat as Chat
from minilora.testing.chat_laws import MarkedWords as MarkedWords
from minilora.testing.checks import check as check
from minilora.testing.checks import check_accumulation as check_accumulation
from minilora.testing.checks import check_adapter_directory as check_adapter_directory
from minilora.testing.checks import check_adapter_sum as check_adapter_sum
from minilora.testing.checks import check_adapters as check_adapters
from minilora.testing.checks import check_chat_mask as check_chat_mask
from minilora.testing.checks import check_dora_linear as check_dora_linear
from minilora.testing.checks import check_double_quant as check_double_quant
from minilora.testing.checks import check_generation as check_generation
from minilora.testing.checks import check_linear4bit as check_linear4bit
from minilora.testing.checks import check_lora_linear as check_lora_linear
from minilora.testing.checks import check_loss_masking as check_loss_masking
from minilora.testing.checks import check_merge as check_merge
from minilora.testing.checks import check_merge_cycle as check_merge_cycle
from minilora.testing.checks import check_nf4 as check_nf4
from minilora.testing.checks import check_packing as check_packing
from minilora.testing.checks import check_recompute as check_recompute
from minilora.testing.checks import check_resume as check_resume
from minilora.testing.checks import check_roundtrip as check_roundtrip
from minilora.testing.checks import laws as laws
from minilora.testing.checks import on_numpy as on_numpy
from minilora.testing.checks import parametrize_laws as parametrize_laws
from minilora.testing.compare import Bounded as Bounded
from minilora.testing.compare import assert_maths as assert_maths
from minilora.testing.compare import assert_parity as assert_parity
from minilora.testing.compare import assert_precision as assert_precision
from minilora.testing.data_laws import MaskedLogits as MaskedLogits
from minilora.testing.data_laws import MicroBatches as MicroBatches
from minilora.testing.kernel_laws import check_kernel as check_kernel
from minilora.testing.laws import CheckFailure as CheckFailure
from minilora.testing.laws import NotApplicable as NotApplicable
from minilora.testing.laws import Report as Report
from minilora.testing.lifecycle_laws import AdaptedModel as AdaptedModel
from minilora.testing.merge_laws import AdapterSum as AdapterSum
from minilora.testing.nf4_cases import AbsmaxVector as AbsmaxVector
from minilora.testing.nf4_cases import NF4Weight as NF4Weight
from minilora.testing.nf4_cases import QuantizedLinear as QuantizedLinear
from minilora.testing.sequence_laws import Lengths as Lengths
from minilora.testing.step_laws import Stops as Stops
from minilora.testing.step_laws import check_trains_everything as check_trains_everything

"""The peers' side of what is done at once; each function is what an operation `does`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import began, loaded, peft_model
from benchmarks.process import Measurement, Peak, norm_of, python, repeated
from benchmarks.work import NEW_TOKENS, Task, square_weight

IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import AutoModelForCausalLM",
    "peft": "import peft",
}


def generate(task: Task) -> Measurement:
    """transformers' generate: prompts padded at the left, and an end token is a token like all."""
    peak = began(task)
    model, compared = peft_model(task).eval(), NEW_TOKENS if task.work.dtype == "float32" else 1
    longest = max(map(len, task.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in task.prompts], device=task.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in task.prompts], device=task.device)
    model.generation_config.eos_token_id = None

    def write(count: int) -> Tensor:
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, **settings)[:, longest:]

    amount = NEW_TOKENS * len(task.prompts)
    return repeated(peak, lambda _: write(NEW_TOKENS), amount=amount, result=lambda: int(write(compared).sum()))


def load(task: Task) -> Measurement:
    arguments = f"{str(task.model)!r}, dtype={task.work.dtype!r}, device_map={task.device!r}"
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({arguments})"
    return repeated(began(task), python("-c", code), result=lambda: norm_of(loaded(task).parameters()))


def load_again(task: Task) -> Measurement:
    return repeated(began(task), lambda _: loaded(task), result=lambda: norm_of(loaded(task).parameters()))


def import_(task: Task) -> Measurement:
    return repeated(Peak(task.device), python("-c", IMPORTS[task.side]))


def merge(task: Task) -> Measurement:
    peak, model = began(task), peft_model(task)

    def result() -> float:
        return norm_of(model.merge_and_unload().parameters())

    return repeated(peak, lambda each: each.merge_and_unload(), lambda: copy.deepcopy(model), result=result)


def weights(task: Task) -> list[Tensor]:
    """Of the model's linears but the head, or one square one of the side in the operation's name."""
    _, _, side = task.work.name.partition("-")
    if side:
        return [square_weight(int(side), task.device)]
    modules = loaded(task).named_modules()
    return [module.weight.detach() for name, module in modules if isinstance(module, nn.Linear) and name != "lm_head"]


def packed_by_bitsandbytes(dense: list[Tensor]) -> list[Any]:
    """Codes and state of each."""
    from bitsandbytes.functional import quantize_4bit

    return [quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in dense]


def quantize(task: Task) -> Measurement:
    peak, dense = began(task), weights(task)

    def codes() -> float:
        return sum(int(codes.long().sum()) for codes, _ in packed_by_bitsandbytes(dense))

    def do(_: Any) -> None:
        for weight in dense:
            packed_by_bitsandbytes([weight])

    return repeated(peak, do, result=codes)


def dequantize(task: Task) -> Measurement:
    """bitsandbytes has kernels for some devices, and a path of PyTorch's own operations for all."""
    from bitsandbytes.functional import dequantize_4bit

    peak, packed = began(task), packed_by_bitsandbytes(weights(task))
    one: Callable[[Tensor, Any], Tensor] = dequantize_4bit if task.side == "bitsandbytes" else _in_pytorch

    def do(_: Any) -> None:
        for each in packed:
            one(*each)

    with torch.compiler.set_stance("force_eager"):  # the path in PyTorch would be compiled first
        return repeated(peak, do, result=lambda: norm_of(one(*each) for each in packed))


def _in_pytorch(codes: Tensor, state: Any) -> Tensor:
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute, _dequantize_blockwise_compute

    nested = state.state2
    absmax = _dequantize_blockwise_compute(state.absmax, nested.absmax, nested.code, nested.blocksize, nested.dtype)
    absmax += state.offset
    return _dequantize_4bit_compute(codes.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)

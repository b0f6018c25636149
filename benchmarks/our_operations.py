"""minilora's side of what is done at once; each function is what an operation `does`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

import minilora.public as ml  # all of it now: memory is counted from after the imports
from benchmarks.process import Measurement, Peak, norm_of, python, repeated
from benchmarks.work import NEW_TOKENS, Task, square_weight
from minilora.adapter import linear_layers
from minilora.nf4 import Layout, dequantize_weight, quantize_weight


def loaded(task: Task) -> Any:
    """The base."""
    return ml.load_model(task.model, task.work.dtype, task.device, "nf4" if task.work.method == "qlora" else None)


def adapted(task: Task) -> Any:
    """The base with the adapter, not to be trained."""
    model = loaded(task)
    ml.load_adapter(model, task.adapter)
    return model.eval()


def generate(task: Task) -> Measurement:
    """The result is the sum of the new tokens; in bfloat16 of the first ones, since close calls end otherwise."""
    peak = Peak(task.device)
    model, compared = adapted(task), NEW_TOKENS if task.work.dtype == "float32" else 1

    def write(count: int) -> list[list[int]]:
        with ml.merged(model):
            return ml.generate(model, task.prompts, max_new_tokens=count)

    amount = NEW_TOKENS * len(task.prompts)
    return repeated(peak, lambda _: write(NEW_TOKENS), amount=amount, result=lambda: sum(map(sum, write(compared))))


def load(task: Task) -> Measurement:
    """By a program that does nothing else, which is when one waits for it."""
    code = f"from minilora import load_model; load_model({str(task.model)!r}, {task.work.dtype!r}, {task.device!r})"
    return repeated(Peak(task.device), python("-c", code), result=lambda: norm_of(loaded(task).parameters()))


def load_again(task: Task) -> Measurement:
    return repeated(Peak(task.device), lambda _: loaded(task), result=lambda: norm_of(loaded(task).parameters()))


def import_(task: Task) -> Measurement:
    """With the names that a run needs: the package alone imports hardly anything."""
    return repeated(Peak(task.device), python("-c", "from minilora import attach, load_model, train"))


def merge(task: Task) -> Measurement:
    peak, model = Peak(task.device), adapted(task)

    def result() -> float:
        ml.merge(model)
        return norm_of(model.parameters())

    return repeated(peak, ml.merge, lambda: copy.deepcopy(model), result=result)


def weights(task: Task) -> list[Tensor]:
    """Of the model's linears but the head, or one square one of the side in the operation's name."""
    _, _, side = task.work.name.partition("-")
    if side:
        return [square_weight(int(side), task.device)]
    return [linear.weight.detach() for path, linear in linear_layers(loaded(task)).items() if path != "lm_head"]


def quantize(task: Task) -> Measurement:
    """The result is the sum of all bytes of codes."""
    peak, dense = Peak(task.device), weights(task)

    def codes() -> float:
        return sum(int(quantize_weight(weight).packed.long().sum()) for weight in dense)

    def do(_: Any) -> None:
        for weight in dense:
            quantize_weight(weight)

    return repeated(peak, do, result=codes)


def dequantize(task: Task) -> Measurement:
    peak = Peak(task.device)
    packed = [(quantize_weight(W), Layout(tuple(W.shape), W.dtype), W.dtype) for W in weights(task)]

    def do(_: Any) -> None:
        for each in packed:
            dequantize_weight(*each)

    return repeated(peak, do, result=lambda: norm_of(dequantize_weight(*each) for each in packed))

"""Check the laws of LoRA on this machine, by the definitions and by the kernels.

Each law compares results with a float64 oracle. The numbers are the largest
error in relation to its derived bound: 1 is the limit. The exit status is 1 if
a law is broken.

Example:
  minilora selftest --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora import nf4
from minilora.adapter import add_adapter
from minilora.adapters.combine import Factors, concatenate
from minilora.cli import Options, Parser
from minilora.definition import WITH_KERNEL, plain
from minilora.lora import LoraAdapter, LoraLinear, dense_linear, lora_scale
from minilora.models.checkpoint import pick_device
from minilora.testing.checks import check_kernel, laws
from minilora.testing.laws import CheckFailure, Law, Report

LENGTHS = [5, 1, 9]  # of the documents of one call of attention


def add_flags(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help="device to check: cpu, cuda, mps (default: auto)")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype to check (default: float32)")


def run(options: Options) -> int:
    device = pick_device(options["device"])
    print(f"PyTorch {torch.__version__}, {device}, {options['dtype']}, threads: {torch.get_num_threads()}")
    print("largest error / derived bound; 1 is the limit")
    print(f"{'law':36} {'definitions':>11} {'kernels':>9}  verdict")
    broken = []
    for row in selftest(device, options["dtype"]):
        definitions = "" if row.definitions is None else f"{row.definitions:.3f}"
        print(f"{row.law:36} {definitions:>11} {row.kernels:9.3f}  {'BROKEN' if row.failure else 'holds'}", flush=True)
        broken += [row.failure] if row.failure else []
    print("\n".join(["", *broken]) if broken else "all laws hold")
    return 1 if broken else 0


class Row(NamedTuple):
    """How much of the allowed error a law used."""

    law: str
    definitions: float | None  # None where they are what kernels are compared with
    kernels: float
    failure: str  # the message of a broken law, or ""


def selftest(device: torch.device, dtype: str) -> Iterator[Row]:
    """Check the laws on a device in a dtype, one after another."""
    tried = implementations(device)
    for law in laws(*tried).values():
        if law.name == "16-bit":  # which is the law of the forward once more
            continue
        # absmaxes are float32, and powers of two may be denormal
        is_float32 = law.kind in ("nf4", "double_quant") or (law.kind == "linear4bit" and dtype == "float64")
        own = "float32" if is_float32 else dtype
        check = partial(in_dtype(law, own).check, tried[law.kind])
        with plain():
            definitions, broken = used(check)
        kernels, also = used(check)
        yield Row(law.id if own == dtype else f"{law.id} ({own})", definitions, kernels, broken or also)
    for name, (call, tensors) in kernel_calls(device, getattr(torch, dtype)).items():
        kernel = WITH_KERNEL[name]
        ratio, broken = used(partial(check_kernel, partial(call, kernel), partial(call, kernel.function), tensors))
        yield Row(f"kernel-{name}", None, ratio, broken)


def in_dtype(law: Law, dtype: str) -> Law:
    """Return a law with its cases in a dtype, each of them once."""
    cases = [replace(case, dtype=dtype) if hasattr(case, "dtype") else case for case in law.cases]
    distinct = {repr(case): case for case in cases}
    return replace(law, cases=list(distinct.values()))


def used(check: Callable[[], Report]) -> tuple[float, str]:
    """Return how much of the allowed error a check found, and the message of the law if it is broken."""
    try:
        return check().ratio, ""
    except CheckFailure as failure:
        return float("inf"), str(failure)


class OnDevice(nn.Module):
    """A module on a device, for inputs and results on the CPU."""

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self.device = module.to(device), device

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.to(self.device)).to(x.device)


def adapted(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    dropout: float = 0.0,
) -> LoraLinear:
    """Return a linear layer with one adapter, which is active."""
    tensors = {"lora_A": A, "lora_B": B, **({} if magnitude is None else {"magnitude": magnitude})}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    layer = LoraLinear(dense_linear(W, b), "layer")
    add_adapter(layer, "default", LoraAdapter(copies, scale, dropout))
    layer.active = ("default",)
    return layer


def implementations(device: torch.device) -> dict[str, Any]:
    """Return what minilora has for each kind of law, on a device."""

    def make_layer(
        W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, use_rslora: bool = False, **more: Any
    ) -> nn.Module:
        if more.pop("use_dora", False):
            more.setdefault("magnitude", W.norm(dim=1))
        return OnDevice(adapted(W, b, A, B, lora_scale(len(A), alpha, use_rslora), **more), device)

    def merge(W: Tensor, *adapter: Any) -> Tensor:
        return adapted(W, None, *adapter).to(device).merged_weight()

    def add(adapters: Any, weights: list[float]) -> Factors:
        parts = zip(adapters, weights, strict=True)
        return concatenate([Factors(A, B, weight * scale) for (A, B, scale), weight in parts])

    def quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return nf4.quantize(W.to(device), block_size)

    def dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
        return nf4.dequantize(packed, absmax, shape, torch.float32, block_size)

    def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return nf4.quantize_absmax(absmax.to(device))

    def make_linear4bit(W: Tensor, b: Tensor | None, double_quant: bool = False) -> nn.Module:
        return OnDevice(nf4.NF4Linear.quantize(W, b, double_quant), device)

    return {
        **dict.fromkeys(("lora", "rslora", "dora"), make_layer),
        **dict.fromkeys(("merge", "merge_dora"), merge),
        "adapter_sum": add,
        "nf4": (quantize, dequantize),
        "double_quant": (quantize_absmax, nf4.dequantize_absmax),
        "linear4bit": make_linear4bit,
    }


Call = Callable[..., Tensor]


def kernel_calls(device: torch.device, dtype: torch.dtype) -> Mapping[str, tuple[Call, list[Tensor]]]:
    """Return a call (function, *tensors) and its tensors for each kernel that no other law compares with an oracle."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))

    N, D, V = sum(LENGTHS), 24, 40
    labels = torch.randint(V, (N,), generator=generator)

    def of_head(function: Call, hidden: Tensor, weight: nn.Parameter) -> Tensor:
        head = nn.Linear(D, V, bias=False, device="meta")
        head.weight = weight
        return function(hidden, labels.to(hidden.device), head)

    return {
        "rms_norm": (lambda function, x, w: function(x, w, 1e-6), [drawn(N, D), drawn(D)]),
        "swiglu": (lambda function, gate, up: function(gate, up), [drawn(N, D), drawn(N, D)]),
        "causal_attention": (
            lambda function, q, k, v: function(q, k, v, LENGTHS, LENGTHS),
            [drawn(N, 4, 8), drawn(N, 2, 8), drawn(N, 2, 8)],
        ),
        "cross_entropy": (of_head, [drawn(N, D), drawn(V, D)]),
    }

"""Check the laws of LoRA on this machine, by the definitions and by the kernels.

Each law compares results with a float64 oracle. The numbers are the largest
error in relation to its derived bound: 1 is the limit. The exit status is 1 if
a law is broken.

Example:
  minilora selftest --dtype bfloat16
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora import llama, nf4
from minilora.adapter import add_adapter
from minilora.adapters.combine import Factors, concatenate
from minilora.cli import Options, Parser
from minilora.data import Batch, Example, collate
from minilora.definition import WITH_KERNEL, plain
from minilora.lora import LoraAdapter, LoraLinear, dense_linear, lora_scale
from minilora.models.checkpoint import pick_device
from minilora.testing.checks import check_kernel, laws
from minilora.testing.laws import CheckFailure, Law
from minilora.training import adamw, train_step

LENGTHS = [5, 1, 9]  # of the documents of one call of attention


def add_flags(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help="device to check: cpu, cuda, mps (default: auto)")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype to check (default: float32)")


def run(options: Options) -> int:
    device, threads = pick_device(options["device"]), torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    print(f"PyTorch {torch.__version__}, {device}, {options['dtype']}, {threads} thread{plural}")
    print("largest error / derived bound; 1 is the limit")
    print(f"{'law':36} {'definitions':>11} {'kernels':>9}  verdict")
    rows = []
    for row in selftest(device, options["dtype"]):
        rows.append(row)
        print(_line(row, options["dtype"]), flush=True)
    broken = [row.failure for row in rows if row.failure]
    kernels = sum(row.definitions is None for row in rows)
    others = ["16-bit", *sorted({law.kind for law in laws().values()} - {*implementations(device)})]
    held = f"{len(rows) - kernels} laws and {kernels} kernels hold; not run here: {', '.join(others)}"
    print("\n".join(["", *broken]) if broken else held)
    return 1 if broken else 0


def _line(row: Row, dtype: str) -> str:
    law = row.law if row.dtype == dtype else f"{row.law} ({row.dtype})"
    definitions = "" if row.definitions is None else f"{row.definitions:.3f}"
    return f"{law:36} {definitions:>11} {row.kernels:9.3f}  {'BROKEN' if row.failure else 'holds'}"


class Row(NamedTuple):
    """How much of the allowed error a law used."""

    law: str
    dtype: str  # of the results
    definitions: float | None  # None where they are what kernels are compared with
    kernels: float
    failure: str  # the message of a broken law, or ""


def selftest(device: torch.device, dtype: str) -> Iterator[Row]:
    """Check the laws on a device in a dtype, one after another."""
    tried, cases = implementations(device), dict[str, Any]()
    for law in laws(*tried).values():
        if law.name != "16-bit":  # which is the law of the forward once more
            own = dtype_of(law, dtype)
            on_dtype = replace(law, cases=functools.partial(in_dtype, law, own, cases))
            with plain():
                definitions, broken = used(on_dtype, tried[law.kind])
            kernels, also = used(on_dtype, tried[law.kind])
            yield Row(law.id, own, definitions, kernels, broken or also)
    for name, (call, tensors) in kernel_calls(device, getattr(torch, dtype)).items():
        kernel = WITH_KERNEL[name]
        try:
            report = check_kernel(functools.partial(call, kernel), functools.partial(call, kernel.function), tensors)
            yield Row(f"kernel-{name}", dtype, None, report.ratio, "")
        except CheckFailure as failure:
            yield Row(f"kernel-{name}", dtype, None, float("inf"), str(failure))


def dtype_of(law: Law, dtype: str) -> str:
    """Return the dtype in which a law is checked: float32 where absmaxes are, and powers of two may be denormal."""
    is_float32 = law.kind in ("nf4", "double_quant") or (law.kind == "linear4bit" and dtype == "float64")
    return "float32" if is_float32 else dtype


def in_dtype(law: Law, dtype: str, shared: dict[str, Any]) -> list[Any]:
    """Return the cases of a law in a dtype; laws share cases, by their `repr`, and with them the right results."""
    cases = [replace(case, dtype=dtype) if hasattr(case, "dtype") else case for case in law.cases()]
    return [shared.setdefault(name, case) for name, case in {repr(case): case for case in cases}.items()]


def used(law: Law, implementation: Any) -> tuple[float, str]:
    """Return how much of the allowed error an implementation uses, and the message of the law if it is broken."""
    try:
        return law.check(implementation).ratio, ""
    except CheckFailure as failure:
        return float("inf"), str(failure)


def implementations(device: torch.device) -> dict[str, Any]:
    """Return what minilora has for each kind of law, on a device."""
    training = {"loss_masking": functools.partial(loss, device), "accumulation": functools.partial(step, device)}
    return adapters(device) | four_bits(device) | training


def adapters(device: torch.device) -> dict[str, Any]:
    def adapted(W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, *more: Tensor, **p: float) -> Any:
        named = dict(zip(("lora_A", "lora_B", "magnitude"), (A, B, *more), strict=False))
        layer = LoraLinear(dense_linear(W, b), "layer").to(device)
        add_adapter(layer, "default", LoraAdapter({name: t.detach().clone() for name, t in named.items()}, scale, **p))
        layer.active = ("default",)
        return layer

    def make_layer(
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        magnitude: Tensor | None = None,
    ) -> nn.Module:
        more = [W.norm(dim=1) if magnitude is None else magnitude] if use_dora else []
        return OnDevice(adapted(W, b, A, B, lora_scale(len(A), alpha, use_rslora), *more, dropout=dropout), device)

    def merge(W: Tensor, *adapter: Any) -> Tensor:
        return adapted(W, None, *adapter).merged_weight()

    def add(adapters: Any, weights: list[float]) -> Factors:
        parts = zip(adapters, weights, strict=True)
        return concatenate([Factors(A, B, weight * scale) for (A, B, scale), weight in parts])

    return {
        **dict.fromkeys(("lora", "rslora", "dora"), make_layer),
        "merge": merge,
        "merge_dora": merge,
        "adapter_sum": add,
    }


def four_bits(device: torch.device) -> dict[str, Any]:
    def quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return nf4.quantize(W.to(device), block_size)

    def dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
        return nf4.dequantize(packed, absmax, shape, torch.float32, block_size)

    def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return nf4.quantize_absmax(absmax.to(device))

    def make_layer(W: Tensor, b: Tensor | None, double_quant: bool = False) -> nn.Module:
        return OnDevice(nf4.NF4Linear.quantize(W, b, double_quant), device)

    pairs = {"nf4": (quantize, dequantize), "double_quant": (quantize_absmax, nf4.dequantize_absmax)}
    return {**pairs, "linear4bit": make_layer}


def loss(device: torch.device, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits in the place of hidden states."""
    batch = collate([Example([0] * len(row), row) for row in labels.tolist()], device)
    rows = logits.to(device).flatten(0, 1).index_select(0, batch.label_positions)
    return llama.cross_entropy(rows, batch.labels, nn.Identity()) / len(batch.labels)


def step(device: torch.device, W: Tensor, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradient of one step of `train_step`, of a model that is its head W alone."""
    head, batches = nn.Linear(W.size(1), W.size(0), bias=False, device=device, dtype=W.dtype), []
    head.weight.data.copy_(W)
    for x, labels in micro_batches:
        batch = collate([Example([0] * len(row), row) for row in labels.tolist()], device)
        batches.append(Batch(x.to(device).flatten(0, 1), batch.lengths, batch.label_positions, batch.labels))
    model: Any = SimpleNamespace(
        train=lambda: None,
        model=lambda hidden, lengths, checkpointing: hidden,
        get_output_embeddings=lambda: head,
    )
    train_step(model, adamw(head.parameters()), batches, max_grad_norm=0)
    return head.weight.grad if head.weight.grad is not None else torch.zeros_like(W)


class OnDevice(nn.Module):
    """A module on a device, for inputs and results on the CPU."""

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self.device = module.to(device), device

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.to(self.device)).to(x.device)


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

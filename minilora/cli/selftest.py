"""Check the laws of LoRA on this machine, with and without the faster kernels.

Results are compared with float64. Each number is the largest error divided by
its derived bound: up to 1 the law holds. The exit status is 1 if a law is
broken.

Example:
  minilora selftest --dtype bfloat16
  minilora selftest --device cuda --json cuda.json  # for an issue about a device
"""

import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minilora
from minilora import llama, nf4
from minilora.adapters.weighted import Factors, concatenate
from minilora.cli import Options, Parser
from minilora.definition import plain
from minilora.files import write_json
from minilora.lora import LoraAdapter, LoraLinear, dense_linear, lora_scale
from minilora.models.checkpoint import usable_device
from minilora.models.delta_rule import gated_delta_rule, unit
from minilora.runs.directory import without_nan
from minilora.runs.settings import DEVICE_HELP
from minilora.testing.checks import laws
from minilora.testing.kernel_laws import check_kernel
from minilora.testing.laws import CheckFailure, Report

Check = Callable[[], Report]
LENGTHS = [5, 1, 9]  # of the documents of one call


def add_flags(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help=f"{DEVICE_HELP} (default: auto)")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="number format to check (default: float32)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the table to this file")


def run(options: Options) -> int:
    device = usable_device(options["device"])
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    versions = f"minilora {minilora.__version__}, PyTorch {torch.__version__}"
    print(f"{versions}, {machine}, {options['dtype']}, threads: {torch.get_num_threads()}")
    print("largest error / derived bound; 1 is the limit")
    print(f"{'law':36} {'definitions':>11} {'kernels':>9}  verdict")
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    checks = law_checks(device, options["dtype"]) | kernel_checks(device, getattr(torch, options["dtype"]))
    for name, check in checks.items():
        ratios, broken = [], []
        for mode in (plain(), nullcontext()):
            try:
                with mode:
                    ratios.append(check().ratio)
            except CheckFailure as failure:
                ratios.append(float("inf"))
                broken.append(str(failure))
        print(f"{name:36} {ratios[0]:11.3f} {ratios[1]:9.3f}  {'BROKEN' if broken else 'holds'}", flush=True)
        failures += broken[:1]
        rows.append({"law": name, "definitions": ratios[0], "kernels": ratios[1], "holds": not broken})
    print("\n".join(["", *failures]) if failures else "all laws hold")
    if options["json"]:
        about = {"versions": versions, "system": platform.platform(), "device": machine, "dtype": options["dtype"]}
        write_json(options["json"], without_nan({**about, "rows": rows, "failures": failures}))
        print(f"wrote {options['json']}: please attach it to an issue of the form 'A device that was tried'")
    return 1 if failures else 0


def law_checks(device: torch.device, dtype: str) -> dict[str, Check]:
    """Return a check of each law on a device in a dtype, by what is printed as its name."""
    tried = implementations(device)
    checks: dict[str, Check] = {}
    for law in laws(*tried).values():
        if law.name == "16-bit":  # which is the law of the forward once more
            continue
        # absmaxes are float32, and powers of two may be denormal
        is_float32 = law.kind in ("nf4", "double_quant") or (law.kind == "linear4bit" and dtype == "float64")
        own = "float32" if is_float32 else dtype
        cases = [replace(case, dtype=own) if hasattr(case, "dtype") else case for case in law.cases]
        name = law.id if own == dtype else f"{law.id} ({own})"
        checks[name] = partial(replace(law, cases=list(dict.fromkeys(cases))).check, tried[law.kind])
    return checks


def implementations(device: torch.device) -> dict[str, Any]:
    """Return what minilora has for each kind of law, on a device; inputs and results of layers are on the CPU.

    The laws of merging are among those of layers, which have a `merged_weight`.
    """

    def moved(layer: nn.Module) -> Any:
        layer.to(device)
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(device),))
        layer.register_forward_hook(lambda _, inputs, y: y.cpu())
        return layer

    def make_layer(W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, alpha: float, **options: Any) -> Any:
        tensors = {"lora_A": A, "lora_B": B}
        if "use_dora" in options:
            tensors["magnitude"] = options.get("magnitude", W.norm(dim=1))
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        scale = lora_scale(len(A), alpha, options.get("use_rslora", False))
        adapter = LoraAdapter(copies, scale, options.get("dropout", 0.0))
        layer = LoraLinear(dense_linear(W, b), "layer", {"default": adapter})
        layer.active = ("default",)
        return moved(layer)

    def add(adapters: Any, weights: list[float]) -> Factors:
        parts = zip(adapters, weights, strict=True)
        return concatenate([Factors(A, B, weight * scale) for (A, B, scale), weight in parts])

    return {
        **dict.fromkeys(("lora", "rslora", "dora"), make_layer),
        "adapter_sum": add,
        "nf4": (
            lambda W, block_size: nf4.quantize(W.to(device), block_size),
            lambda packed, absmax, shape, block_size: nf4.dequantize(packed, absmax, shape, torch.float32, block_size),
        ),
        "double_quant": (lambda absmax: nf4.quantize_absmax(absmax.to(device)), nf4.dequantize_absmax),
        "linear4bit": lambda W, b, double_quant=False: moved(nf4.NF4Linear.quantize(W, b, double_quant)),
    }


def kernel_checks(device: torch.device, dtype: torch.dtype) -> dict[str, Check]:
    """Return a check of each kernel that no other law compares with an oracle, against its definition."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))

    N, D, V = sum(LENGTHS), 24, 40
    labels = torch.randint(V, (N,), generator=generator)

    def loss(hidden: Tensor, weight: nn.Parameter) -> Tensor:
        head = nn.Linear(D, V, bias=False, device="meta")
        head.weight = weight
        return llama.cross_entropy(hidden, labels.to(hidden.device), head)

    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "rms_norm": (partial(llama.rms_norm, eps=1e-6), [drawn(N, D), drawn(D)]),
        "swiglu": (llama.swiglu, [drawn(N, D), drawn(N, D)]),
        "causal_attention": (
            lambda q, k, v: llama.causal_attention(q, k, v, LENGTHS, LENGTHS),
            [drawn(N, 4, 8), drawn(N, 2, 8), drawn(N, 2, 8)],
        ),
        "gated_delta_rule": (
            lambda q, k, v, g, b: gated_delta_rule(q, unit(k), v, -g.square(), b.sigmoid(), LENGTHS)[0],
            [drawn(N, 2, 8), drawn(N, 2, 8), drawn(N, 4, 8), drawn(N, 4), drawn(N, 4)],
        ),
        "cross_entropy": (loss, [drawn(N, D), drawn(V, D)]),
    }
    pairs = {name: (call, plain()(call), tensors) for name, (call, tensors) in calls.items()}
    return {f"kernel-{name}": partial(check_kernel, *each, name) for name, each in pairs.items()}

"""Four bits beside bitsandbytes and beside sixteen: time and memory, compared in one run on the same work.

    python benchmarks/quantize.py [--model DIR] [--device cuda] [--threads N] [--runs N]

Weights are bfloat16, and NF4 with double quantization in all linears but the head. A training step has 4 rows of 512
tokens, all learned, and rank 16 on every linear. bitsandbytes is of the extra `parity`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import RATIOS, Bound, alternate, in_fresh_process, ratio_row, surroundings, table, verdict
from torch import Tensor

import minilora as ml
from minilora.lora.find import linear_layers
from minilora.model.config import LlamaConfig
from minilora.model.llama import Llama
from minilora.quant.config import Quantize, QuantizeConfig
from minilora.quant.linear import Linear, NF4Linear
from minilora.quant.nf4 import Layout, pack, unpack
from minilora.train.batch import collate
from minilora.train.diagnose import held_memory_bytes, peak_memory_bytes
from minilora.train.memory import forecast
from minilora.train.objective import batch_loss

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SIDES = (2048, 4096)  # of square linears that models of 1B and of 7B have
ROWS, LENGTH = 4, 512
TRAINING = ml.TrainConfig(batch_size=ROWS, max_steps=3)
KINDS: tuple[Quantize, Quantize] = ("none", "nf4")  # LoRA, QLoRA
MEMORY = ("memory", "LoRA", "QLoRA", "compared", "required", "met")
SIZE = ("bits a weight", "double quantization", "without")


def random_model(directory: Path) -> Path:
    """A model of SmolLM2-135M's shapes, in a directory."""
    model = Llama(LlamaConfig.from_dict(SMOLLM2), torch.Generator().manual_seed(0))
    ml.save_model(model.to(torch.bfloat16), directory)
    return directory


def packable(model: Llama) -> list[Linear]:
    """The linears that can be in four bits: all but the head."""
    return [linear for path, linear in linear_layers(model).items() if path != "lm_head"]


def weight_bytes(linears: Iterable[Linear]) -> int:
    """What their weights take, dense or packed."""
    weights = [linear.parts if isinstance(linear, NF4Linear) else (linear.weight,) for linear in linears]
    return sum(part.nbytes for parts in weights for part in parts if part is not None)


def adapted(directory: Path, quantize: Quantize, device: torch.device) -> Llama:
    """The model with a fresh adapter, ready to be trained."""
    model = ml.load_model(directory, torch.bfloat16, device, quantize)
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model.train()


def examples(vocabulary: int) -> list[ml.Example]:
    """Random rows of which every token is learned."""
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [ml.Example(row, row) for row in tokens]


def each(function: Callable[..., Any], items: Iterable[Sequence[Any]]) -> Callable[[], None]:
    """The work of calling it with every item, one after the other, and letting go of the results."""

    def work() -> None:
        for item in items:
            function(*item)

    return work


def compare_quantizing(what: str, weights: Sequence[Tensor], runs: int) -> list[list[str]]:
    """A row of RATIOS: into four bits."""
    from bitsandbytes.functional import quantize_4bit

    def theirs(weight: Tensor) -> Any:
        return quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    items = [(weight,) for weight in weights]
    times = alternate(runs, weights[0].device, each(theirs, items), each(pack, items))
    return [ratio_row(f"quantize {what}: bitsandbytes / minilora", *times, Bound("at least", 4))]


def compare_dequantizing(what: str, weights: Sequence[Tensor], runs: int) -> list[list[str]]:
    """Rows of RATIOS: out of four bits.

    bitsandbytes has a path of PyTorch's own operations for all devices, and kernels for some.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute, _dequantize_blockwise_compute
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def in_pytorch(codes: Tensor, state: Any) -> Tensor:
        nested = state.state2
        absmax = _dequantize_blockwise_compute(state.absmax, nested.absmax, nested.code, nested.blocksize, nested.dtype)
        absmax += state.offset
        return _dequantize_4bit_compute(codes.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)

    packed = [(pack(weight), Layout(tuple(weight.shape), weight.dtype), weight.dtype) for weight in weights]
    states = [quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in weights]
    works = each(in_pytorch, states), each(unpack, packed), each(dequantize_4bit, states)
    with torch.compiler.set_stance("force_eager"):  # they would compile the first
        theirs, ours, kernel = alternate(runs, weights[0].device, *works)
    return [
        ratio_row(f"dequantize {what}: bitsandbytes in PyTorch / minilora", theirs, ours, Bound("at least", 10)),
        ratio_row(f"dequantize {what}: minilora / bitsandbytes' kernel", ours, kernel),
    ]


def compare_steps(directory: Path, device: torch.device, runs: int) -> list[list[str]]:
    """A row of RATIOS: forward, backward and AdamW."""
    lora, qlora = (training_step(adapted(directory, quantize, device), device) for quantize in KINDS)
    return [ratio_row("training step: QLoRA / LoRA", *alternate(runs, device, qlora, lora), Bound("at most", 1.15))]


def training_step(model: Llama, device: torch.device) -> Callable[[], None]:
    """The work of one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = collate(examples(model.config.vocab_size), device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (batch_loss(model, batch, TRAINING) / batch.labelled).backward()
        optimizer.step()

    return step


def compare_memory(directory: Path, device: torch.device) -> list[list[str]]:
    """Rows of MEMORY: what the linears take, the peak of training, and what is told of it in advance."""
    shapes = [adapted(directory, quantize, torch.device("meta")) for quantize in KINDS]
    weights = [weight_bytes(packable(model)) for model in shapes]
    told, peaks = zip(
        *(in_fresh_process(told_and_taken, directory, quantize, device) for quantize in KINDS), strict=True
    )
    saved = weights[0] - weights[1]
    share = (peaks[0] - peaks[1]) / saved
    errors = [abs(peak - early) / peak for peak, early in zip(peaks, told, strict=True)]
    off = f"off by {errors[0]:.3f} and {errors[1]:.3f} of it"
    return [
        ["weights of the linears", *map(megabytes, weights), f"{megabytes(saved)} saved", "", ""],
        [
            "peak of training",
            *map(megabytes, peaks),
            f"{share:.2f} of that saved",
            *verdict(share, Bound("at least", 0.8)),
        ],
        ["forecast of the peak", *map(megabytes, told), off, *verdict(max(errors), Bound("at most", 0.1))],
    ]


def told_and_taken(directory: Path, quantize: Quantize, device: torch.device) -> tuple[int, int]:
    """What a process foretells of its memory, and the most that it takes to load the model and train a few steps."""
    shapes = adapted(directory, quantize, torch.device("meta"))
    told = forecast(shapes, [LENGTH] * ROWS, ROWS * (LENGTH - 1), TRAINING, device).peak + held_memory_bytes(device)
    model = adapted(directory, quantize, device)
    ml.train(model, examples(model.config.vocab_size), TRAINING)
    return told, peak_memory_bytes(device)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def bits_a_weight(directory: Path, scratch: Path) -> list[list[str]]:
    """Rows of SIZE: counted from the tensors of the linears, and from the whole file, which also has the dense ones."""
    numbers = sum(p.numel() for p in ml.load_model(directory, device="meta").parameters())
    tensors, files = [], []
    for double_quant in (True, False):
        model = ml.load_model(directory, torch.bfloat16, "cpu", QuantizeConfig("nf4", double_quant))
        linears = packable(model)
        ml.save_model(model, scratch)
        tensors.append(weight_bytes(linears) / sum(linear.in_features * linear.out_features for linear in linears))
        files.append(sum(file.stat().st_size for file in scratch.glob("*.safetensors")) / numbers)
    return [
        ["of the linears, from their tensors", *(f"{8 * size:.4f}" for size in tensors)],
        ["of the model, from its files", *(f"{8 * size:.4f}" for size in files)],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="NF4 and QLoRA, compared with bitsandbytes and with LoRA")
    parser.add_argument("--model", help="a model directory; without one: random weights of SmolLM2-135M's shapes")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=7, help="rounds of every comparison of times")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(args.model) if args.model else random_model(Path(scratch) / "model")
        weights = [linear.weight.detach() for linear in packable(ml.load_model(directory, torch.bfloat16, args.device))]
        numbers, what = sum(weight.numel() for weight in weights), f"{len(weights)} linears"
        print(surroundings(args.device))
        print(f"{args.model or 'random weights'}: {what} of {numbers:,} weights; {args.runs} rounds\n", flush=True)
        rows = compare_quantizing(what, weights, args.runs) + compare_dequantizing(what, weights, args.runs)
        for side in SIDES:
            weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
            rows += compare_dequantizing(f"{side}²", [weight.to(args.device, torch.bfloat16)], args.runs)
        rows += compare_steps(directory, args.device, args.runs)
        print(table(RATIOS, rows), flush=True)
        print(f"\n{table(MEMORY, compare_memory(directory, args.device))}", flush=True)
        print(f"\n{table(SIZE, bits_a_weight(directory, Path(scratch) / 'packed'))}")


if __name__ == "__main__":
    main()

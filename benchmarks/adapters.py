"""Many adapters beside PEFT: attaching to a model of 224 linears, switching between 8, disabling, and loading.

    python benchmarks/adapters.py [--layers N] [--runs N]

The linears are tiny, so that what is timed is the work on modules and not on numbers. PEFT is of the extra `parity`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import RATIOS, Bound, alternate, ratio_row, surroundings, table
from torch import nn

import minilora as ml

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = 8
CPU = torch.device("cpu")


def base_model(layers: int) -> nn.Module:
    """A random Llama of transformers, of 7 linears a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def attached(base: nn.Module, adapters: int) -> tuple[nn.Module, Any]:
    """Ours and PEFT's, each a copy with adapters named 0, 1, …."""
    import peft

    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    for i in range(adapters):
        ml.attach(ours, ml.LoraConfig(r=8, target_modules=TARGETS), f"{i}")
        config = peft.LoraConfig(r=8, target_modules=list(TARGETS))
        if i == 0:
            theirs = peft.get_peft_model(theirs, config, "0")
        else:
            theirs.add_adapter(f"{i}", config)
    return ours, theirs


def compare_attaching(base: nn.Module, runs: int) -> list[list[str]]:
    """One adapter on a model that has none; the copy that each round works on is part of both times."""
    import peft

    def attach_ours() -> None:
        ml.attach(copy.deepcopy(base), ml.LoraConfig(r=8, target_modules=TARGETS))

    def attach_theirs() -> None:
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=list(TARGETS)))

    theirs, ours = alternate(runs, CPU, attach_theirs, attach_ours)
    return [ratio_row("attach, PEFT's time over ours", theirs, ours)]


def compare_switching(base: nn.Module, runs: int) -> list[list[str]]:
    """The next of the adapters in turn, and no adapter for the length of an empty block."""
    ours, theirs = attached(base, ADAPTERS)
    names = [itertools.cycle(f"{i}" for i in range(ADAPTERS)) for _ in range(2)]

    def disable_ours() -> None:
        with ml.disable_adapter(ours):
            pass

    def disable_theirs() -> None:
        with theirs.disable_adapter():
            pass

    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "switch": (lambda: theirs.set_adapter(next(names[0])), lambda: ml.set_adapter(ours, next(names[1]))),
        "disable and enable": (disable_theirs, disable_ours),
    }
    bound = Bound("at least", 5)
    return [
        ratio_row(f"{what}, PEFT's time over ours", *alternate(runs, CPU, *pair), bound) for what, pair in works.items()
    ]


def compare_loading(base: nn.Module, runs: int) -> list[list[str]]:
    """An adapter's files into a model that has none; the copy is part of both times."""
    import peft

    with tempfile.TemporaryDirectory() as directory:
        ours, _ = attached(base, 1)
        ml.save_adapter(ours, Path(directory), "0")
        theirs, mine = alternate(
            runs,
            CPU,
            lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base), directory),
            lambda: ml.load_adapter(copy.deepcopy(base), directory),
        )
    return [ratio_row("load, PEFT's time over ours", theirs, mine)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Adapters on and off a model, compared with PEFT")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7, help="rounds of every comparison")
    args = parser.parse_args(arguments)
    base = base_model(args.layers)
    print(surroundings(CPU))
    print(f"{7 * args.layers} linears, {ADAPTERS} adapters of rank 8; {args.runs} rounds\n", flush=True)
    rows = compare_attaching(base, args.runs) + compare_switching(base, args.runs) + compare_loading(base, args.runs)
    print(table(RATIOS, rows))


if __name__ == "__main__":
    main()

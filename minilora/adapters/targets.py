"""Which modules to adapt: `find_target_modules` looks for all linears of the attention and the MLP.

LoRA on these learns what LoRA on the attention alone does not, also with as many numbers to train [QLoRA §4, Schulman].
PEFT's own defaults are older and fewer.

    [QLoRA]     Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
    [Schulman]  Schulman and Thinking Machines 2025, LoRA Without Regret
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from minilora.adapter import base_modules
from minilora.adapters.parts import LINEARS, is_read_by_kernels, kind_of
from minilora.errors import TargetError, check_types


def find_target_modules(model: nn.Module) -> list[str]:
    """Return the shortest `target_modules` that match all linears in a model's layers, and nothing else.

    A layer has a number in its path, as "3" in "model.layers.3.mlp.up_proj". Modules outside layers, such as heads and
    poolers, are left out, and of those in the layers

    - the routers of a mixture of experts: a small change there sends tokens to experts that have not learned them;
    - all of a Mamba mixer but its `in_proj`: fused kernels read the other weights without calling their modules, and an
      adapter there would do nothing.

    Raises:
        TargetError: there are no such linears.
    """
    check_types(find_target_modules, locals())
    modules = base_modules(model)
    chosen = {
        path
        for path, module in modules.items()
        if kind_of(module) in LINEARS and _is_in_layer(path) and not _is_router(path, modules)
        if not is_read_by_kernels(path, modules)
    }
    if not chosen:
        raise TargetError("the model has no linears in numbered layers; name what to adapt in target_modules")
    return _shortest_names(chosen, modules.keys() - chosen)


def _is_in_layer(path: str) -> bool:
    return any(part.isdecimal() for part in path.split(".")[:-1])


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a linear stands beside a module `experts` or belongs to a router."""
    parts = path.split(".")
    return "router" in parts or ".".join([*parts[:-1], "experts"]) in modules


def _shortest_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest endings of the chosen paths with which no other path ends."""
    taken = {end for path in others for end in _ends(path)}
    return sorted({next((end for end in _ends(path) if end not in taken), path) for path in chosen})


def _ends(path: str) -> Iterator[str]:
    """Yield the endings of a path that start with a word, as "mlp.0" and "h.2.mlp.0" of "h.2.mlp.0"."""
    parts = path.split(".")
    return (".".join(parts[at:]) for at in reversed(range(len(parts))) if not parts[at].isdecimal())

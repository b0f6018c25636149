"""Extract an adapter from a fine-tuned model and its base model.

The adapter is the best approximation of their difference at its rank.

Example:
  minilora extract --base model --tuned tuned-model --lora-r 32 --out adapter
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapter import base_modules
from minilora.adapters.attach import head_path, inject_adapter
from minilora.adapters.combine import LowRank, best_factors
from minilora.adapters.config import FLAG_NAMES, LoraConfig
from minilora.adapters.files import save_adapter
from minilora.adapters.layers import AdapterEmbedding
from minilora.adapters.parts import AdapterSpec, find_targets, kind_of
from minilora.adapters.weighted import config_of
from minilora.cli import Options
from minilora.cli.flags import add_fields, add_out, new_directory
from minilora.errors import ConfigError, FormatError, TargetError
from minilora.llama import Llama
from minilora.models.checkpoint import (
    load_model,
    pick_device,
    read_config,
    resolve_dtype,
    skeleton,
    stored_dtype,
    stored_weights,
)
from minilora.models.hub import fetch
from minilora.models.tokenizer import find_tokenizer
from minilora.tools.merging import Deviation, dense

EXTRACT_FIELDS = ("r", "target_modules", "exclude_modules", "rank_pattern")  # those of LoraConfig that apply here


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, meaning in (("base", "base model"), ("tuned", "fine-tuned model")):
        parser.add_argument(
            f"--{name}", required=True, help=f"{meaning}: a directory, or org/name[@revision] on the Hugging Face Hub"
        )
    add_out(parser)
    parser.add_argument("--device", default="auto", help="device to compute on: cpu, cuda, mps (default: auto)")
    others = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in EXTRACT_FIELDS]
    add_fields(parser, LoraConfig, "adapter", but=others)
    energy = "reduce the rank of a module as far as it keeps this share of its squared singular values"
    parser.add_argument("--svd-energy", type=float, metavar="X", help=energy)


def run(options: Options) -> int:
    energy = options["svd_energy"]
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"svd_energy is {energy}, need a number above 0, at most 1")
    config = LoraConfig(**{name: options[FLAG_NAMES.get(name, name)] for name in EXTRACT_FIELDS})
    tokenizer = find_tokenizer(options["tuned"])
    device = pick_device(options["device"])
    with new_directory(options["out"]) as out:
        found = extract_directory(options["base"], options["tuned"], out, config, energy, device)
        if tokenizer:
            tokenizer.save(out)
    print(f"{found}\nadapter written to {options['out']}")
    return 0


@dataclass(frozen=True)
class Extraction:
    """How much of the difference between two models an adapter holds."""

    deviation: Deviation  # ‖W₁ - W₀ - B A‖ / ‖W₁ - W₀‖, of the low-rank approximation, over the adapted modules
    left_out: tuple[str, ...]  # the other parameters that differ, or that only one model has in this shape
    share: float  # of ‖W₁ - W₀‖², summed over the parameters that both models have, that is not adapted

    def __str__(self) -> str:
        text = self.deviation.describe_truncation("the change of the adapted weights")
        if self.left_out:
            more = " …" if len(self.left_out) > 3 else ""
            text += (
                f"\nnot in the adapter: {len(self.left_out)} other weights that differ, with {self.share:.0%} of the "
                f"squared change of all: {', '.join(self.left_out[:3])}{more}"
            )
        return text


def extract_directory(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    config: LoraConfig,
    energy: float | None = None,
    device: torch.device | str = "cpu",
) -> Extraction:
    """Write the adapter that turns a base into a tuned model, as nearly as its rank allows: W₁ - W₀ ≈ B A.

    Memory holds two weights at a time, and the adapter. A module that is equal in both models gets no adapter.

    Args:
        base: the model that was tuned, as `load_model` takes it.
        tuned: the tuned model, with all its weights.
        out: the directory to write.
        config: selects the modules and their ranks; its other fields are ignored.
        energy: share of each module's ‖W₁ - W₀‖² to keep, if a lower rank is enough for it.
        device: where to compute.

    Raises:
        TargetError: `config` selects modules that do not exist, that have no weight of their own and of the same shape
            in both models, or that are all equal.
        FormatError: a model cannot be read, or a weight is not finite.
    """
    before, after = fetch(base, "model"), fetch(tuned, "model")
    model = load_model(base, device="meta")
    modules = base_modules(model)
    chosen = find_targets(modules, config, head_path(model))
    bare = [skeleton(read_config(directory)) for directory in (before, after)]
    paired, unpaired = _pairs(*bare)
    if lacking := [path for path in chosen if f"{path}.weight" not in paired]:
        raise TargetError(f"{before}, {after}: {lacking[:5]}: need a weight of its own and of one shape in both models")
    cuts: dict[str, LowRank] = {}
    others = dict.fromkeys(unpaired, 0.0)
    for name, delta in _differences((before, after), bare, paired, torch.device(device)):
        path = name.removesuffix(".weight")
        if path in chosen:
            matrix = delta.T if kind_of(modules[path]) is AdapterEmbedding else delta
            cuts[path] = best_factors(matrix, config.rank(path), energy)
        else:
            others[name] = torch.linalg.vector_norm(delta).item() ** 2
    if not cuts:
        raise TargetError(f"{before}, {after}: are equal in all selected modules")
    _save(model, cuts, out)
    inside, outside = sum(cut.total for cut in cuts.values()), sum(others.values())
    deviation = Deviation.of({path: (cut.lost, cut.total) for path, cut in cuts.items()})
    return Extraction(deviation, tuple(others), outside / (inside + outside))


def _pairs(first: Llama, second: Llama) -> tuple[set[str], list[str]]:
    """Return the names of the parameters that both models have in one shape, and of all others."""
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (first, second)]
    unpaired = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    return {*shapes[0]}.difference(unpaired), unpaired


def _differences(
    directories: tuple[Path, Path], models: Sequence[Llama], names: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each parameter that differs, and W₁ - W₀, in float32 at least; the models have no storage."""
    sources = [model.config.source for model in models]
    dtypes = [resolve_dtype(stored_dtype(source), source, device) for source in sources]
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    first, second = (
        ((name, weight) for name, weight in stored_weights(path, model, wide, device, None) if name in names)
        for path, model in zip(directories, models, strict=True)
    )
    for (name, start), (_, end) in zip(first, second, strict=True):
        delta = dense(end) - dense(start)
        if not delta.isfinite().all():
            raise FormatError(f"{', '.join(map(str, directories))}: {name} has numbers that are not finite")
        if delta.any():
            yield name, delta


def _save(model: Llama, cuts: Mapping[str, LowRank], out: str | Path) -> None:
    """Write the adapter with these factors and scale 1; the model needs no weights."""
    parts = {}
    for path, (factors, _, _) in cuts.items():
        kind = kind_of(model.get_submodule(path))
        assert kind is not None
        parts[path] = AdapterSpec(kind, {"lora_A": factors.lora_A.cpu(), "lora_B": factors.lora_B.cpu()})
    config = config_of({path: cut.factors for path, cut in cuts.items()})
    inject_adapter(model, config, "default", parts, None, trainable=False)
    save_adapter(model, out)

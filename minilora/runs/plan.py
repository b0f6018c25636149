"""From what a run is asked for to what it does: its base model and its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minilora.adapters.attach import attach
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import load_adapter
from minilora.errors import ConfigError
from minilora.llama import Checkpointing, Llama, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import load_model, resolve_dtype
from minilora.models.config import read_config
from minilora.models.fsdp import load_sharded
from minilora.models.hub import Location, fetch, locate
from minilora.models.vocabulary import resize_token_embeddings
from minilora.runs import processes
from minilora.runs.inputs import Data
from minilora.runs.settings import Settings, TrainConfig

Shard = Literal["none", "base"]


@dataclass(frozen=True)
class Base:
    """The model and the adapters, one at most, that a run starts from."""

    location: Location
    adapters: tuple[Path, ...]
    config: LlamaConfig


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    config: LlamaConfig
    lora: LoraConfig | None  # None trains all weights
    training: TrainConfig
    quantization: QuantizeConfig
    dtype: torch.dtype
    device: torch.device
    rows: Sequence[tuple[int, int]]  # tokens and labelled tokens of each training row
    ranks: int = 1
    shard: Shard = "none"  # "base": each rank holds its share of the rows of the blocks' frozen weights
    free: int | None = None  # bytes of memory on every rank, if known

    def has_room(self, size: int) -> bool:
        """Return whether so many bytes are free on every rank."""
        return self.free is None or size <= self.free

    def checkpointed(self, way: Checkpointing) -> Plan:
        """Return the plan with another gradient checkpointing."""
        return replace(self, training=replace(self.training, gradient_checkpointing=way))


def find_base(settings: Settings) -> Base:
    """Find the model and the adapter that the settings name."""
    location = locate(settings.run.model, "model")
    adapters = () if settings.run.adapter is None else (fetch(settings.run.adapter, "adapter"),)
    return Base(location, adapters, read_config(location.path))


def plan_run(settings: Settings, base: Base, data: Data, dtype: str, device: torch.device) -> Plan:
    """Return what a run is asked to do; its gradient checkpointing may be "auto"."""
    ranks = processes.size()
    ids = map(data.tokenizer.token_id, settings.run.add_tokens)
    new_tokens = [token for token in ids if token is not None]
    needed = max([-1, *new_tokens]) + 1 if settings.run.adapter is None else settings.lora.vocabulary
    return Plan(
        replace(base.config, vocab_size=max(base.config.vocab_size, needed)),
        _with_tokens(settings.lora, new_tokens),
        settings.training,
        settings.quantization,
        resolve_dtype(dtype, base.config.source, device),
        device,
        [(len(example.tokens), example.labelled) for example in data.train],
        ranks,
        "none" if ranks == 1 else settings.run.shard,
    )


def load_base(plan: Plan, base: Base, device: torch.device | str) -> Llama:
    """Load the base model, quantized as it is read, with rows for new tokens; "meta" gives it no storage."""
    load = load_model if plan.shard == "none" or device == "meta" else load_sharded
    model = load(base.location.name, plan.dtype, device, plan.quantization)
    if plan.config.vocab_size > model.config.vocab_size:
        resize_token_embeddings(model, plan.config.vocab_size)
    return model


def attach_adapter(model: Llama, plan: Plan, base: Base) -> None:
    """Attach a new adapter, or the one to start from."""
    if base.adapters:
        load_adapter(model, base.adapters[0], trainable=True)
    elif plan.lora is not None:
        attach(model, plan.lora, seed=plan.training.seed)


def _with_tokens(lora: LoraConfig, new: list[int]) -> LoraConfig:
    """Return the adapter's config, with the rows of new tokens among those that are trained."""
    wanted = lora.trainable_token_indices
    if new and isinstance(wanted, Mapping):
        raise ConfigError("add_tokens needs trainable_token_indices to be ids, or left out")
    return replace(lora, trainable_token_indices=(*(wanted or ()), *new)) if new else lora

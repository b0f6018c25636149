"""A classifier: the decoder's trunk, and a head that scores the classes of every sequence, or of every token.

Parameter names and the entries of config.json are those of transformers' `…ForSequenceClassification` (a head without
bias) and `…ForTokenClassification` (with one). Attention looks back only, so the last token of a sequence is the one
that has read all of it: its scores are the sequence's.

    N  tokens laid end to end    D  hidden_size    C  classes    B  sequences of a batch    T  their padded length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.models.checkpoint import filled, load_model, read_config, skeleton
from minilora.models.config import CLASSIFIERS, LlamaConfig, Unit
from minilora.models.hub import locate
from minilora.models.llama import Llama, Trunk, end_to_end, padded
from minilora.models.quantization import Quantize, QuantizeConfig


class Classifier(nn.Module):
    """Trunk and head.

    Attributes:
        unit: what gets a class, a "sequence" or a "token".
        labels: the classes' names.

    Args:
        config: a classifier's (see `classifier_config`); its weights are to be loaded.

    Raises:
        ConfigError: the config is no classifier's, or names no classes.
    """

    head = "score"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        if config.unit is None:
            found = config.source.get("architectures")
            raise ConfigError(f"architectures: found {found!r:.80}, need one that ends in {' or '.join(CLASSIFIERS)}")
        self.config = config
        self.name_or_path = ""
        self.unit: Unit = config.unit
        self.task_type = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[self.unit]
        self.labels = config.labels
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, len(self.labels), bias=self.unit == "token")

    def get_output_embeddings(self) -> nn.Module:
        """The head, by the name by which "all-linear" knows what to leave alone."""
        return self.score

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Scores (logits) of the classes, for each sequence or for each token; those of the padding are 0.

        Shapes: input_ids (B, T), lengths B numbers of real tokens in each row, padding to the right
            -> (B, C) for sequences, (B, T, C) for tokens

        Raises:
            ShapeError: input_ids is not (B, T), or a length is not in 1..T.
        """
        tokens, lengths = end_to_end(input_ids, lengths)
        hidden = self.model(tokens, lengths)  # (N, D)
        if self.unit == "token":
            return padded(self.score(hidden), lengths, input_ids.size(1))
        return self.score(hidden[torch.tensor(lengths, device=hidden.device).cumsum(0) - 1])


def load_classifier(
    name_or_path: str | Path,
    unit: Unit | None = None,
    labels: Sequence[str] = (),
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    quantize: QuantizeConfig | Quantize | None = None,
    seed: int = 0,
) -> Classifier:
    """The classifier in a directory; or the trunk of a language model there with a new head.

    Args:
        name_or_path: as for `load_model`.
        unit: what gets a class, "sequence" or "token"; for a classifier that is there it need not be named.
        labels: the classes' names; a classifier that is there must know them, and may know more.
        dtype: as for `load_model`.
        device: as for `load_model`.
        quantize: as for `load_model`; the head stays dense.
        seed: of a new head.

    Raises:
        FormatError: as for `load_model`.
        ConfigError: as for `load_model`; unit and labels are needed, or those of the directory are others.
    """
    location = locate(name_or_path, "model")
    config = read_config(location.path)
    if config.unit is None:
        if unit is None or not labels:
            raise ConfigError(f"{location.path}: is no classifier; name unit and labels to put a new head on its trunk")
        return with_new_head(load_model(location.name, dtype, device, quantize), unit, labels, seed)
    if unit not in (None, config.unit) or not set(labels) <= set(config.labels):
        raise ConfigError(
            f"{location.path}: is a classifier that gives each {config.unit} one of {list(config.labels)}; asked for "
            f"is one that gives each {unit or config.unit} one of {list(labels)}"
        )
    with torch.device("meta"):
        model = Classifier(config)
    return filled(model, location, dtype, torch.device(device), quantize)


def load_for(
    unit: Unit | None,
    labels: Sequence[str],
    name_or_path: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    quantize: QuantizeConfig | Quantize | None,
    seed: int = 0,
) -> Llama | Classifier:
    """A classifier, or the language model if nothing is to get a class; see `load_classifier` and `load_model`."""
    if unit is None:
        return load_model(name_or_path, dtype, device, quantize)
    return load_classifier(name_or_path, unit, labels, dtype, device, quantize, seed)


def skeleton_for(unit: Unit | None, labels: Sequence[str], config: LlamaConfig) -> Llama | Classifier:
    """The same without storage: names and shapes only. `config` is that of a language model, or the classifier's."""
    if unit is None:
        return skeleton(config)
    with torch.device("meta"):
        return Classifier(config if config.unit else classifier_config(config, unit, labels))


def with_new_head(base: Llama, unit: Unit, labels: Sequence[str], seed: int = 0) -> Classifier:
    """Build a classifier from the trunk of a language model and an untrained head, W ~ N(0, 0.02²), bias 0.

    Raises:
        ConfigError: see `classifier_config`.
    """
    with torch.device("meta"):
        model = Classifier(classifier_config(base.config, unit, labels))
    embedding, shape = base.model.embed_tokens.weight, model.score.weight.shape
    weight = torch.normal(torch.zeros(shape), 0.02, generator=torch.Generator().manual_seed(seed))
    model.score.weight = nn.Parameter(weight.to(embedding))
    if unit == "token":
        model.score.bias = nn.Parameter(torch.zeros(len(labels)).to(embedding))
    model.model, model.name_or_path = base.model, base.name_or_path
    return model.train(base.training)


def classifier_config(config: LlamaConfig, unit: Unit, labels: Sequence[str]) -> LlamaConfig:
    """The config of a decoder with what that of a classifier says besides.

    Raises:
        ConfigError: equal labels, or fewer than two: transformers takes one for a number that is to be predicted.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ConfigError(f"labels: found {list(labels)!r:.80}, need at least two different ones")
    ending = next(ending for ending, classified in CLASSIFIERS.items() if classified == unit)
    entries: dict[str, Any] = {
        "architectures": [config.class_name + ending],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if unit == "sequence":
        entries["problem_type"] = "single_label_classification"
    return replace(config, source={**config.source, **entries})

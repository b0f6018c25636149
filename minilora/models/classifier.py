"""Classifiers: a decoder with a head that scores the classes of every sequence or token. Also more tokens for a model.

Parameter names and the entries of config.json are those of transformers' `…ForSequenceClassification` (a head without
bias) and `…ForTokenClassification` (with one). The scores of a sequence are those of its last token, because attention
is causal.

    N  tokens laid end to end    D  hidden_size    C  classes    B  sequences of a batch    T  their padded length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, check_types
from minilora.llama import Decoder, Llama, pad, unpad
from minilora.models.bitsandbytes import Quantize, QuantizeConfig
from minilora.models.checkpoint import init_weights, load_model, load_weights, read_config, skeleton, usable_device
from minilora.models.config import CLASSIFIERS, UNITS, ModelConfig, Unit, class_name
from minilora.models.hub import locate
from minilora.storage import GROWTH


class Classifier(nn.Module):
    """A decoder whose head scores the classes `labels` for each `unit`, a "sequence" or a "token"."""

    head = "score"

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.unit is not None
        self.config, self.name_or_path = config, ""
        self.unit, self.labels = config.unit, config.labels
        self.task_type = next(task for task, unit in UNITS.items() if unit == config.unit)
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, len(self.labels), bias=self.unit == "token")

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, which "all-linear" leaves out."""
        return self.score

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Compute the scores (logits) of the classes, for each sequence or each token; those of the padding are 0.

        Shapes: input_ids (B, T), lengths B numbers in 1..T -> (B, C) for sequences, (B, T, C) for tokens

        Raises:
            ShapeError: input_ids is not (B, T), or a length is not in 1..T.
        """
        tokens, lengths = unpad(input_ids, lengths)
        hidden = self.model(tokens, lengths)  # (N, D)
        if self.unit == "token":
            return pad(self.score(hidden), lengths, input_ids.size(1))
        return self.score(hidden[torch.tensor(lengths, device=hidden.device).cumsum(0) - 1])


def load_classifier(
    name_or_path: str | Path,
    unit: Unit | None = None,
    labels: Sequence[str] = (),
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int = "cpu",
    quantize: QuantizeConfig | Quantize | None = None,
    seed: int = 0,
) -> Classifier:
    """Load a classifier, or a language model with a new head, W ~ N(0, 0.02²) by `seed`, bias 0.

    A new head needs `unit` and `labels`, the names of its classes; a classifier must have them, and may have more. The
    other arguments are those of `load_model`. The head is not quantized.

    Raises:
        FormatError: as for `load_model`.
        ConfigError: as for `load_model`; unit and labels are missing, or the classifier has others.
    """
    check_types(load_classifier, locals())
    location = locate(name_or_path, "model")
    config = read_config(location.path)
    if config.unit is None and (unit is None or not labels):
        raise ConfigError(f"{location.path}: is not a classifier; give unit and labels to put a new head on it")
    if config.unit and (unit not in (None, config.unit) or not set(labels) <= set(config.labels)):
        found = f"gives each {config.unit} one of {list(config.labels)}"
        asked = f"gives each {unit or config.unit} one of {list(labels)}"
        raise ConfigError(f"{location.path}: is a classifier that {found}; asked for is one that {asked}")
    model = skeleton_for(unit or config.unit, labels, config)
    assert isinstance(model, Classifier)
    if config.unit:
        return load_weights(model, location, dtype, usable_device(device), quantize)
    base = load_model(location.name, dtype, device, quantize)
    model.model, model.name_or_path = base.model, base.name_or_path
    draw_head(model, seed)
    return model.eval()


def draw_head(model: Classifier, seed: int) -> None:
    """Draw the weights of a new head in float32, and round them to the embedding's dtype, on its device."""
    init_weights(model.score.to_empty(device="cpu").float(), torch.Generator().manual_seed(seed))
    model.score.to(model.model.embed_tokens.weight)


def load_for(
    unit: Unit | None,
    labels: Sequence[str],
    name_or_path: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    quantize: QuantizeConfig | Quantize | None,
    seed: int = 0,
) -> Llama | Classifier:
    """Load a classifier, or a language model if `unit` is None."""
    if unit is None:
        return load_model(name_or_path, dtype, device, quantize)
    return load_classifier(name_or_path, unit, labels, dtype, device, quantize, seed)


def skeleton_for(unit: Unit | None, labels: Sequence[str], config: ModelConfig) -> Llama | Classifier:
    """Build what `load_for` loads, without storage, from the config of a language model or of a classifier."""
    if unit is None:
        return skeleton(config)
    with torch.device("meta"):
        return Classifier(config if config.unit else classifier_config(config, unit, labels))


def classifier_config(config: ModelConfig, unit: Unit, labels: Sequence[str]) -> ModelConfig:
    """Return the config of a language model as that of a classifier."""
    if len(labels) < 2 or len(set(labels)) != len(labels):  # transformers reads one label as a regression
        raise ConfigError(f"labels: found {list(labels)!r:.80}, need at least two different ones")
    ending = next(ending for ending, classified in CLASSIFIERS.items() if classified == unit)
    source = {
        **config.source,
        "architectures": [class_name(config.model_type) + ending],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        **({"problem_type": "single_label_classification"} if unit == "sequence" else {}),
    }
    return replace(config, source=source)


def grow_vocabulary(model: Llama | Classifier, size: int) -> None:
    """Add rows to the embedding and the head, up to `size` in all; a new row is the mean of the old ones.

    Raises:
        ConfigError: the model has adapters, or its head is in four bits; `size` is more than twice as large, and 1024
            more, than the vocabulary: a mistaken id of an adapter could take all memory.
    """
    check_types(grow_vocabulary, locals())
    if size <= model.config.vocab_size:
        return
    if size > (most := 2 * model.config.vocab_size + GROWTH):
        raise ConfigError(f"a vocabulary of {model.config.vocab_size} tokens can grow to {most}, found {size}")
    embedding = model.model.embed_tokens
    ends = [embedding, model.lm_head] if isinstance(model, Llama) else [embedding]
    if strange := [type(end).__name__ for end in ends if type(end) not in (nn.Embedding, nn.Linear)]:
        raise ConfigError(
            f"new tokens need a plain embedding and head, found {strange[0]}: add tokens before adapters, and leave "
            "lm_head out of quantization"
        )
    new = {id(end.weight): nn.Parameter(grown(end.weight, size), end.weight.requires_grad) for end in ends}
    for end in ends:
        end.weight = new[id(end.weight)]
    embedding.num_embeddings = size
    if isinstance(model, Llama):
        model.lm_head.out_features = size
    model.config = replace(model.config, vocab_size=size, source={**model.config.source, "vocab_size": size})
    model.model.config = model.config


def grown(weight: Tensor, size: int) -> Tensor:
    """Return the weight with `size` rows, of which new ones are the mean of the others.

    Shapes: weight (V, D) -> (size, D)
    """
    mean = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).mean(0, keepdim=True)
    return torch.cat((weight.detach(), mean.to(weight.dtype).expand(size - len(weight), -1)))

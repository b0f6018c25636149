"""Room for new tokens in a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, check_types
from minilora.llama import Llama
from minilora.models.classifier import Classifier


def grow_vocabulary(model: Llama | Classifier, size: int) -> None:
    """Give the embedding rows up to `size`, and the head, each new one the mean of those that there are.

    A mean is what any token is like, so that a new one neither stands out among the inputs nor among the predictions.
    A model that has the room already is left as it is.

    Raises:
        ConfigError: the model has adapters, or its head is in four bits.
    """
    check_types(grow_vocabulary, locals())
    if size <= model.config.vocab_size:
        return
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
    """The weight with rows up to `size`, each new one the mean of the others.

    Shapes: weight (V, D) -> (size, D)
    """
    mean = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).mean(0, keepdim=True)
    return torch.cat((weight.detach(), mean.to(weight.dtype).expand(size - len(weight), -1)))

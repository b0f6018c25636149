"""More tokens for a model: rows of its embedding and its head."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.llama import Llama

GROWTH = 1024  # a vocabulary may double and grow by so many rows


def resize_token_embeddings(model: Llama, size: int) -> None:
    """Add rows to the embedding and the head, up to `size` in all; a new row is the mean of the old ones.

    Rows are never removed: a smaller `size` changes nothing.

    Raises:
        ConfigError: the model has adapters, or its head is packed; `size` is more than twice the vocabulary and 1024: a
            mistaken id of an adapter could take all memory.
    """
    if size <= model.config.vocab_size:
        return
    if size > (most := 2 * model.config.vocab_size + GROWTH):
        raise ConfigError(f"a vocabulary of {model.config.vocab_size} tokens can grow to {most}, found {size}")
    embedding, head = model.model.embed_tokens, model.lm_head
    if strange := [type(end).__name__ for end in (embedding, head) if type(end) not in (nn.Embedding, nn.Linear)]:
        raise ConfigError(
            f"new tokens need a plain embedding and head, found {strange[0]}: add tokens before adapters, and leave "
            "lm_head out of quantization"
        )
    new = {id(end.weight): nn.Parameter(grown(end.weight, size), end.weight.requires_grad) for end in (embedding, head)}
    embedding.weight, head.weight = new[id(embedding.weight)], new[id(head.weight)]  # tied ones stay tied
    embedding.num_embeddings = head.out_features = size
    model.config = replace(model.config, vocab_size=size, source={**model.config.source, "vocab_size": size})
    model.model.config = model.config


def grown(weight: Tensor, size: int) -> Tensor:
    """Return the weight with `size` rows, of which new ones are the mean of the others.

    Shapes: weight (V, D) -> (size, D)
    """
    mean = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).mean(0, keepdim=True)
    return torch.cat((weight.detach(), mean.to(weight.dtype).expand(size - len(weight), -1)))

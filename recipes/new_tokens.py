"""Write a model directory with rows for new tokens, and with a tokenizer that finds them in any text.

    w_new = 1/V Σ_v w_v                        in the embedding and in the head [Hewitt]

A row that is the mean of the others has the mean of their logits. Train only the new rows, together with the adapter:

    python recipes/new_tokens.py path/to/model grown "<coin>" Wumpus
    minilora finetune --model grown --data rows.jsonl --trainable-token-indices 49152,49153

    V  tokens before    D  hidden size

    [Hewitt]  Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

import minilora as ml


def with_tokens(tokenizer: ml.Tokenizer, tokens: Sequence[str]) -> ml.Tokenizer:
    """Return the same tokenizer with new tokens, whose ids follow the others.

    Raises:
        ConfigError: a token is empty, exists already or is named twice.
    """
    if bad := [t for t in tokens if not t or tokenizer.token_id(t) is not None or tokens.count(t) > 1]:
        raise ml.ConfigError(f"new tokens: {bad[:5]} are empty, named twice, or tokens already")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        backend = Backend.from_file(f"{folder}/tokenizer.json")
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        backend.save(f"{folder}/tokenizer.json")
        return ml.load_tokenizer(folder)


def grown(weight: Tensor, size: int) -> nn.Parameter:
    """Return a weight with more rows, each the mean of the old ones: (V, D) -> (size, D)."""
    mean = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).mean(0, keepdim=True)
    new = mean.to(weight.dtype).expand(max(0, size - len(weight)), -1)
    return nn.Parameter(torch.cat((weight.detach(), new)), weight.requires_grad)


def add_rows_(model: nn.Module, size: int) -> None:
    """Grow the embedding and the head of a model without adapters to `size` rows; they never lose rows."""
    embedding, head = model.model.embed_tokens, model.lm_head
    is_tied = head.weight is embedding.weight
    embedding.weight = grown(embedding.weight, size)
    head.weight = embedding.weight if is_tied else grown(head.weight, size)
    embedding.num_embeddings = head.out_features = len(embedding.weight)
    source = {**model.config.source, "vocab_size": len(embedding.weight)}
    model.config = model.model.config = replace(model.config, vocab_size=len(embedding.weight), source=source)


def main(name: str, out: str, *tokens: str) -> None:
    tokenizer = with_tokens(ml.load_tokenizer(name), tokens)
    stored = ml.load_model(name, device="meta").config.source
    model = ml.load_model(name, dtype=stored.get("dtype") or stored.get("torch_dtype") or "float32")
    ids = [tokenizer.token_id(token) or 0 for token in tokens]
    add_rows_(model, max(ids) + 1)
    ml.save_model(model, out, tokenizer)
    print(f"model written to {out}; train its new rows with --trainable-token-indices {','.join(map(str, ids))}")


if __name__ == "__main__":
    main(*sys.argv[1:])

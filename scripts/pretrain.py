"""Pretrain the built-in model from nothing on the glosses of WordNet 3.0, without those of the held-out rows.

    python scripts/pretrain.py --wordnet DIR         # DIR contains data.noun, ...; run scripts/make_data.py first
    python scripts/pretrain.py --wordnet DIR --large MODEL     # another, six times as large, in hours, to MODEL

A byte-level BPE of 2,048 tokens and a Llama of 1.67 million parameters. Each synset is in the text twice, in two
forms, and the text is seen in two passes, each in an order of its own: a fixed number of steps, about twelve minutes on
two cores. The same machine, versions and thread count give the same bytes. Held-out loss is taken on the bfloat16
weights that are written.

The large model has 9.75 million parameters and the same tokenizer. It sees the text in one pass, at half the learning
rate, and its forward and backward pass are computed in bfloat16.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from make_data import DATA, pretraining_texts, read_rows, read_synsets, row_definition
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minilora.llama import Documents, Llama, LlamaConfig

MODEL = DATA.parent / "model"
EOS = "<|endoftext|>"
PASSES = 2
LENGTH, DOCUMENTS = 128, 16  # tokens of a document, documents of a batch
PEAK_LEARNING_RATE, WARMUP_STEPS = 3e-3, 50
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 400,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "hidden_act": "silu",
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",  # to compute in; the file holds bfloat16 to be small
}
LARGE = CONFIG | {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text can be written, and nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def lay_end_to_end(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One stream of tokens, each text closed by the end-of-text token."""
    encodings, eos = tokenizer.encode_batch_fast(texts), CONFIG["eos_token_id"]
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, eos)])


@torch.no_grad()
def held_out_loss(model: Llama, tokenizer: Tokenizer, split: str) -> float:
    """Mean loss per token of `Definition: <gloss>` after its first token, over the rows of a split."""
    total, count = 0.0, 0
    for row in read_rows(DATA / f"{split}.jsonl"):
        tokens = torch.tensor(tokenizer.encode(f"Definition: {row_definition(row)}\n").ids)
        logits = model.lm_head(model.model(tokens[:-1], Documents([len(tokens) - 1])))
        total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
        count += len(tokens) - 1
    return total / count


def train(model: Llama, stream: Tensor, steps: int, learning_rate: float, in_bfloat16: bool) -> None:
    """AdamW, the learning rate falling to 0 in a straight line; matrices decay, norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    size, start = DOCUMENTS * LENGTH, time.perf_counter()
    for step in range(steps):
        factor = min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        inputs, targets = stream[step * size :][:size], stream[step * size + 1 :][:size]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            logits = model.lm_head(model.model(inputs, Documents([LENGTH] * DOCUMENTS)))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            rate, left = (step + 1) * size / seconds, seconds / (step + 1) * (steps - step - 1)
            progress = f"step {step + 1}/{steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s  {left:.0f} s left"
            print(progress, flush=True)


def write(model: Llama, tokenizer: Tokenizer, config: dict[str, Any], directory: Path) -> None:
    """The files that transformers writes for such a model; the head is the embedding and is not repeated."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (directory / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8", newline="\n")
    named = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": CONFIG["eos_token_id"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "model_max_length": LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in named.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")


def main() -> None:
    """Tokenizer, training, files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, metavar="DIR", help="the folder with data.noun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many, for a trial; default: all")
    parser.add_argument("--large", type=Path, metavar="MODEL", help="write one of 9.75 million parameters here")
    arguments = parser.parse_args()
    config, passes, learning_rate = CONFIG, PASSES, PEAK_LEARNING_RATE
    if arguments.large:
        import minilora.kernels  # noqa: F401  # registers them

        config, passes, learning_rate = LARGE, 1, PEAK_LEARNING_RATE / 2
    synsets = [synset for part in ("noun", "verb", "adj", "adv") for synset in read_synsets(arguments.wordnet, part)]
    held_out = [row_definition(row) for split in ("valid", "test") for row in read_rows(DATA / f"{split}.jsonl")]
    texts = list(pretraining_texts(synsets, held_out))
    tokenizer = train_tokenizer(texts)
    shuffler = random.Random(arguments.seed)
    orders = [shuffler.sample(texts, len(texts)) for _ in range(passes)]
    stream = torch.cat([lay_end_to_end(tokenizer, texts) for texts in orders])
    model = Llama(LlamaConfig.from_dict(config))
    generator = torch.Generator().manual_seed(arguments.seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # norms begin as 1
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(texts):,} texts, {len(stream):,} tokens, {parameters:,} parameters", flush=True)
    steps = arguments.steps or (len(stream) - 1) // (DOCUMENTS * LENGTH)
    train(model, stream, steps, learning_rate, in_bfloat16=arguments.large is not None)
    model.bfloat16().float()
    for split in ("valid", "test"):
        print(f"held-out loss, {split}: {held_out_loss(model, tokenizer, split):.3f}")
    write(model, tokenizer, config, arguments.large or MODEL)


if __name__ == "__main__":
    main()

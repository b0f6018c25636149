"""The peers' batches of documents, generation and training steps, as what `minilora.testing` checks.

Each function returns what the laws of its kind take, for a tiny model of random weights.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_data import character_tokenizer
from benchmarks.peer_training import quiet

VOCABULARY, PAD = 32, 32
SIZES = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
Documents = Sequence[list[int]]


def wide(model: nn.Module) -> Any:
    """Draw weights so wide that different tokens have different logits."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def split(logits: Tensor, documents: Documents) -> list[Tensor]:
    """Return the logits of each document from those of one row."""
    lengths = [len(document) for document in documents]
    return list(logits[: sum(lengths)].split(lengths))


def left_padded(prompts: Documents, pad: int) -> Tensor:
    width = max(map(len, prompts))
    return torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])


def step_of(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Any:
    """Return a model and its training step, as `check_trains_everything` takes them."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    ids = torch.arange(32).reshape(2, 16)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return model.train(), step


# --- transformers, PEFT, TRL and Axolotl ---


def causal_lm(family: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, "num_attention_heads": 4, **options})
    return wide(AutoModelForCausalLM.from_config(config))


def transformers_packing(family: str, *, use_cache: bool = False, has_index: bool = False, **options: Any) -> Any:
    """`DataCollatorWithFlattening`, with `return_seq_idx` or not."""
    from transformers import DataCollatorWithFlattening

    collate, model = DataCollatorWithFlattening(return_seq_idx=has_index), causal_lm(family, **options)

    def run(documents: Documents) -> list[Tensor]:
        batch = collate([{"input_ids": document} for document in documents])
        del batch["labels"]
        return split(model(**batch, use_cache=use_cache).logits[0], documents)

    return run, VOCABULARY, list(model.parameters())


def transformers_generation(family: str, **options: Any) -> Any:
    """`generate` of prompts padded on the left, with a cache."""
    model = causal_lm(family, **options)
    model.generation_config.eos_token_id = None

    def generate(prompts: Documents, count: int) -> Any:
        ids = left_padded(prompts, PAD)
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": PAD}
        return model.generate(ids, attention_mask=(ids != PAD).long(), **settings)[:, ids.shape[1] :].tolist()

    def logits(tokens: list[int]) -> Tensor:
        return model(torch.tensor([tokens]), use_cache=False).logits[0].detach()

    return generate, logits, VOCABULARY


def peft_step(tied: bool = False, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 2, "lora_alpha": 6, **options})
    model = get_peft_model(causal_lm("llama", tie_word_embeddings=tied), config)
    return step_of(model, lambda ids: model(input_ids=ids).logits)


def trl_packing(attention: str, **options: Any) -> Any:
    """SFTTrainer's loss of a batch that its own data loader makes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = causal_lm("llama", attn_implementation=attention)

    def loss(documents: Documents) -> Tensor:
        rows = Dataset.from_list([{"input_ids": document} for document in documents])
        with tempfile.TemporaryDirectory() as folder, quiet():
            shape = {"per_device_train_batch_size": len(documents), "max_length": 512, **options}
            settings = SFTConfig(folder, use_cpu=True, bf16=False, gradient_checkpointing=False, **shape)
            trainer: Any = SFTTrainer(model, settings, train_dataset=rows, processing_class=character_tokenizer("", []))
            batch = next(iter(trainer.get_train_dataloader()))
            return trainer.compute_loss(trainer.model.train(), batch)

    return loss, VOCABULARY, list(model.parameters())


def axolotl_packing(has_loss: bool) -> Any:
    """Its collator for `sample_packing`, of rows without an attention mask, as for eager and SDPA attention."""
    from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq

    collate, model = V2BatchSamplerDataCollatorForSeq2Seq(character_tokenizer("", [])), causal_lm("llama")

    def run(documents: Documents) -> Any:
        rows = [{"input_ids": each, "labels": each, "position_ids": list(range(len(each)))} for each in documents]
        found = model(**collate([rows]), use_cache=False)
        return found.loss if has_loss else split(found.logits[0], documents)

    return run, VOCABULARY, list(model.parameters())


# --- mlx-lm ---


def mlx_packing() -> Any:
    """`default_loss` of a batch that `iterate_batches` pads."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import llama
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    mx.random.seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = llama.Model(llama.ModelArgs("llama", **{**SIZES, "vocab_size": VOCABULARY}, rms_norm_eps=1e-5, **heads))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3 if p.ndim > 1 else p, model.parameters()))
    model.eval()

    def run(documents: Documents) -> Any:
        batch = next(iterate_batches([(document, 0) for document in documents], len(documents), 2048))
        return torch.tensor(default_loss(model, *batch)[0].item())

    return run, VOCABULARY, ()

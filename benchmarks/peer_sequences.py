"""The peers' batches of documents, generation and training steps, as what `minilora.testing` checks.

Each function returns what the laws of its kind take, for a tiny model of random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
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

    config = AutoConfig.for_model(family, **SIZES, num_attention_heads=4, **options)
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

    model = get_peft_model(causal_lm("llama", tie_word_embeddings=tied), LoraConfig(r=2, lora_alpha=6, **options))
    return step_of(model, lambda ids: model(input_ids=ids).logits)


def trl_packing(attention: str, **options: Any) -> Any:
    """SFTTrainer's loss of a batch that its own data loader makes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = causal_lm("llama", attn_implementation=attention)

    def loss(documents: Documents) -> Tensor:
        rows = Dataset.from_list([{"input_ids": document} for document in documents])
        with tempfile.TemporaryDirectory() as folder, quiet():
            shape = {"per_device_train_batch_size": len(documents), "max_length": 64, **options}
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


# --- litgpt ---


def litgpt_model(module: Any, **options: Any) -> Any:
    names = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False}
    sizes = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "intermediate_size": 24}
    config = module.Config(padded_vocab_size=VOCABULARY, rotary_percentage=1.0, bias=False, **sizes, **names, **options)
    return module.GPT(config)


def litgpt_generation() -> Any:
    from litgpt import model as module
    from litgpt.generate.base import generate

    model = wide(litgpt_model(module))

    def answer(prompt: list[int], count: int) -> list[int]:
        model.set_kv_cache(batch_size=1)
        found = generate(model, torch.tensor(prompt), len(prompt) + count, top_k=1, include_prompt=False)
        model.clear_kv_cache()
        return found.tolist()

    def answers(prompts: Documents, count: int) -> list[list[int]]:
        return [answer(prompt, count) for prompt in prompts]

    return answers, lambda tokens: model(torch.tensor([tokens]))[0].detach(), VOCABULARY


def litgpt_step() -> Any:
    from litgpt import lora as module

    places = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp", "head")}
    model = litgpt_model(module, lora_r=2, lora_alpha=6, lora_dropout=0.0, **places)
    model.apply(model._init_weights)
    module.mark_only_lora_as_trainable(model)
    return step_of(model, model)


# --- torchtune ---


def torchtune_model() -> Any:
    from torchtune.models.llama3_1 import llama3_1

    heads = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 256, "intermediate_dim": 24}
    return wide(llama3_1(vocab_size=VOCABULARY + 1, num_layers=2, **heads))


def torchtune_packing() -> Any:
    from torchtune.data import padded_collate_packed
    from torchtune.datasets import PackedDataset

    model = torchtune_model()

    def run(documents: Documents) -> list[Tensor]:
        with quiet():
            packs = PackedDataset([{"tokens": each, "labels": each} for each in documents], max_seq_len=128)
        batch = padded_collate_packed([packs[0]])
        return split(model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])[0], documents)

    return run, VOCABULARY, list(model.parameters())


def torchtune_generation() -> Any:
    """`generate` of prompts padded on the left, with a cache."""
    from torchtune.generation import generate

    def answers(prompts: Documents, count: int) -> list[list[int]]:
        model, ids = torchtune_model(), left_padded(prompts, PAD)
        model.setup_caches(len(prompts), torch.float32, decoder_max_seq_len=ids.shape[1] + count)
        with torch.no_grad():
            found, _ = generate(model, ids, max_generated_tokens=count, pad_id=PAD, top_k=1)
        return found[:, ids.shape[1] :].tolist()

    return answers, lambda tokens: torchtune_model()(torch.tensor([tokens]))[0].detach(), VOCABULARY


# --- mlx-lm ---


def mlx_model() -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import llama

    mx.random.seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = llama.Model(llama.ModelArgs("llama", **{**SIZES, "vocab_size": VOCABULARY}, rms_norm_eps=1e-5, **heads))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3 if p.ndim > 1 else p, model.parameters()))
    return model.eval()


def mlx_batch(documents: Documents) -> Any:
    from mlx_lm.tuner.trainer import iterate_batches

    return next(iterate_batches([(document, 0) for document in documents], len(documents), 2048))


def mlx_packing() -> Any:
    """`default_loss` of a batch that `iterate_batches` pads."""
    from mlx_lm.tuner.trainer import default_loss

    model = mlx_model()

    def run(documents: Documents) -> Any:
        return torch.tensor(default_loss(model, *mlx_batch(documents))[0].item())

    return run, VOCABULARY, ()


def mlx_generation() -> Any:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import batch_generate

    model, tokenizer = mlx_model(), SimpleNamespace(eos_token_ids=[], decode=lambda tokens: "")

    def answers(prompts: Documents, count: int) -> Any:
        return batch_generate(model, tokenizer, prompts, max_tokens=count, return_token_ids=True).token_ids

    return answers, lambda tokens: np.array(model(mx.array([tokens]))[0]), VOCABULARY


def mlx_step(use_dora: bool = False) -> Any:
    import mlx.core as mx
    import mlx.nn as mlx_nn
    import numpy as np
    from mlx.optimizers import Adam
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, optimizer = mlx_model(), Adam(1e-2)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": None}, use_dora=use_dora)
    slopes = mlx_nn.value_and_grad(model.train(), default_loss)
    batch = mlx_batch([list(range(i, i + 9)) for i in range(4)])

    def step() -> None:
        optimizer.update(model, slopes(model, *batch)[1])
        mx.eval(model.parameters(), optimizer.state)

    def read() -> dict[str, Any]:
        return {name: np.array(each) for name, each in tree_flatten(model.parameters())}

    return read, step, [name for name, _ in tree_flatten(model.trainable_parameters())]

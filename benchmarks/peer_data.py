"""The peers' chat masks and adapter files, as what `minilora.testing` checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

Messages = list[dict[str, str]]
Rendered = tuple[list[str], list[bool]]

# --- chat masks ---

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endoftext|>",
)


def character_tokenizer(template: str, messages: Messages) -> Any:
    """Return a fast tokenizer of transformers, a token of which is a character or a special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = template + "".join(message["role"] + message["content"] for message in messages)
    tokens = [*SPECIAL, *sorted(set(text) | set(map(chr, range(32, 127))) | {"\n"})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|endoftext|>",
        pad_token="<|end|>",
        chat_template=template or None,
    )


def transformers_mask(messages: Messages) -> Rendered:
    """`apply_chat_template` with `return_assistant_tokens_mask`, of ChatML with generation tags."""
    return _rendered(character_tokenizer(CHATML, messages), messages)


def _rendered(tokenizer: Any, messages: Messages, template: str | None = None) -> Rendered:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(messages, chat_template=template, **options)
    return tokenizer.convert_ids_to_tokens(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]


def trl_mask(family: str) -> Callable[[Messages], Rendered]:
    """Return what `assistant_only_loss` learns with TRL's training template for a family's own template."""

    def render(messages: Messages) -> Rendered:
        from trl import chat_template_utils

        tokenizer = character_tokenizer(getattr(chat_template_utils, f"{family}_chat_template"), messages)
        return _rendered(tokenizer, messages, chat_template_utils.get_training_chat_template(tokenizer))

    return render


def torchtune_mask(messages: Messages) -> Rendered:
    """`OpenAIToMessages`, and `tokenize_messages_no_special_tokens` with an end token."""
    from torchtune.data import OpenAIToMessages
    from torchtune.modules.transforms.tokenizers import tokenize_messages_no_special_tokens

    def encode(text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]

    tokenizer: Any = SimpleNamespace(encode=encode, max_seq_len=None)
    own = OpenAIToMessages()({"messages": messages})["messages"]
    tokens, is_masked = tokenize_messages_no_special_tokens(tokenizer, own, eos_id=0)
    return [chr(token) if token else "<|im_end|>" for token in tokens], [not each for each in is_masked]


# --- adapter directories ---


def peft_directory(folder: str, **options: Any) -> str:
    """Save an adapter of a tiny model with PEFT's `save_pretrained`."""
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Sequential()
    model.add_module("q_proj", nn.Linear(8, 12))
    model.add_module("v_proj", nn.Linear(12, 6))
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **options}
    settings["init_lora_weights"] = False  # B is not 0
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
    return folder


def torchtune_directory(folder: str, use_dora: bool = False) -> str:
    """Save an adapter of a tiny Llama with `save_checkpoint` of the recipe `lora_finetune_single_device`."""
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.training import FullModelHFCheckpointer

    from benchmarks.peer_training import torchtune_recipe

    attention = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8}
    sizes = {"vocab_size": 16, "num_layers": 1, "max_seq_len": 8, "intermediate_dim": 12, **attention}
    names = ["q_proj", "v_proj"]
    model = lora_llama3_1(names, **sizes, lora_rank=2, lora_alpha=5, use_dora=use_dora)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8}
    checkpoint = Path(folder, "base")
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    torch.save({}, checkpoint / "model.bin")
    recipe = torchtune_recipe(model, saves=True)
    recipe._checkpointer = FullModelHFCheckpointer(str(checkpoint), ["model.bin"], "LLAMA3", f"{folder}/out")
    recipe._lora_rank, recipe._lora_alpha, recipe._lora_attn_modules = 2, 5, names
    recipe._apply_lora_to_mlp = recipe._apply_lora_to_output = False
    recipe._save_adapter_weights_only, recipe.total_epochs = True, 1
    recipe.save_checkpoint(epoch=0)
    return f"{folder}/out/epoch_0"

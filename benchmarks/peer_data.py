"""The peers' chat masks and adapter files, as what `minilora.testing` checks."""

import copy
import json
from collections.abc import Callable
from typing import Any

from torch import nn

Messages = list[dict[str, Any]]
Rendered = tuple[list[str], list[bool]]

# --- chat masks ---

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endoftext|>",
)


def character_tokenizer(template: str, messages: Messages) -> Any:
    """Return a fast tokenizer of transformers, a token of which is a character or a special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = template + json.dumps(messages) + "".join(message["role"] + message["content"] for message in messages)
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


def axolotl_mask(family: str, end: str) -> Callable[[Messages], Rendered]:
    """`ChatTemplateStrategy` of a template that Axolotl brings, with its defaults for replies."""

    def render(messages: Messages) -> Rendered:
        from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
        from axolotl.utils.chat_templates import get_chat_template

        template = get_chat_template(family)
        tokenizer = character_tokenizer(template, messages)
        tokenizer.eos_token = end
        names: Any = {"role": "role", "content": "content"}
        prompter = ChatTemplatePrompter(tokenizer, template, message_property_mappings=names)
        strategy = ChatTemplateStrategy(prompter, tokenizer, False, 4096, ["assistant"], train_on_eos="turn")
        found = strategy.tokenize_prompt({"messages": copy.deepcopy(messages)})
        return tokenizer.convert_ids_to_tokens(found["input_ids"]), [label != -100 for label in found["labels"]]

    return render


def llamafactory_mask(family: str) -> Callable[[Messages], Rendered]:
    """`encode_multiturn` of a template of LLaMA-Factory, whose answers are learned."""

    def render(messages: Messages) -> Rendered:
        from llamafactory.data.template import TEMPLATES

        template, tokenizer = copy.deepcopy(TEMPLATES[family]), character_tokenizer("{}", messages)
        template.fix_special_tokens(tokenizer)
        turns = [own_turn(message) for message in messages]
        system = turns.pop(0)["content"] if messages[0]["role"] == "system" else None
        ids: list[int] = []
        flags: list[bool] = []
        for question, answer in template.encode_multiturn(tokenizer, turns, system, None):
            ids += [*question, *answer]
            flags += [False] * len(question) + [True] * len(answer)
        return tokenizer.convert_ids_to_tokens(ids), flags

    def own_turn(message: dict[str, Any]) -> dict[str, str]:
        if calls := message.get("tool_calls"):
            return {"role": "function", "content": json.dumps([call["function"] for call in calls])}
        role = "observation" if message["role"] == "tool" else message["role"]
        return {"role": role, "content": message["content"]}

    return render


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

"""minilora generate: continue prompts."""

from __future__ import annotations

import argparse

from minilora.cli.command import Command, Options, add_dashed, add_model_flags, load
from minilora.errors import ConfigError
from minilora.lora.attach import disable_adapter
from minilora.model.generate import generate


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument(
        "--prompt", required=True, help="what to continue, or to answer if the model has a chat template"
    )
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    add_dashed(parser, "max_new_tokens", type=int, default=64, help="tokens to write at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default: 0)")
    add_dashed(parser, "top_p", type=float, default=1.0, help="sample from so much probability (default: 1)")
    add_dashed(parser, "top_k", type=int, default=0, help="sample from so many tokens; 0: from all (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add_dashed(parser, "compare_base", action="store_true", help="also print what the model writes without the adapter")


def _run(options: Options) -> int:
    model, tokenizer = load(options)
    prompt, is_chat = options["prompt"], tokenizer.template is not None and not options["raw"]
    if is_chat:
        prompt = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=not is_chat)
    settings = {key: options[key] for key in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}

    def write() -> str:
        return tokenizer.decode(generate(model, [ids], stop_ids=tokenizer.stop_ids, **settings)[0])

    if not options["compare_base"]:
        print(write())
        return 0
    if not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    with disable_adapter(model):
        print(f"--- base\n{write()}")
    print(f"--- with {options['adapter']}\n{write()}")
    return 0


COMMAND = Command(
    name="generate",
    help="continue a prompt",
    about="Continue a prompt.",
    example='minilora generate --adapter run --prompt "Hello" --compare-base',
    add_flags=_add_flags,
    run=_run,
)

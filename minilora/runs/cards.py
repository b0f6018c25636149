"""How other programs ask a trained model: its card, and a Modelfile for Ollama."""

import json
from pathlib import Path
from typing import Any

from minilora.adapters.layout import CONFIG_FILE
from minilora.errors import DataError, FormatError
from minilora.files import read_json
from minilora.models.hub import PINNED
from minilora.models.prompts import Prompts, read_prompt_files, read_prompts
from minilora.models.tokenizer import Tokenizer, find_tokenizer

ADAPTER = ("peft", "AutoPeftModelForCausalLM", "lora, minilora", "A LoRA adapter of")
MODEL = ("transformers", "AutoModelForCausalLM", "minilora", "A model made from")
SYSTEM, PROMPT, RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"  # variables of Ollama's templates
ANSWER = """\
ids = inputs["input_ids"]
output = model.generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=100{ends})
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
"""


def write_cards(directory: Path, base: str = "") -> None:
    """Write README.md, and the Modelfile of a model. A base that is a path is not named."""
    is_model = (directory / "config.json").is_file()
    if is_model and (tokenizer := find_tokenizer(directory)) and (text := modelfile(tokenizer)):
        (directory / "Modelfile").write_text(text, encoding="utf-8")
    card = model_card(directory, ".", base if PINNED.fullmatch(base) else "")
    (directory / "README.md").write_text(card, encoding="utf-8")


def model_card(directory: Path, name: str, base: str) -> str:
    """Return the card in Markdown: the base, the results before and after, and code that asks as in training.

    The name is that of a repository, or "." of the directory itself.
    """
    library, loader, tags, about = ADAPTER if (directory / CONFIG_FILE).is_file() else MODEL
    lines = ["---", f"library_name: {library}", f"tags: [{tags}]"]
    lines += [f"base_model: {base.partition('@')[0]}"] if base else []
    lines += ["---", "", f"# {'How to use it' if name == '.' else name}", ""]
    lines += [f"{about} `{base}`.", ""] if base else []
    if (directory / "summary.json").is_file():
        lines += [*_results(directory / "summary.json"), ""]
    prompts = read_prompts(directory)
    if prompts.system:
        lines += ["It was trained with the system prompt below, which every conversation needs.", ""]
    lines += ["```python", *_code(directory, name, base, prompts, library, loader), "```"]
    if (directory / "Modelfile").is_file():
        lines += ["", "Ollama: `ollama create mine -f Modelfile` in this directory, then `ollama run mine`."]
    return "\n".join(lines) + "\n"


def _results(path: Path) -> list[str]:
    """Return what a run measured before and after, as the items of a list."""
    summary = read_json(path)
    try:
        general, lines = summary.get("general") or {}, []
        for when in ("before", "after"):
            named = {"held-out loss": summary[when]["loss"], "accuracy": summary[when]["accuracy"]}
            named["loss on general text"] = general.get(when)
            known = [f"{what} {value:.4f}" for what, value in named.items() if value is not None]
            lines += [f"- {when}: {', '.join(known)}"] if known else []
        return lines + ([f"- KL to the base on general text: {general['kl']:.4f}"] if general else [])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: is not a summary of a run ({error!r}); restore or remove it") from error


def _code(directory: Path, name: str, base: str, prompts: Prompts, library: str, loader: str) -> list[str]:
    """Return lines of Python that load the model or adapter, with its tokenizer or the base's, and ask it."""
    texts, own = read_prompt_files(directory), find_tokenizer(directory)
    repository, _, revision = (base if own is None and base else name).partition("@")
    pinned = f', revision="{revision}"' if revision else ""
    lines = [f"from {library} import {loader}", "from transformers import AutoTokenizer", ""]
    lines += [f'model = {loader}.from_pretrained("{name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repository}"{pinned})']
    if own is None and "chat_template.jinja" in texts:
        lines.insert(0, "from huggingface_hub import hf_hub_download")
        template = f'hf_hub_download("{name}", "chat_template.jinja")'
        lines += [f'tokenizer.chat_template = open({template}, encoding="utf-8").read()']
    if prompts.form == "template" and (texts or (own is not None and own.template)):
        messages = [{"role": "system", "content": prompts.system}] if prompts.system else []
        messages += [{"role": "user", "content": "Hello"}]
        lines += ["messages = [", *(f"    {json.dumps(each, ensure_ascii=False)}," for each in messages), "]"]
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        if prompts.thinking is not None:
            options += f", enable_thinking={prompts.thinking}"
        lines += [f"inputs = tokenizer.apply_chat_template(messages, {options})"]
    else:
        lines += ['inputs = tokenizer("Hello", return_tensors="pt")']
    ends = f", eos_token_id={sorted(own.stop_ids)}" if own is not None else ""
    return lines + ANSWER.replace("{ends}", ends).splitlines()


def modelfile(tokenizer: Tokenizer) -> str | None:
    """Return the Modelfile of a model in the same directory, or None if Ollama cannot ask it as it was trained.

    Ollama does not read Jinja. So the chat template is rendered with the names of Ollama's variables as the texts of
    messages. This works if all turns are written alike.
    """
    bos = tokenizer.decode(tokenizer.encode(""), skip_special_tokens=False)  # which Ollama writes itself
    names = {"system": SYSTEM, "user": PROMPT, "assistant": RESPONSE}
    system, user, assistant = ({"role": role, "content": name} for role, name in names.items())
    asked = ([user], [user, assistant, user], [system, user])
    thinking = tokenizer.prompts.thinking
    way: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        first, later, told = (tokenizer.render(messages, True, **way).removeprefix(bos) for messages in asked)
        end = tokenizer.render([user, assistant], **way).rpartition(RESPONSE)[2]
    except DataError:  # there is no template, or one that takes no system prompt
        return None
    turn = later.removeprefix(first + RESPONSE + end)
    begin = 0 if told.endswith(turn) else turn.find(PROMPT)  # where the system prompt is
    before, after = turn[:begin], turn[begin:]
    own, inside = (text.removeprefix(before).removesuffix(after) for text in (first, told))
    opening, _, closing = inside.partition(SYSTEM)
    default = own.removeprefix(opening).removesuffix(closing)  # of the template
    texts = [before + own + after, first + RESPONSE + end + turn, before + inside + after]
    is_alike = texts == [first, later, told] and own in ("", opening + default + closing)
    if not is_alike or (told + end).count("{{") != 2 or tokenizer.prompts.form == "plain":
        return None
    stops = [tokenizer.decode([token], skip_special_tokens=False) for token in sorted(tokenizer.stop_ids)]
    template = f"{before}{{{{ if .System }}}}{inside}{{{{ end }}}}{after}{RESPONSE}{end}"
    prompt = tokenizer.prompts.system or default
    if any('"""' in text or not text.replace("\n", " ").isprintable() for text in (template, prompt, *stops)):
        return None  # Ollama leaves out what is not printable
    lines = ["FROM .", f'TEMPLATE """{template}"""', f'SYSTEM """{prompt}"""']
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"

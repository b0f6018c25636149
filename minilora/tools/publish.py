"""Upload an adapter or a model to the Hugging Face Hub, with a card that is made from the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.adapters.layout import CONFIG_FILE, base_model_of
from minilora.errors import ConfigError, check_types
from minilora.models.hub import HUB_ID, reason_of
from minilora.storage import BUILTIN, read_json

MODEL = "config.json"
PATTERNS = ("*.safetensors", "*.json", "*.jinja")  # at the top of the directory
SETTINGS = (  # of run.json, which the card shows unless they are off
    *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "target_modules"),
    *("quantize", "learning_rate", "lr_scheduler", "batch_size", "gradient_accumulation_steps", "epochs", "max_steps"),
    *("train_on", "weight_decay", "seed"),
)
LOAD = {
    CONFIG_FILE: """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    MODEL: """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")""",
}


def push_to_hub(path: str | Path, name: str, private: bool = True) -> str:
    """Upload the adapter or the model in a directory to a repository of the hub, in one commit with its card.

    Uploaded are the safetensors, JSON and Jinja files of the directory itself, so no checkpoints. A repository that
    does not exist is created. Which server is asked, and as whom, is for `huggingface_hub` to say (`HF_TOKEN`).

    Args:
        path: the directory of a finished run, an adapter or a model.
        name: "org/name".
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the directory holds no adapter and no model, the name is not "org/name", or it cannot be uploaded.
    """
    check_types(push_to_hub, locals())
    import huggingface_hub  # here, because it is slow to import

    directory = Path(path)
    if not (found := HUB_ID.fullmatch(name)) or found[2] or name == BUILTIN:
        raise ConfigError(f"{name!r}: need the name of a repository, org/name")
    card = model_card(directory, name)
    files = sorted({file for pattern in PATTERNS for file in directory.glob(pattern)})
    operations = [huggingface_hub.CommitOperationAdd(file.name, file) for file in files]
    operations.append(huggingface_hub.CommitOperationAdd("README.md", card.encode()))
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.create_commit(name, operations, commit_message="Upload with minilora").commit_url)
    except Exception as error:  # the hub's own, and those of the HTTP library that its version uses
        raise ConfigError(f"{name}: not uploaded: {reason_of(error)}") from error


def model_card(directory: Path, name: str) -> str:
    """Return the card of an adapter or a model in Markdown: base, data, settings, results, and how to load it.

    Raises:
        ConfigError: the directory holds neither.
    """
    kind = next((file for file in (CONFIG_FILE, MODEL) if (directory / file).is_file()), None)
    if kind is None:
        raise ConfigError(f"{directory}: holds no {CONFIG_FILE} and no {MODEL}; need an adapter or a model")
    run, summary = (_read(directory / file) for file in ("run.json", "summary.json"))
    config = run.get("config", {})
    base = base_model_of(directory) if kind == CONFIG_FILE else config.get("model")
    base = str(base or "").partition("@")[0]
    library, tags = ("peft", "lora, minilora") if kind == CONFIG_FILE else ("transformers", "minilora")
    head = ["---", f"library_name: {library}", f"tags: [{tags}]"]
    head += [f"base_model: {base}"] if HUB_ID.fullmatch(base) and base != BUILTIN else []
    what = "A LoRA adapter for" if kind == CONFIG_FILE else "A model fine-tuned from"
    about = f"{what} `{base}`, made with minilora." if base else "A model made with minilora."
    parts = ["\n".join([*head, "---"]), f"# {name.partition('/')[2]}", about]
    if summary:
        parts.append("## Results\n\n" + _results(summary))
    if settings := [f"- `{key}`: {config[key]}" for key in SETTINGS if config.get(key) not in (None, False, "none")]:
        parts.append("## Settings\n\n" + "\n".join(settings))
    if hashes := run.get("data_sha256"):
        parts.append("## Data (SHA-256)\n\n" + "\n".join(f"- `{file}`: `{found}`" for file, found in hashes.items()))
    code = LOAD[kind].format(base=base or "path/to/base", name=name)
    ours = f"minilora generate --{'adapter' if kind == CONFIG_FILE else 'model'} {name} --prompt …"
    parts.append(f"## Use\n\n```python\n{code}\n```\n\n```sh\n{ours}\n```")
    return "\n\n".join(parts) + "\n"


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _results(summary: dict[str, Any]) -> str:
    """Return the table of held-out loss and accuracy, before and after."""
    rows = ["| | held-out loss | accuracy |", "|---|---|---|"]
    for label, when in (("base", "before"), ("result", "after")):
        scores = [summary[when].get(key) for key in ("loss", "accuracy")]
        rows.append(f"| {label} | " + " | ".join("-" if each is None else f"{each:.4f}" for each in scores) + " |")
    return "\n".join([*rows, "", f"{summary['steps']:,} steps, {summary['tokens']:,} tokens."])

"""Command-line flags from data classes: each field is a flag, with the default and the help of the field."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from minilora.adapters.config import FLAG_NAMES, flag
from minilora.errors import ConfigError, fits, in_recipe
from minilora.files import holds_files, lock, publishing, read_json, read_text, remove

T = TypeVar("T")
# Flags, and their names in PEFT, TRL, torchtune, litgpt, mlx-lm, axolotl and LLaMA-Factory where these are not similar.
NAMES_ELSEWHERE = {
    "lora_r": "r rank",
    "target_modules": "lora_target lora_target_linear",
    "model": "model_name_or_path checkpoint_dir",
    "data": "dataset_name train_file",
    "eval_data": "valid_data validation_file eval_dataset",
    "out": "output_dir adapter_path save_path",
    "learning_rate": "lr",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches grad_accum gradient_accumulation",
    "max_length": "cutoff_len sequence_len",
    "epochs": "num_train_epochs",
    "max_steps": "iters",
    "train_on": "completion_only_loss assistant_only_loss mask_prompt",
    "gradient_checkpointing": "recompute grad_checkpoint enable_activation_checkpointing",
    "batch_tokens": "packing sample_packing packed",
    "sort_window": "group_by_length train_sampling_strategy",
    "prompt_style": "template chat_template",
    "report": "logger_name",
    "resume": "resume_from_checkpoint",
    "adapter": "resume_adapter_file adapter_name_or_path lora_model_dir",
    "eval_steps": "steps_per_eval",
    "eval_split": "val_set_size val_size",
    "logging_steps": "steps_per_report log_interval",
    "temperature": "temp",
    "double_quant": "use_bnb_nested_quant",
}
ELSEWHERE = {name: flag for flag, names in NAMES_ELSEWHERE.items() for name in names.split()}
ADVICE = {  # for flags of these tools that have no counterpart among the flags
    **dict.fromkeys(("bf16", "fp16", "precision"), "use --dtype float32 or bfloat16"),
    **dict.fromkeys(("task", "task_type"), in_recipe("classify_texts")),
    **dict.fromkeys(("density", "majority_sign_method"), in_recipe("ties_and_dare")),
    "target_parameters": in_recipe("experts"),
    "do_sample": "use a --temperature above 0",
    **dict.fromkeys(("optim", "optimizer"), "there is none: the optimizer is AdamW"),
    **dict.fromkeys(("wandb", "wandb_project", "use_wandb"), "use --report wandb"),
    **dict.fromkeys(("compile", "torch_compile"), "there is none: compiling did not make a step faster"),
    "logging_dir": "there is none: --report tensorboard writes to the directory of --out",
    **dict.fromkeys(
        ("deepspeed", "fsdp"),
        "there is none; use torchrun --nproc-per-node N -m minilora finetune",
    ),
    "push_to_hub": "use `minilora push DIR NAME`",
    "config_file": "use --config with a .toml or .json file",
    **dict.fromkeys(("load_in_4bit", "quantization", "quantization_bit", "bnb_4bit_quant_type"), "use --quantize nf4"),
}


def add_fields(
    parser: argparse.ArgumentParser, cls: type, title: str, but: Sequence[str] = (), unset: str | None = None
) -> None:
    """Add a flag for each field of a data class, except those in `but`.

    Args:
        parser: the parser of a command.
        cls: the data class, whose fields are made by `option`.
        title: the group of the help page for fields that name none.
        but: names of fields to leave out.
        unset: if given, the flags' default is None, and the help shows this text as the default.
    """
    groups = {group.title: group for group in parser._action_groups}
    hints = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in but):
        name, kinds = FLAG_NAMES.get(field.name, field.name), _kinds(hints[field.name])
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = " ".join(default) if isinstance(default, tuple) else default
        shown = f" (default: {unset})" if unset else "" if default in (None, (), {}) else f" (default: {text})"
        options: dict[str, Any] = {"dest": name, "help": field.metadata["help"] + shown}
        options["default"] = None if unset else default
        if kinds == (bool,):
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kinds[0]) is typing.Literal:
            options["metavar"] = f"{{{','.join(typing.get_args(kinds[0]))}}}"  # which the class checks
        elif kinds == (tuple[str, ...],) and default:
            options |= {"nargs": "+", "metavar": name.upper()}
        else:
            options["type"] = _converter(kinds)
            options["metavar"] = {int: "N", float: "X"}.get(options["type"], name.rpartition("_")[2].upper())
        group = field.metadata.get("group", title)
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(flag(field.name), **options)


def from_flags(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return the data class that the flags describe; values from a configuration file are checked by the class.

    A field without a flag keeps its default.
    """
    hints, fields = typing.get_type_hints(cls), {}
    names = (field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    for name in (name for name in names if FLAG_NAMES.get(name, name) in values):
        value = values[FLAG_NAMES.get(name, name)]
        if hints[name] == tuple[str, ...] and isinstance(value, str | list):
            value = (value,) if isinstance(value, str) else tuple(value)
        fields[name] = value
    return cls(**fields)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add --out, the directory that a command writes."""
    parser.add_argument("--out", required=True, type=Path, help="directory to write; it must be new or empty")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Lock the output directory and yield a temporary one; its files move to the output if the block succeeds.

    Raises:
        ConfigError: there is anything in it.
        TrainingError: it cannot be written, or another process is at work there.
    """
    is_new = not out.exists()
    held = lock(out)
    try:
        if holds_files(out):  # `lock` has moved files that a killed process had staged into place
            raise ConfigError(f"{out}: holds files; give another --out")
        with publishing(out) as directory:
            yield directory
    finally:
        remove(out / ".lock")
        held.release()
        if is_new and not any(out.iterdir()):
            out.rmdir()


def use_config(parser: argparse.ArgumentParser, values: Mapping[str, Any], source: str) -> None:
    """Make the values of a configuration the defaults of the flags.

    Raises:
        ConfigError: a key is not a flag; the message suggests the nearest one.
    """
    known = names_of(parser) - {"config", "dry_run", "force", "plain"}
    for key in values:
        if key.replace("-", "_") not in known:
            raise ConfigError(f"{source}: key {key!r} is unknown{nearest(key, known)}")
    parser.set_defaults(**{key.replace("-", "_"): value for key, value in values.items()})


def names_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of a command's flags, with underscores."""
    return {action.dest for action in parser._actions if action.dest != "help"}


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown flag or key: what was probably meant, also in other tools."""
    key = name.lstrip("-").replace("-", "_")
    if key in ADVICE:
        return f"; {ADVICE[key]}"
    meant = ELSEWHERE.get(key)
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(key, known, n=1)), None)
    if meant is None:
        return ""
    return f"; did you mean {meant!r}?" if not name.startswith("-") else f"; did you mean --{meant.replace('_', '-')}?"


def read_config(path: Path) -> dict[str, Any]:
    """Read a flat .toml or .json file of flags and their values.

    Raises:
        FormatError, ConfigError: the file cannot be read.
    """
    if path.suffix == ".json":
        return read_json(path, is_named=True)
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: need a .toml or .json file")
    text = read_text(path, is_named=True)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType)


def _converter(kinds: tuple[Any, ...]) -> Callable[[str], Any]:
    """Return the function that converts the text of a flag to a value of one of these types."""
    if bool in kinds:
        return _bool_or_text
    if tuple[str, ...] in kinds:
        return _names_or_pattern if str in kinds else _names
    if len(kinds) == 1 and kinds[0] in (str, int, float):
        return kinds[0]
    need = " or ".join(
        "numbers joined with commas" if typing.get_origin(kind) is tuple else "a JSON object" for kind in kinds
    )

    def numbers_or_object(text: str) -> Any:
        try:
            value = json.loads(text if text.lstrip().startswith("{") else f"[{text}]")
        except (ValueError, RecursionError):
            value = None
        if not any(fits(value, kind) for kind in kinds):
            raise argparse.ArgumentTypeError(f"found {text!r:.80}, need {need}")
        return value

    return numbers_or_object


def _bool_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _names_or_pattern(text: str) -> str | tuple[str, ...]:
    """Return `q_proj,v_proj` as a list of names, and text with other characters, such as `all-linear`, as it is."""
    is_list = all(character.isalnum() or character in "_., " for character in text)
    return _names(text) if is_list else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))

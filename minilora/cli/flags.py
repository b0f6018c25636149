"""Command-line flags out of data classes: a field is a flag, its default and help are the field's own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minilora.adapters.config import RENAMED
from minilora.errors import ConfigError, fits, in_words
from minilora.storage import read_json, read_text

T = TypeVar("T")
# Our flag, and what PEFT, TRL, torchtune, litgpt, mlx-lm, axolotl and LLaMA-Factory call it.
NAMES_ELSEWHERE = {
    "lora_r": "r rank lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "lora_target lora_target_modules lora_target_linear",
    "model": "model_name_or_path base_model checkpoint_dir",
    "data": "dataset dataset_name datasets train_file",
    "out": "output_dir out_dir adapter_path save_path",
    "learning_rate": "lr",
    "lr_scheduler": "lr_scheduler_type lr_schedule scheduler",
    "warmup_steps": "warmup_ratio lr_warmup_steps num_warmup_steps",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accumulation_steps accumulate_grad_batches",
    "max_length": "max_seq_length max_seq_len cutoff_len sequence_len",
    "epochs": "num_train_epochs num_epochs",
    "max_steps": "iters",
    "train_on": "completion_only_loss assistant_only_loss mask_prompt train_on_inputs",
    "recompute": "gradient_checkpointing grad_checkpoint enable_activation_checkpointing",
    "batch_tokens": "packing sample_packing packed",
    "sort_window": "group_by_length train_sampling_strategy",
    "compile": "torch_compile use_compile",
    "prompt_style": "template chat_template",
    "report": "report_to logger_name",
    "resume": "resume_from_checkpoint resume_adapter_file",
    "save_steps": "save_every save_interval",
    "eval_steps": "steps_per_eval eval_interval",
    "eval_split": "val_set_size val_size",
    "logging_steps": "steps_per_report log_every_n_steps log_interval",
    "max_new_tokens": "max_tokens",
    "temperature": "temp",
    "system": "system_prompt",
    "task": "task_type",
    "double_quant": "use_bnb_nested_quant bnb_4bit_use_double_quant",
}
ELSEWHERE = {name: flag for flag, names in NAMES_ELSEWHERE.items() for name in names.split()}
ADVICE = {  # where no flag is the same
    **dict.fromkeys(("eval_data", "valid_data", "validation_file", "eval_dataset"), "--data takes a directory with it"),
    **dict.fromkeys(("bf16", "fp16", "precision"), "--dtype bfloat16 is what there is beside float32"),
    "do_sample": "a --temperature above 0 samples",
    "push_to_hub": "`hf upload NAME DIR` does that",
    "config_file": "--config reads a .toml or .json file",
    **dict.fromkeys(("load_in_4bit", "quantization", "quantization_bit", "bnb_4bit_quant_type"), "see --quantize nf4"),
}


def add_fields(
    parser: argparse.ArgumentParser, cls: type, title: str, but: Sequence[str] = (), unset: str | None = None
) -> None:
    """One flag for each field of a data class `but` those, in the group that the field names, or else in `title`.

    With `unset` the flags' defaults are None, and this is what the help says of it.
    """
    groups = {group.title: group for group in parser._action_groups}
    hints = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in but):
        name = RENAMED.get(field.name, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = " ".join(default) if isinstance(default, tuple) else default
        shown = f" (default: {unset})" if unset else "" if default in (None, (), {}) else f" (default: {text})"
        options: dict[str, Any] = {"dest": name, "help": field.metadata["help"] + shown}
        options["default"] = None if unset else default
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices := _choices(hints[field.name]):
            options["choices"] = choices
        elif hints[field.name] == tuple[str, ...] and default:
            options |= {"nargs": "+", "metavar": name.upper()}
        else:
            options["type"] = _converter(hints[field.name])
            options["metavar"] = {int: "N", float: "X"}.get(options["type"], name.rpartition("_")[2].upper())
        group = field.metadata.get("group", title)
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name.replace('_', '-')}", **options)


def from_flags(cls: type[T], values: Mapping[str, Any]) -> T:
    """The data class that the parsed flags describe.

    Raises:
        ConfigError: a value from a configuration file has the wrong type; all of them in one message.
    """
    names = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    declared = {name: _as_declared(values[flag], hints[name]) for name, flag in names.items()}
    bad = [
        f"{names[name]} is {values[names[name]]!r}, need {in_words(hints[name])}"
        for name, value in declared.items()
        if not fits(value, hints[name])
    ]
    if bad:
        raise ConfigError("; ".join(bad))
    return cls(**declared)


def use_config(parser: argparse.ArgumentParser, values: Mapping[str, Any], source: str) -> None:
    """Make the values of a configuration the flags' defaults, so that flags on the command line go on top.

    Raises:
        ConfigError: a key that is no flag; the nearest right one is named.
    """
    known = names_of(parser) - {"config", "dry_run", "force", "plain"}
    for key in values:
        if key.replace("-", "_") not in known:
            raise ConfigError(f"{source}: key {key!r} is unknown{nearest(key, known)}")
    parser.set_defaults(**{key.replace("-", "_"): value for key, value in values.items()})


def names_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a command, as keys."""
    return {action.dest for action in parser._actions if action.dest != "help"}


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: what was probably meant, also by users of other tools."""
    key = name.lstrip("-").replace("-", "_")
    if key in ADVICE:
        return f"; {ADVICE[key]}"
    meant = ELSEWHERE[key] if ELSEWHERE.get(key) in known else None
    meant = meant or next(iter(difflib.get_close_matches(key, known, n=1)), None)
    if meant is None:
        return ""
    return f"; did you mean {meant!r}?" if not name.startswith("-") else f"; did you mean --{meant.replace('_', '-')}?"


def read_config(path: Path) -> dict[str, Any]:
    """A flat .toml or .json file of flag names and values.

    Raises:
        FormatError, ConfigError: the file cannot be read.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: need a .toml or .json file")
    if path.suffix == ".json":
        return read_json(path)
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _as_declared(value: Any, hint: Any) -> Any:
    """A list from JSON as the tuple it stands for; one text where there may be several."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) and hint == tuple[str, ...] else value


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union but None, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a type lists; () if it does not."""
    return tuple(
        value for kind in _kinds(hint) if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)
    )


def _converter(hint: Any) -> Callable[[str], Any]:
    """How the text of a flag becomes a value of this type."""
    kinds = _kinds(hint)
    element = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple), None)
    is_object = any(typing.get_origin(kind) is Mapping for kind in kinds)
    if bool in kinds:
        return _truth_or_text
    if element is None:
        return _json_object if is_object else kinds[0]
    if str in kinds:
        return _names_or_pattern

    def numbers(text: str) -> Any:
        if is_object and text.lstrip().startswith("{"):
            return _json_object(text)
        try:
            return _list(text, element)
        except ValueError as error:
            more = ", or a JSON object" if is_object else ""
            raise argparse.ArgumentTypeError(f"found {text!r}, need numbers joined with commas{more}") from error

    return numbers


def _list(text: str, element: Callable[[str], T]) -> tuple[T, ...]:
    return tuple(element(part.strip()) for part in text.split(","))


def _truth_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {text:.80}, need a JSON object")
    return value


def _names_or_pattern(text: str) -> str | tuple[str, ...]:
    """`q_proj,v_proj` is a list of names; `all-linear` and anything with other characters is one string."""
    is_list = all(character.isalnum() or character in "_., " for character in text)
    return _list(text, str) if is_list else text

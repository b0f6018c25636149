"""The commands: what each is for, and its flags. None of this needs PyTorch: what a command does is in its module."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from minilora.adapters.combine_config import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.cli.command import Command
from minilora.cli.flags import add_flags, names_of, read_config, use_config
from minilora.cli.groups import Output, add_model_flags, add_prompt_flags, add_writing_flags
from minilora.cli.trained import adapters, how_trained
from minilora.errors import ConfigError
from minilora.models.quantization import QuantizeConfig, Target
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.settings import RunConfig
from minilora.storage import ASSETS, BUILTIN, read_json

METRICS = ("nll", "choice", "exact-match")  # of a language model
CLASS_METRICS = ("accuracy", "nll")  # of a classifier
EXTRACT_FIELDS = ("r", "target_modules", "exclude_modules", "rank_pattern")  # of LoraConfig, that count there
CHAT_HELP = """\
/reset              begin a new conversation
/system TEXT        set the system prompt; without TEXT, have none
/adapter NAME|none  go on with this adapter, or with none; alone: list them
/help               show this
/exit               end, as Ctrl-D does
Ctrl-C stops a reply. A message that begins with / needs a space before it."""


def _finetune_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, RunConfig, "files and device")
    add_flags(parser, QuantizeConfig, "quantization")
    add_flags(parser, LoraConfig, "adapter")
    add_flags(parser, DataConfig, "data")
    add_flags(parser, TrainConfig, "training")
    parser.add_argument(
        "--config", type=Path, help="a .toml or .json file of these flags; the command line goes on top"
    )
    parser.add_argument("--dry-run", action="store_true", help="show rows, labels and figures, and train nothing")
    parser.add_argument("--force", action="store_true", help="train even if the memory will not do")


def _with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Values of --config become defaults; without --model and --data, those of the built-in example do.

    Raises:
        ConfigError: a model without data, or data without a model.
    """
    path = parser.parse_known_args(words)[0].config
    values = read_config(path) if path is not None else {}
    values = values["config"] if isinstance(values.get("config"), dict) else values  # where run.json has them
    named = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")} | set(values)
    if len(named & {"model", "data"}) == 1:
        lacking = "--data" if "model" in named else "--model"
        raise ConfigError(
            f"--model and --data go together: give {lacking}, too; {lacking} {BUILTIN} is the built-in one"
        )
    if not named & {"model", "data"}:
        use_config(parser, read_json(ASSETS / "finetune.json"), "finetune.json")
    use_config(parser, values, str(path))


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_prompt_flags(parser)
    add_writing_flags(parser, max_new_tokens=64)
    add_flags(parser, Output, "output")


def _chat_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, many_adapters=True)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    add_writing_flags(parser, max_new_tokens=512)


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, many_adapters=True)
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        help="what to merge into: original, the 16-bit weights; dequantized, the 4-bit weights that were trained on, "
        "made dense; requantized, these in four bits again (default: as the base was in training)",
    )
    parser.add_argument(
        "--as-adapter", action="store_true", help="write the adapters as one adapter, and no model; no base is needed"
    )
    add_flags(parser, CombineConfig, "how adapters become one")


def _extract_flags(parser: argparse.ArgumentParser) -> None:
    for name, meaning in (("base", "the model that was tuned"), ("tuned", "what became of it")):
        parser.add_argument(
            f"--{name}", required=True, help=f"{meaning}: a directory, or org/name[@revision] of the Hugging Face hub"
        )
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument("--device", default="auto", help="where to compute it: cpu, cuda, mps (default: auto)")
    others = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in EXTRACT_FIELDS]
    add_flags(parser, LoraConfig, "adapter", but=others)
    parser.add_argument(
        "--svd-energy", type=float, metavar="X", help="share of each module's squares to keep, if a lower rank will do"
    )


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="directory of the adapter, or its name on the hub")
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")


def _quantize_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=BUILTIN,
        help=f"directory of the model, or org/name[@revision] of the Hugging Face hub (default: {BUILTIN})",
    )
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")
    parser.add_argument("--device", default="auto", help="where to compute it: cpu, cuda, mps (default: auto)")
    add_flags(parser, QuantizeConfig, "quantization", but=("quantize",))


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--data", required=True, nargs="+", help="rows; of a directory, the test split")
    parser.add_argument(
        "--metric",
        choices=sorted({*METRICS, *CLASS_METRICS}),
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written; accuracy, of classifiers: how often the class is right "
        "(default: accuracy of a classifier, else nll)",
    )
    add_flags(parser, DataConfig, "data", but=("eval_split",))


def _as_trained(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Rows are read as the adapter was trained on them, if flags do not say otherwise."""
    trained = how_trained(adapters(vars(parser.parse_known_args(words)[0]))).config
    names = names_of(parser) & {field.name for field in dataclasses.fields(DataConfig)}
    use_config(parser, {name: trained[name] for name in names & set(trained)}, "run.json")


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory of a model, an adapter or a run; a .safetensors file")
    parser.add_argument("--model", help="base model of an adapter (default: the one that it names, where that is here)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="tell what fine-tuning a model takes, from its config.json alone, and what 7B, 13B and 70B do",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with each tensor and module")


def _plot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write, .svg or .png (default: plot.svg, in the directory of the run if there is one run)",
    )


COMMANDS = (
    Command(
        name="finetune",
        help="train an adapter, or all weights; without --model and --data, on a built-in model and data",
        about="Train an adapter for a model on rows of data, or with --method full the model itself, and measure the "
        "model before and after.\n\n"
        "Without --model and --data, a built-in model and data are used, and it takes less than a minute. --dry-run "
        "shows what a run would learn. The same command, given again, goes on with a run that was stopped.",
        example="minilora finetune --model path/to/model --data rows.jsonl --out run --dry-run",
        add_flags=_finetune_flags,
        prepare=_with_config,
    ),
    Command(
        name="generate",
        help="answer or continue prompts",
        about="Answer prompts, each a user's turn of the chat template, or continue them if the model has none. One "
        "text is shown as it is written.",
        example='minilora generate --adapter run --prompt "Hello" --compare-base',
        add_flags=_generate_flags,
    ),
    Command(
        name="chat",
        help="talk with a model",
        about="Talk with a model, message by message, by its chat template.\n\n" + CHAT_HELP,
        example="minilora chat --adapter run --temperature 0.7",
        add_flags=_chat_flags,
    ),
    Command(
        name="merge",
        help="fold adapters into a model's weights and write the model",
        about="Fold adapters into a model's weights and write the model, one weight at a time. With a weight "
        "behind its name, as in --adapter one:0.7 --adapter two:0.3, an adapter counts for as much; a negative one "
        "takes it away.",
        example="minilora merge --adapter run --out merged",
        add_flags=_merge_flags,
    ),
    Command(
        name="extract",
        help="write the adapter between two models",
        about="Write the adapter that makes of a model what another one has become by tuning, as nearly as a rank "
        "allows.",
        example="minilora extract --base model --tuned tuned-model --lora-r 32 --out adapter",
        add_flags=_extract_flags,
    ),
    Command(
        name="export",
        help="write an adapter in a plain form that more readers understand",
        about="Write an adapter in a plain form: scales folded into B, one rank for all modules, alpha = r. "
        "It does the same as before, also in readers that take no notice of rsLoRA and of patterns.",
        example="minilora export --adapter run --out plain",
        add_flags=_export_flags,
    ),
    Command(
        name="quantize",
        help="write a model in four bits, as bitsandbytes reads it",
        about="Write a model in four bits (NF4), as transformers with bitsandbytes, and every command here, reads it.",
        example="minilora quantize --model path/to/model --out model-nf4",
        add_flags=_quantize_flags,
    ),
    Command(
        name="eval",
        help="measure a model, with or without an adapter, on rows of data",
        about="Measure a model, with or without an adapter, on rows of data; print one JSON object.",
        example="minilora eval --adapter run --data rows.jsonl --metric exact-match",
        add_flags=_evaluate_flags,
        module="evaluate",
        prepare=_as_trained,
    ),
    Command(
        name="inspect",
        help="tell what a model, an adapter, a run or a safetensors file holds",
        about="Tell what a model, an adapter, a run or a safetensors file holds, and which tools read it.",
        example="minilora inspect run",
        add_flags=_inspect_flags,
    ),
    Command(
        name="plot",
        help="draw loss, evaluation, learning rate and gradient norm of runs",
        about="Draw loss, evaluation, learning rate and gradient norm of one or more runs as one picture.",
        example="minilora plot run1 run2 --out runs.svg",
        add_flags=_plot_flags,
    ),
)

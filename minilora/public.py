"""The public names of `minilora`. Importing this module registers the kernels."""

import minilora.kernels  # noqa: F401
from minilora.adapter import detach, disable_adapter
from minilora.adapters.attach import (
    attach,
    count_parameters,
    delete_adapter,
    find_target_modules,
    merge,
    merged,
    set_adapter,
)
from minilora.adapters.combine import CombineConfig
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import load_adapter, save_adapter
from minilora.adapters.weighted import combine_adapters
from minilora.definition import plain
from minilora.errors import ConfigError, DataError, FormatError, MiniloraError, ShapeError, TargetError, TrainingError
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import load_model, save_model
from minilora.models.generate import generate
from minilora.models.tokenizer import Tokenizer, load_tokenizer
from minilora.models.vocabulary import resize_token_embeddings
from minilora.runs.dataset import Dataset, Example
from minilora.runs.inputs import load_dataset
from minilora.runs.loop import TrainResult, train
from minilora.runs.reports import ProgressBar
from minilora.runs.sampler import set_dropout_step
from minilora.runs.settings import DataConfig, TrainConfig
from minilora.runs.tracking import Tracker

__all__ = [
    "CombineConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Dataset",
    "Example",
    "FormatError",
    "LoraConfig",
    "MiniloraError",
    "ProgressBar",
    "QuantizeConfig",
    "ShapeError",
    "TargetError",
    "Tokenizer",
    "Tracker",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "attach",
    "combine_adapters",
    "count_parameters",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "find_target_modules",
    "generate",
    "load_adapter",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "merge",
    "merged",
    "plain",
    "resize_token_embeddings",
    "save_adapter",
    "save_model",
    "set_adapter",
    "set_dropout_step",
    "train",
]

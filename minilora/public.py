"""The public names, which `minilora` has as its own."""

from minilora.errors import (
    ConfigError,
    DataError,
    FormatError,
    MiniloraError,
    ShapeError,
    TargetError,
    TrainingError,
)
from minilora.lora.attach import (
    attach,
    delete_adapter,
    detach,
    disable_adapter,
    merge,
    merged,
    set_adapter,
    set_dropout_step,
)
from minilora.lora.combine_config import CombineConfig
from minilora.lora.config import LoraConfig
from minilora.lora.files import load_adapter, save_adapter
from minilora.lora.find import count_parameters
from minilora.lora.serve import hotswap_adapter, merged_if_faster, mixed_batch
from minilora.lora.targets import find_target_modules
from minilora.lora.weighted import combine_adapters
from minilora.model.checkpoint import load_model, save_model
from minilora.model.classifier import load_classifier
from minilora.model.generate import generate
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.model.vocabulary import grow_vocabulary
from minilora.quant.config import QuantizeConfig
from minilora.train.classes import load_classes
from minilora.train.config import DataConfig, TrainConfig
from minilora.train.data import Dataset, Example, load_dataset
from minilora.train.loop import TrainResult, train

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
    "QuantizeConfig",
    "ShapeError",
    "TargetError",
    "Tokenizer",
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
    "grow_vocabulary",
    "hotswap_adapter",
    "load_adapter",
    "load_classes",
    "load_classifier",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "merge",
    "merged",
    "merged_if_faster",
    "mixed_batch",
    "save_adapter",
    "save_model",
    "set_adapter",
    "set_dropout_step",
    "train",
]

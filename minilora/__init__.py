"""minilora: LoRA fine-tuning you can read in an afternoon and trust in production-sized tests."""

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
    count_parameters,
    detach,
    disable_adapter,
    merge,
    set_adapter,
    set_dropout_step,
)
from minilora.lora.config import LoraConfig
from minilora.lora.files import load_adapter, save_adapter
from minilora.model.checkpoint import load_model, save_model
from minilora.model.generate import generate
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.quant.config import QuantizeConfig
from minilora.train.config import DataConfig, TrainConfig
from minilora.train.data import Dataset, Example, load_dataset
from minilora.train.loop import TrainResult, train

__version__ = "0.1.0"
__all__ = [
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
    "count_parameters",
    "detach",
    "disable_adapter",
    "generate",
    "load_adapter",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "merge",
    "save_adapter",
    "save_model",
    "set_adapter",
    "set_dropout_step",
    "train",
]

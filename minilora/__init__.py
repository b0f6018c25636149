"""minilora: LoRA fine-tuning you can read in an afternoon and trust in production-sized tests.

The public names are those of `minilora.public`. They, and PyTorch, are imported when the first one is used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from minilora.errors import in_recipe

__version__ = "0.2.0"
_ELSEWHERE = {  # names in PEFT, transformers, TRL and earlier versions, and what to use here
    "AutoModelForCausalLM": "ml.load_model",
    "AutoTokenizer": "ml.load_tokenizer",
    "BitsAndBytesConfig": "ml.QuantizeConfig",
    "LoraModel": "ml.attach",
    "Meter": "ml.ProgressBar",
    "PeftModel": "ml.load_adapter",
    "SFTConfig": "ml.TrainConfig",
    "SFTTrainer": "ml.train",
    "TrainingArguments": "ml.TrainConfig",
    "get_peft_model": "ml.attach",
    "grow_vocabulary": "ml.resize_token_embeddings",
    "hotswap_adapter": "ml.set_adapter",
    "merged_if_faster": "ml.merged",
    "prepare_model_for_kbit_training": 'ml.load_model(name, quantize="nf4")',
    "push_to_hub": "`minilora push`",
}
_IN_RECIPES = {
    "AutoModelForSequenceClassification": "classify_texts",
    "AutoModelForTokenClassification": "classify_tokens",
    "load_classifier": "classify_texts",
    "mixed_batch": "adapter_per_row",
}

if TYPE_CHECKING:
    from minilora.public import *  # noqa: F403 - its `__all__` names them
else:

    def __getattr__(name):
        if not name.startswith("__") and importlib.util.find_spec(f"minilora.{name}"):
            return importlib.import_module(f"minilora.{name}")
        if not name.startswith("__") or name == "__all__":
            public = importlib.import_module("minilora.public")
            if name == "__all__" or name in public.__all__:
                return getattr(public, name)
        advice = f"; use {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        if name in _IN_RECIPES:
            advice = f"; {in_recipe(_IN_RECIPES[name])}"
        raise AttributeError(f"module 'minilora' has no attribute {name!r}{advice}")

    def __dir__():
        return sorted({*globals(), *importlib.import_module("minilora.public").__all__})

"""minilora: LoRA fine-tuning whose core can be read in an afternoon.

The public names are those of `minilora.public`. They, and PyTorch, are imported when the first one is used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from minilora.errors import in_recipe

__version__ = "0.3.0"
_GONE = {  # names of earlier versions, and of PEFT and TRL, and what to use here
    "Meter": "use ml.ProgressBar",
    "PeftModel": "use ml.load_adapter",
    "SFTTrainer": "use ml.train",
    "get_peft_model": "use ml.attach",
    "grow_vocabulary": "use ml.resize_token_embeddings",
    "hotswap_adapter": "use ml.set_adapter",
    "load_classifier": in_recipe("classify_texts"),
    "merged_if_faster": "use ml.merged",
    "mixed_batch": in_recipe("adapter_per_row"),
    "push_to_hub": "use `minilora push`",
}

if TYPE_CHECKING:
    from minilora.public import *  # noqa: F403
else:

    def _public():
        names = vars(importlib.import_module("minilora.public"))
        return {name: value for name, value in sorted(names.items()) if not name.startswith("_")}

    def __getattr__(name):
        if name == "__all__":
            return [*_public()]
        if not name.startswith("__"):
            if importlib.util.find_spec(f"minilora.{name}"):
                return importlib.import_module(f"minilora.{name}")
            if name in (public := _public()):
                return public[name]
        advice = f"; {_GONE[name]}" if name in _GONE else ""
        raise AttributeError(f"module 'minilora' has no attribute {name!r}{advice}")

    def __dir__():
        return sorted({*globals(), *_public()})

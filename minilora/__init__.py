"""minilora: LoRA fine-tuning whose core can be read in an afternoon.

The public names are those of `minilora.public`. They, and PyTorch, are imported when the first one is used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.4.0"
_FOREIGN_NAMES = {  # names of PEFT and TRL, and what to use here
    "DPOTrainer": "use ml.train with the loss in recipes/dpo.py",
    "GRPOTrainer": "use ml.train with the loss in recipes/grpo.py",
    "PeftModel": "use ml.load_adapter",
    "SFTTrainer": "use ml.train",
    "get_peft_model": "use ml.attach",
    "hotswap_adapter": "use ml.set_adapter",
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
        advice = f"; {_FOREIGN_NAMES[name]}" if name in _FOREIGN_NAMES else ""
        raise AttributeError(f"module 'minilora' has no attribute {name!r}{advice}")

    def __dir__():
        return sorted({*globals(), *_public()})

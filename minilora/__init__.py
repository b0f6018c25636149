"""minilora: LoRA fine-tuning you can read in an afternoon and trust in production-sized tests.

The public names are those of `minilora.public`. They, and PyTorch, are imported when the first one is used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from minilora.public import *  # noqa: F403 - which names they are, it says itself
else:

    def __getattr__(name):
        if not name.startswith("__") and importlib.util.find_spec(f"minilora.{name}"):
            return importlib.import_module(f"minilora.{name}")
        if not name.startswith("__") or name == "__all__":
            public = importlib.import_module("minilora.public")
            if name == "__all__" or name in public.__all__:
                return getattr(public, name)
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *importlib.import_module("minilora.public").__all__})

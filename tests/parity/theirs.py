"""Their models as they are loaded and moved in several tests."""

import pytest
import torch

transformers = pytest.importorskip("transformers")


def theirs_loaded(path, dtype=torch.float32):
    """transformers' causal model of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

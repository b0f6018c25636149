"""Their models as they are loaded and moved in several tests."""

import pytest
import torch

transformers = pytest.importorskip("transformers")


def theirs_loaded(path, dtype=torch.float32):
    """transformers' causal model of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def perturb_(model, seed=0):
    """Move everything that is trained, or it would not show; a model of either side."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

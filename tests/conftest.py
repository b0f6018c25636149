import pytest
import torch
from hypothesis import settings

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fast")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from more, and a loaded machine loses much."""
    torch.set_num_threads(1)

import pytest
import torch
from hypothesis import Phase, settings

collect_ignore_glob = ["golden/make_*.py"]  # scripts, which need the extra `parity`
settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("find", settings.get_profile("fast"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("fast")


@pytest.fixture(autouse=True)
def _same_everywhere():
    """What a peer draws by itself is the same in each run; and tiny tensors gain nothing from more threads."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

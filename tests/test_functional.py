import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora.functional import keyed_dropout, lora_branch, lora_delta, lora_scale
from minilora.testing import reference
from tests.models import randn, scales, seeds, sizes
from tests.tolerance import assert_maths

keys = st.text(max_size=8)


@given(sizes, scales)
def test_scale_is_alpha_over_r_and_over_its_root_for_rslora(r, alpha):
    plain, stable = lora_scale(r, alpha), lora_scale(r, alpha, use_rslora=True)
    assert_maths(torch.tensor([plain * r, stable * stable * r], dtype=torch.float64), torch.tensor([alpha, alpha**2]))


@given(seeds, sizes, sizes, sizes, sizes, scales)
def test_branch_and_delta_equal_the_loops(seed, n, inner, outer, r, scale):
    x, A, B = randn(seed, n, inner), randn(seed + 1, r, inner), randn(seed + 2, outer, r)
    zero = torch.zeros(outer, inner).double().numpy()
    assert_maths(
        lora_branch(x, A, B, scale), reference.lora_forward(x.numpy(), zero, None, A.numpy(), B.numpy(), scale)
    )
    assert_maths(lora_delta(A, B, scale), reference.lora_merged_weight(zero, A.numpy(), B.numpy(), scale))


@given(seeds, keys, keys, st.sampled_from([0.1, 0.5]))
def test_dropout_is_a_function_of_its_key(seed, key, other, p):
    x = randn(seed, 9, 40)
    state = torch.random.get_rng_state()
    first, again = keyed_dropout(x, p, key), keyed_dropout(x, p, key)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert key == other or not torch.equal(first, keyed_dropout(x, p, other))


@given(keys, st.sampled_from([0.1, 0.3, 0.5]))
def test_dropout_keeps_a_share_of_1_minus_p_scaled_up_by_as_much(key, p):
    n = 20_000
    dropped = keyed_dropout(torch.ones(n, dtype=torch.float64), p, key)
    assert_maths(dropped.unique(), [0.0, 1 / (1 - p)])
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((dropped == 0).double().mean().item() - p) < 6 * sigma

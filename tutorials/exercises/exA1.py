"""Exercise A1: the loss of preferences. For the verdict: python tutorials/exercises/check.py A1"""

from torch import Tensor


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """-log σ(β M) of each pair; the margin M compares the policy with the reference, and chosen with rejected.

    The arguments are log-probabilities of the answers. The reference is a constant.

    Shapes: all (pairs), also the result
    """
    raise NotImplementedError

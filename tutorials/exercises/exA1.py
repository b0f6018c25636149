"""Exercise A1: the loss of preferences. For the verdict: python tutorials/exercises/check.py A1"""

from torch import Tensor


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """-log σ(β m) of each pair, where m = (log π(c) - log ref(c)) - (log π(r) - log ref(r)).

    The arguments are log π(c), log π(r), log ref(c) and log ref(r).

    Shapes: all (pairs), also the result
    """
    raise NotImplementedError

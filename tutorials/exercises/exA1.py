"""Exercise A1: how likely an answer is, and the loss of preferences. Verdict: python tutorials/exercises/check.py A1"""

from torch import Tensor


def log_prob(logits: Tensor, tokens: Tensor, first: int) -> Tensor:
    """log π of an answer after its prompt: of the tokens from the place `first` on. It can be differentiated.

    Row t of the logits is what the model says after having read the tokens 0 to t.

    Shapes: logits (T, V), tokens (T), 0 < first < T -> ()
    """
    raise NotImplementedError


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """-log σ(β M) of each pair; the margin M compares the policy with the reference, and chosen with rejected.

    The arguments are log-probabilities of the answers. The reference is a constant.

    Shapes: all (pairs), also the result
    """
    raise NotImplementedError


def dpo_per_token(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """-log σ(β M) of each pair, where M compares how much each answer has changed *per token*.

    A row is a pair, its chosen answer first. Lengths are numbers of tokens. The reference is a constant.

    Shapes: policy (pairs, 2), reference (pairs, 2), lengths (pairs, 2) -> (pairs)
    """
    raise NotImplementedError

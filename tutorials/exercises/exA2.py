"""Exercise A2: a baseline, and the loss of rewards. For the verdict: python tutorials/exercises/check.py A2"""

from torch import Tensor


def leave_one_out(rewards: Tensor) -> Tensor:
    """How much more reward each answer has than the others of its group have on average.

    Each row is a group: G ≥ 2 answers to one question.

    Shapes: rewards (questions, G) -> (questions, G)
    """
    raise NotImplementedError


def policy_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """The mean of -advantage · log π over all answers, with the advantages of `leave_one_out`.

    An advantage is a constant: rewards may depend on something that is trained, and nothing is learned through them.

    Shapes: log_probs (questions, G), rewards (questions, G) -> ()
    """
    raise NotImplementedError

"""Exercise A2: advantages, and the loss of rewards. For the verdict: python tutorials/exercises/check.py A2"""

from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """How much better each answer is than its group, in standard deviations (`std`, with G - 1) plus 1e-6.

    Each row is a group: G answers to one question.

    Shapes: rewards (questions, G) -> (questions, G)
    """
    raise NotImplementedError


def policy_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """The mean of -advantage · log π over all answers; its gradient is what counts.

    An advantage is a constant: rewards may depend on something that is trained, and nothing is learned through them.

    Shapes: log_probs (questions, G), rewards (questions, G) -> ()
    """
    raise NotImplementedError

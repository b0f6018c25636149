"""Exercise A2: the loss of rewards. For the verdict: python tutorials/exercises/check.py A2"""

from torch import Tensor


def policy_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """The mean of -advantage · log π over all answers; its gradient is what counts.

    Each row is a group: G answers to one question. The advantage of an answer is its reward minus the mean of its
    group, divided by the group's standard deviation (`std`, with G - 1) plus 1e-6. It is a constant: rewards may depend
    on something that is trained, and nothing is learned through them.

    Shapes: log_probs (questions, G), rewards (questions, G) -> ()
    """
    raise NotImplementedError

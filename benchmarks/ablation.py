"""What each trick buys: a work with everything on, with each trick off alone, and with everything plain.

A trick is a kernel, which `plain` switches off, or one of `OTHERS`, which are replaced in the process that measures.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from unittest.mock import patch

from benchmarks import ours, turns
from benchmarks import work as works
from benchmarks.process import Measurement, Round
from benchmarks.work import OURS, Ablation, Task, Training
from minilora.definition import WITH_KERNEL, plain

PLAIN = "everything plain"
HEAD_ROWS = "head rows"  # the head sees labelled rows only; off: every row is labelled, so the losses differ
OTHERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "kept memory": lambda: patch("benchmarks.ours.kept_memory", nullcontext),
    HEAD_ROWS: nullcontext,
}


def tricks(work: Training) -> list[str]:
    """Return the tricks that a work makes use of."""
    used = {HEAD_ROWS: work.kind == "real"}
    qlora, dora = work.method == "qlora", work.method == "dora"
    words = {"nf4": qlora, "quantize": qlora, "dora": dora, "delta": False}  # in the names of kernels
    found = [name for name in WITH_KERNEL if all(is_used for word, is_used in words.items() if word in name)]
    return found + [name for name in OTHERS if used.get(name, True)]


def train(task: Task) -> Measurement:
    """Train with the trick off that the task's side names, or with all of them off."""
    if task.side == HEAD_ROWS:
        return replace(ours.train(replace(task, rows=[(tokens, tokens) for tokens, _ in task.rows])), checks={})
    with ExitStack() as stack:
        if task.side not in OTHERS:
            stack.enter_context(plain() if task.side == PLAIN else plain(task.side))
        for name in tricks(task.work):
            if name in OTHERS and task.side in (name, PLAIN):
                stack.enter_context(OTHERS[name]())
        return ours.train(task)


def rounds(ablation: Ablation, shop: turns.Workshop, count: int) -> Iterator[Round]:
    """Measure every side in each round.

    Raises:
        RefusedError: a side failed, or did not compute what it does with everything on.
    """
    work = next(each for each in works.trainings() if each.name == ablation.training)
    task, sides = shop.task(work), [OURS, *tricks(work), PLAIN]
    for turn in range(count):
        yield Round(ablation.name, turns.taken(task, sides, turn))

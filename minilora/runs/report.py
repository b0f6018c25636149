"""What a run tells, written for TensorBoard while it runs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError

SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "eval_loss": "eval/loss",
}


class TensorBoard:
    """Writes each record of a run into a directory for `tensorboard --logdir`, at once, so that a crash loses none.

    Args:
        directory: where the event files go; those of earlier starts of the run stay in it.
        step: the step that the run goes on from. What an earlier start wrote of later steps is no longer shown.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, directory: Path, step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            need = "--report tensorboard needs the package tensorboard: pip install 'minilora[tensorboard]'"
            raise ConfigError(f"{need} ({error})") from error
        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def __call__(self, record: dict[str, Any]) -> None:
        """Scalars as in `SCALARS`; {"prompt", "text"} objects under "samples" as text, one page for each."""
        step = record["step"]
        for key, tag in SCALARS.items():
            if key in record:
                self.writer.add_scalar(tag, record[key], step)
        for i, sample in enumerate(record.get("samples", ()), start=1):
            self.writer.add_text(f"samples/{i}", _page(sample), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _page(sample: dict[str, str]) -> str:
    """Markdown that shows prompt and text as they are: in an indented block nothing is markup."""
    parts = (f"{name}:\n\n{textwrap.indent(sample[name], '    ', lambda line: True)}" for name in ("prompt", "text"))
    return "\n\n".join(parts)

"""Records of a run for TensorBoard, trackio or wandb, through their own libraries, which the user installs."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from minilora.options import check_types


@dataclass
class Tracker:
    """Send the numbers of each record to a library; it is an `on_step` of `train`.

    TensorBoard reads the folder `tensorboard` of the directory; it no longer shows records of steps after
    `step`, from which a run is resumed. In trackio and wandb, the run is in `project` and has the directory's name.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """

    library: Literal["tensorboard", "trackio", "wandb"]
    directory: str | Path
    config: Mapping[str, Any] | None = None
    step: int = 0
    project: str = "minilora"

    def __post_init__(self) -> None:
        check_types(self)
        path = Path(self.directory)
        if self.library == "tensorboard":
            board = import_module("torch.utils.tensorboard")
            self.run = board.SummaryWriter(str(path / "tensorboard"), purge_step=self.step + 1)
        else:
            self.run = import_module(self.library).init(project=self.project, name=path.name, config=self.config)

    def __call__(self, record: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        if self.library == "tensorboard":
            for key, value in numbers.items():
                self.run.add_scalar(key, value, record["step"])
            self.run.flush()  # a crash loses no record
        else:
            self.run.log(numbers, step=record["step"])

    def close(self) -> None:
        self.run.close() if self.library == "tensorboard" else self.run.finish()

"""Records of a run in metrics.jsonl, and in TensorBoard, trackio or wandb through their own libraries."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from minilora.files import replacing
from minilora.options import check_types
from minilora.runs.reports import read_records


@dataclass
class Tracker:
    """Write the numbers of each record; pass a tracker to `train` as `on_step`.

    "jsonl" writes `metrics.jsonl` in the directory, which `minilora plot` reads, and "tensorboard" writes the folder
    `tensorboard`. Both drop earlier records of the first record's step and of later steps, which a resumed run repeats.
    In trackio and wandb the run belongs to `project` and is called `name`, by default the name of the directory.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """

    library: Literal["jsonl", "tensorboard", "trackio", "wandb"]
    directory: str | Path
    config: Mapping[str, Any] | None = None
    project: str = "minilora"
    name: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.run: Any = None
        if self.library == "tensorboard":
            import_module("torch.utils.tensorboard")
        elif self.library != "jsonl":
            name = self.name or Path(self.directory).name
            self.run = import_module(self.library).init(project=self.project, name=name, config=self.config)

    def __call__(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        measured = {key: value for key, value in record.items() if key not in ("step", "total_steps")}
        numbers = {key: value for key, value in measured.items() if isinstance(value, int | float)}
        self.run = self.run or self._open(step)
        if self.library == "jsonl":
            finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
            with self.run.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'step': step, **finite})}\n")
        elif self.library == "tensorboard":
            for key, value in numbers.items():
                self.run.add_scalar(key, value, step)
            self.run.flush()  # a crash loses no record
        else:
            self.run.log(numbers, step=step)

    def _open(self, step: int) -> Any:
        if self.library == "tensorboard":
            board = import_module("torch.utils.tensorboard")
            return board.SummaryWriter(str(Path(self.directory) / "tensorboard"), purge_step=step)
        path = Path(self.directory) / "metrics.jsonl"
        records = read_records(path) if path.exists() else []
        lines = [f"{json.dumps(record)}\n" for record in records if record["step"] < step]
        with replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return path

    def close(self) -> None:
        if self.library == "tensorboard" and self.run:
            self.run.close()
        elif self.library in ("trackio", "wandb"):
            self.run.finish()

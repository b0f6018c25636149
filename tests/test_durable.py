"""What is written stays whole: other programs' files, other processes, numbers that JSON does not have."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from minilora.durable import MANIFEST, STAGED, append_line, holds_files, lock, publishing, settle
from minilora.errors import TrainingError

fcntl = pytest.importorskip("fcntl", reason="without it, there is no lock")


def test_temporary_files_of_other_programs_are_files_and_stay(tmp_path):
    (tmp_path / ".draft.tmp").mkdir()
    (tmp_path / ".draft.tmp" / "notes.txt").write_text("mine")
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    assert holds_files(tmp_path)
    lock(tmp_path).close()
    assert {path.name for path in tmp_path.glob(".*.tmp")} == {".draft.tmp"}
    with publishing(tmp_path / ".q.tmp") as directory:
        (directory / "config.json").write_text("{}")
    assert (tmp_path / ".q.tmp" / MANIFEST).is_file()


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "letter.txt")
    with pytest.raises(TrainingError, match=r"run: cannot be written"):
        lock(tmp_path / "run")
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_a_directory_is_settled_by_one_process_at_a_time(tmp_path):
    (tmp_path / STAGED).mkdir()
    handle = os.open(tmp_path / STAGED, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(settle, tmp_path)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        os.close(handle)
        waiting.result()
    assert not (tmp_path / STAGED).exists()


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    append_line(tmp_path / "a", {"loss": math.nan, "samples": [{"score": -math.inf}], "step": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"loss": None, "samples": [{"score": None}], "step": 1}

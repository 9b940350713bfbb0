"""The runs that a folder holds. A command that was stopped goes on; several commands may share them.

OUT/runs/METHOD_..._DIGEST.json    a finished run: all that decides it, and what it recorded
OUT/runs/METHOD_..._DIGEST.lock    held by the process that trains the run, until it ends
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from benchmarks.language.methods import Cell
from benchmarks.language.training import Record, Turn
from benchmarks.reporting import report

POLL = 1.0  # seconds


class Job(NamedTuple):
    """A run that is wanted."""

    method: str
    cell: Cell
    seed: int
    evaluations: int


class Runs:
    """Reads the runs of `folder` that have this `recipe`, and trains those that it does not hold."""

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.folder, self.recipe = folder, recipe
        folder.mkdir(parents=True, exist_ok=True)

    def complete(
        self,
        jobs: Sequence[Job],
        train: Callable[[Cell, int, int], Record],
        finished: Callable[[Job, Record], None],
    ) -> list[Record]:
        """The records of all jobs. What another process has begun is waited for."""
        found = dict[Job, Record]()
        while True:
            for job in jobs:
                if job not in found and (record := self._read_or_train(job, train)):
                    found[job] = record
                    finished(job, record)
            if len(found) == len(jobs):
                return [found[job] for job in jobs]
            time.sleep(POLL)

    def _read_or_train(self, job: Job, train: Callable[[Cell, int, int], Record]) -> Record | None:
        """None if another process has the run."""
        path = self.folder / f"{self.make_name(job)}.json"
        if record := read_record(path):
            return record
        try:
            with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
                if record := read_record(path):
                    return record
                record = train(job.cell, job.seed, job.evaluations)
                content = self.describe(job) | {"record": record._asdict()}
                content["record"]["turns"] = {
                    name: turn._asdict() for name, turn in record.turns.items()
                }
                report.write_json(path, content)
                return record
        except filelock.Timeout:
            return None

    def describe(self, job: Job) -> dict[str, Any]:
        """Everything that decides a run."""
        return {"recipe": self.recipe, **job._asdict(), "cell": job.cell._asdict()}

    def make_name(self, job: Job) -> str:
        text = json.dumps(self.describe(job), sort_keys=True)
        rate, decay, ratio = job.cell
        return (
            f"{job.method}_lr{rate:g}_wd{decay:g}_ratio{ratio:g}_seed{job.seed}_"
            f"{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        )


def read_record(path: Path) -> Record | None:
    """None if there is no file, or none that holds a run."""
    try:
        content = restore_nan(json.loads(path.read_text("utf-8"))["record"])
        turns = {name: Turn(**turn) for name, turn in content["turns"].items()}
        return Record(**{**content, "turns": turns})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore_nan(content: Any) -> Any:
    """The file has null for what is no finite number."""
    if isinstance(content, dict):
        return {key: restore_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [restore_nan(value) for value in content]
    return float("nan") if content is None else content

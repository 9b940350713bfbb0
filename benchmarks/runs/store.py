"""The folder with the runs of a table. Processes on several machines may share it.

A run is stored whole or not at all, and an interrupted run goes on from its last checkpoint.

    COLUMN/METHOD_..._seedN.json    a finished run: recipe, environment, every epoch
    unfinished/                     checkpoints of unfinished runs, by Orbax
    locks/                          one lock for every claimed run; the operating system releases it when
                                    the process that holds it ends
"""

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import orbax.checkpoint as ocp

from benchmarks.cli import to_one_line
from benchmarks.reporting import report
from benchmarks.training import recipes
from benchmarks.training.run import Run
from benchmarks.training.trainer import State

KEPT = 2  # checkpoints: the last one, and the one before it in case the last is corrupt


class Job(NamedTuple):
    """Everything that decides the result of a run."""

    column: str  # "cifar10/resnet20"
    method: str
    learning_rate: float
    b2: float | None
    weight_decay: float
    epochs: int
    batch_size: int
    images: int | None  # of the training set; None: all
    dtype: str  # of the activations
    seed: int

    @property
    def values(self) -> recipes.Hyperparameters:
        return recipes.Hyperparameters(self.learning_rate, self.b2, self.weight_decay)

    @property
    def setting(self) -> str:
        """The part of a name that all methods and seeds of a table share, beside the column."""
        images = "" if self.images is None else f"_{self.images}images"
        dtype = "" if self.dtype == "float32" else f"_{self.dtype}"
        return f"{self.epochs}epochs_batch{self.batch_size}{images}{dtype}"

    @property
    def name(self) -> str:
        b2 = "" if self.b2 is None else f"_b2-{self.b2:g}"
        return (
            f"{self.column.replace('/', '_')}/{self.method}_lr{self.learning_rate:g}{b2}"
            f"_wd{self.weight_decay:g}_{self.setting}_seed{self.seed}"
        )


class SweepError(Exception):
    """The store cannot be read or written as it should be; the message is one line."""


class Store:
    """Reads and writes the folder of a sweep; `say` prints a message."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        # Every result must have been made with these data, on this platform. Empty values allow any.
        self.data: dict[str, str] = {}  # column -> fingerprint of the data
        self.platform = ""  # "cpu" or "gpu"

    def holds(self, job: Job) -> bool:
        """Whether there is a file with a result, readable or not."""
        return (self.folder / f"{job.name}.json").exists()

    def read_result(self, job: Job) -> dict[str, Any] | None:
        """The result of a job, None if it has not finished. An invalid file is renamed to .corrupt."""
        path = self.folder / f"{job.name}.json"
        with _raise_in_one_line(path):
            try:
                found = json.loads(path.read_text("utf-8"))
                _check(found, job)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError) as error:
                aside = path.with_suffix(".corrupt")
                path.replace(aside)
                self.say(
                    f"{path}: no result of a run ({_shorten(error)}); now {aside.name}, runs again"
                )
                return None
        self.check_origin(path, job, found.get("data"), report.read_platform(found["environment"]))
        return found

    def check_origin(self, path: Path, job: Job, data: str | None, platform: str) -> None:
        """Refuses results of other images or another platform; the name of a file tells neither."""
        here = self.data.get(job.column)
        if here and data and data != here:
            raise SweepError(f"{path}: made with other data; give its --data-dir, or another --out")
        if self.platform and platform != self.platform:
            raise SweepError(
                f"{path}: made on a {platform}, and this is a {self.platform}; give another --out"
            )

    def write(self, job: Job, run: Run, wall_seconds: float, devices: int) -> None:
        if jax.process_index():
            return
        content = {
            "recipe": job._asdict(),
            "data": self.data.get(job.column),
            "run": asdict(run),
            "outcome": report.find_outcome(run),
            "wall_seconds": wall_seconds,
            "images_per_second": job.batch_size / statistics.median(run.step_time),
            "commit": _find_commit(),
            "environment": report.describe_environment() | {"devices": devices},
        }
        path = self.folder / f"{job.name}.json"
        with _raise_in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_json(path, content)

    @contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Yields whether this process may run the job, until the context ends."""
        path = self.folder / "locks" / f"{job.name}.lock"
        with _raise_in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                yield False
                return
            except NotImplementedError as error:
                raise SweepError(f"{path}: this file system has no locks") from error
        try:
            yield self.read_result(job) is None
        finally:
            lock.release()

    @contextmanager
    def open_checkpoints(self, job: Job) -> Iterator["Checkpoints"]:
        """Yields the checkpoints of a job, and deletes them unless an exception ends the context."""
        folder = self.folder / "unfinished" / job.name
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        with _raise_in_one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)
            manager = ocp.CheckpointManager(folder.absolute(), options=options)
        with manager:
            yield Checkpoints(manager, folder, self, job)
        if not jax.process_index():
            shutil.rmtree(folder, ignore_errors=True)


class Checkpoints:
    """The last states of one run."""

    def __init__(self, manager: ocp.CheckpointManager, folder: Path, store: Store, job: Job):
        self._manager, self._folder, self._store, self._job = manager, folder, store, job

    def save(self, run: Run, state: State, wall_seconds: float) -> None:
        about = {
            "run": asdict(run),
            "wall_seconds": wall_seconds,
            "data": self._store.data.get(self._job.column),
            "platform": self._store.platform,
        }
        with _raise_in_one_line(self._folder):
            self._manager.save(
                len(run.train_loss),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
                ),
            )

    def restore(self, like: State) -> tuple[Run, State, float] | None:
        for epoch in sorted(self._manager.all_steps(), reverse=True):
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore()
            )
            try:
                found: Any = self._manager.restore(epoch, args=args)
                run = Run(**found.about["run"])
            except Exception as error:  # Orbax and its readers share no narrower class
                self._store.say(
                    f"{self._folder}: checkpoint of epoch {epoch} is corrupt ({_shorten(error)})"
                )
                self._manager.delete(epoch)
                continue
            origin = found.about["data"], found.about.get("platform", "cpu")
            self._store.check_origin(self._folder, self._job, *origin)
            return run, State(*found.state), found.about["wall_seconds"]
        return None


@contextmanager
def _raise_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror or _shorten(error)}") from error


def _shorten(error: Exception) -> str:
    text = to_one_line(error)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _check(found: Any, job: Job) -> None:
    if found["recipe"] != job._asdict():
        raise ValueError("of another recipe")
    run = Run(**found["run"])
    epochs = len(run.train_loss) - run.diverged  # the last of a diverged run has no accuracies
    columns = run.train_loss[:epochs], run.validation_accuracy, run.test_accuracy
    if (not run.diverged and epochs != job.epochs) or {len(x) for x in columns} != {epochs}:
        raise ValueError("not as many epochs as there should be")
    numbers = [*run.train_loss[:epochs], *run.validation_accuracy, *run.step_time]
    numbers += [x for x in run.test_accuracy if x is not None]
    if not all(isinstance(x, int | float) for x in numbers):
        raise TypeError("not a number")


def _find_commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None without a checkout.

    For a copy of the files without their history, the variable COMMIT names the commit.
    """
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    command += ["--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

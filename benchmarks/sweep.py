"""Runs that are stored whole or not at all, go on where they were interrupted, and are shared.

Everything is in one folder, which any number of processes, on any number of machines, may work on,
each at runs of its own. The processes of `jax.distributed` work at one run together: process 0
decides, writes and announces; the others follow.

    COLUMN/METHOD_..._seedN.json    a finished run: recipe, environment, every epoch
    unfinished/                     checkpoints of the others, by Orbax
    locks/                          who is at what; the operating system releases a lock with its owner
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from benchmarks import protocol, report
from benchmarks.cli import one_line
from benchmarks.loop import Run, State, Trainer

POLL = 2.0  # seconds
ANNOUNCEMENT = 1024  # bytes, enough for any job
KEPT = 2  # the last checkpoint, and one before it


class Job(NamedTuple):
    """Everything that decides what a run gives."""

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
    def values(self) -> protocol.Hyperparameters:
        return protocol.Hyperparameters(self.learning_rate, self.b2, self.weight_decay)

    @property
    def setting(self) -> str:
        """What all methods and seeds of a table have in common, beside the column."""
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
    """Something that the run cannot go on with; the message is one line."""


class Store:
    """The folder of a sweep."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        # What is at hand, which every result must have been made with. Empty where nothing is trained.
        self.data: dict[str, str] = {}  # column -> fingerprint of the data
        self.platform = ""  # "cpu" or "gpu"

    def holds(self, job: Job) -> bool:
        """Whether there is a result, readable or not."""
        return (self.folder / f"{job.name}.json").exists()

    def result(self, job: Job) -> dict[str, Any] | None:
        """What the job gave, None if it has not finished. What is no result of it is put aside."""
        path = self.folder / f"{job.name}.json"
        with _one_line(path):
            try:
                found = json.loads(path.read_text("utf-8"))
                _check(found, job)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError) as error:
                aside = path.with_suffix(".corrupt")
                path.replace(aside)
                self.say(
                    f"{path}: no result of a run ({_line(error)}); now {aside.name}, runs again"
                )
                return None
        self.check_origin(path, job, found.get("data"), report.platform(found["environment"]))
        return found

    def check_origin(self, path: Path, job: Job, data: str | None, platform: str) -> None:
        """A name tells neither images nor platform: no table may mix those of several."""
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
            "outcome": report.outcome(run),
            "wall_seconds": wall_seconds,
            "images_per_second": job.batch_size / statistics.median(run.step_time),
            "commit": _commit(),
            "environment": report.environment() | {"devices": devices},
        }
        path = self.folder / f"{job.name}.json"
        with _one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_json(path, content)

    @contextmanager
    def claimed(self, job: Job) -> Iterator[bool]:
        """Whether the job is ours to run, for as long as the context lasts."""
        path = self.folder / "locks" / f"{job.name}.lock"
        with _one_line(path):
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
            yield self.result(job) is None
        finally:
            lock.release()

    @contextmanager
    def checkpoints(self, job: Job) -> Iterator["Checkpoints"]:
        """Those of a job; gone when the context is left without an exception."""
        folder = self.folder / "unfinished" / job.name
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        with _one_line(folder):
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
        with _one_line(self._folder):
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
                    f"{self._folder}: checkpoint of epoch {epoch} is corrupt ({_line(error)})"
                )
                self._manager.delete(epoch)
                continue
            origin = found.about["data"], found.about.get("platform", "cpu")
            self._store.check_origin(self._folder, self._job, *origin)
            return run, State(*found.state), found.about["wall_seconds"]
        return None


def execute(
    job: Job, trainer: Trainer, store: Store, save_every: float, show: Callable[[Run], None]
) -> Run:
    """Runs a job that has been claimed, from its last checkpoint, and stores what it gives."""
    with store.checkpoints(job) as checkpoints:
        restored = checkpoints.restore(trainer.shapes())
        if restored:
            store.say(f"{job.name}: goes on after epoch {len(restored[0].train_loss)}")
        resume, before = (restored[:2], restored[2]) if restored else (None, 0.0)
        start = saved = time.perf_counter()

        def on_epoch(run: Run, state: State) -> None:
            nonlocal saved
            show(run)
            now = time.perf_counter()
            if _of_process_0(now - saved >= save_every) and len(run.train_loss) < job.epochs:
                checkpoints.save(run, state, before + now - start)
                saved = time.perf_counter()

        test = "never" if job.seed == protocol.GRID_SEED else "every"
        hyperparams = protocol.injected(job.values)
        run = trainer.run(job.seed, job.epochs, on_epoch, resume, test, hyperparams)
        seconds = before + time.perf_counter() - start
        store.write(job, run, seconds, trainer.sharded.mesh.size)
    return run


class Deadline:
    """When a command should have ended. No run is begun that would last longer.

    What is compiled first is not counted: it is done once, and no measure of the next run.
    """

    def __init__(self, seconds: float):
        self._until, self._longest = time.monotonic() + seconds, 0.0

    def ran(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    def leaves_time(self) -> bool:
        """For a run that takes as long as the longest so far."""
        return time.monotonic() + self._longest < self._until


def work(
    jobs: Sequence[Job],
    store: Store,
    trainer: Callable[[Job], Trainer],
    save_every: float,
    show: Callable[[Job, Run], None],
    finished: Callable[[Job, Run], None],
    *,
    wait: bool = False,
    deadline: "Deadline | None" = None,
) -> bool:
    """Does what is neither finished nor claimed by another process.

    With `wait`, returns when all is finished: what another process leaves unfinished is taken over.
    Returns whether the deadline left time for all.
    """
    deadline = deadline or Deadline(math.inf)
    waited_for = 0
    while True:
        for job in jobs:
            if store.result(job) is not None:
                continue
            if not deadline.leaves_time():
                store.say("time is up: the same command goes on")
                return False
            with store.claimed(job) as ours:
                if ours:
                    announce(job)
                    made = trainer(job)
                    made.compile()
                    began = time.monotonic()
                    run = execute(job, made, store, save_every, lambda run, job=job: show(job, run))
                    finished(job, run)
                    deadline.ran(time.monotonic() - began)
        left = sum(store.result(job) is None for job in jobs)
        if not left or not wait:
            return True
        if left != waited_for:
            store.say(f"waiting for {left} runs that other processes have")
        waited_for = left
        time.sleep(POLL)


def follow(store: Store, trainer: Callable[[Job], Trainer], save_every: float) -> None:
    """What the other processes of `jax.distributed` do while process 0 is at `work`."""
    while (job := announce(None)) is not None:
        execute(job, trainer(job), store, save_every, lambda run: None)


def announce(job: Job | None) -> Job | None:
    """The job of process 0, on every process; None: there is no more."""
    text = np.frombuffer(json.dumps(job).encode(), np.uint8)
    padded = np.pad(text, (0, ANNOUNCEMENT - len(text)))
    found = json.loads(bytes(_of_process_0(padded)).rstrip(b"\0"))
    return Job(*found) if found else None


def _of_process_0(value: Any) -> Any:
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror or _line(error)}") from error


def _line(error: Exception) -> str:
    text = one_line(error)
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


def _commit() -> str | None:
    """Of the checkout that this is, if it is one; "+" for what is not committed.

    A copy of the files without their history is given its commit in the variable COMMIT.
    """
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    command += ["--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

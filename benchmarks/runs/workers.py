"""Runs the jobs of a store. Other processes may do so at the same time.

Independent processes claim different jobs. The processes of `jax.distributed` share one job: process 0
decides, writes and announces; the others follow."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from benchmarks.runs.store import Job, Store
from benchmarks.training import recipes
from benchmarks.training.run import Run
from benchmarks.training.trainer import State, Trainer

POLL = 2.0  # seconds
ANNOUNCEMENT = 1024  # bytes, enough for any job


def execute(
    job: Job, trainer: Trainer, store: Store, save_every: float, show: Callable[[Run], None]
) -> Run:
    """Runs a claimed job from its last checkpoint, and stores the result."""
    with store.open_checkpoints(job) as checkpoints:
        restored = checkpoints.restore(trainer.get_shapes())
        if restored:
            store.say(f"{job.name}: goes on after epoch {len(restored[0].train_loss)}")
        resume, before = (restored[:2], restored[2]) if restored else (None, 0.0)
        start = saved = time.perf_counter()

        def on_epoch(run: Run, state: State) -> None:
            nonlocal saved
            show(run)
            now = time.perf_counter()
            if _take_from_process_0(now - saved >= save_every) and len(run.train_loss) < job.epochs:
                checkpoints.save(run, state, before + now - start)
                saved = time.perf_counter()

        test = "never" if job.seed == recipes.GRID_SEED else "every"
        hyperparams = recipes.select_injected(job.values)
        run = trainer.run(job.seed, job.epochs, on_epoch, resume, test, hyperparams)
        seconds = before + time.perf_counter() - start
        store.write(job, run, seconds, trainer.sharded.mesh.size)
    return run


class Deadline:
    """The time when a command should have ended. No run begins that would last longer.

    Compilation does not count: it happens once, and says nothing about the time of the next run.
    """

    def __init__(self, seconds: float):
        self._until, self._longest = time.monotonic() + seconds, 0.0

    def note_run(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    def leaves_time(self) -> bool:
        """Whether a run may begin that takes as long as the longest run so far."""
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
    """Runs the jobs that are neither finished nor claimed by another process.

    With `wait` it returns when all jobs are finished, and takes over jobs that other processes give up.
    Returns whether the deadline left time for all jobs.
    """
    deadline = deadline or Deadline(math.inf)
    waited_for = 0
    while True:
        for job in jobs:
            if store.read_result(job) is not None:
                continue
            if not deadline.leaves_time():
                store.say("time is up: the same command goes on")
                return False
            with store.claim(job) as ours:
                if ours:
                    announce(job)
                    made = trainer(job)
                    made.compile()
                    began = time.monotonic()
                    run = execute(job, made, store, save_every, lambda run, job=job: show(job, run))
                    finished(job, run)
                    deadline.note_run(time.monotonic() - began)
        left = sum(store.read_result(job) is None for job in jobs)
        if not left or not wait:
            return True
        if left != waited_for:
            store.say(f"waiting for {left} runs that other processes have")
        waited_for = left
        time.sleep(POLL)


def follow(store: Store, trainer: Callable[[Job], Trainer], save_every: float) -> None:
    """Runs the jobs that process 0 of `jax.distributed` announces from `work`."""
    while (job := announce(None)) is not None:
        execute(job, trainer(job), store, save_every, lambda run: None)


def announce(job: Job | None) -> Job | None:
    """Returns the job of process 0 on every process; None means that there are no more jobs."""
    text = np.frombuffer(json.dumps(job).encode(), np.uint8)
    padded = np.pad(text, (0, ANNOUNCEMENT - len(text)))
    found = json.loads(bytes(_take_from_process_0(padded)).rstrip(b"\0"))
    return Job(*found) if found else None


def _take_from_process_0(value: Any) -> Any:
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)

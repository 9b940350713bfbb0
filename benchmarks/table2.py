"""Table 2 and Figure 3 of the paper, by one command that can be interrupted and shared.

    python -m benchmarks.table2 --columns cifar10/resnet20 --seeds 5 --epochs 30 --data-dir DIR --out OUT

Trains the runs that OUT does not hold, goes on from the last checkpoint of interrupted runs, and prints
the table. Several processes or machines may share OUT.
"""

import argparse
import functools
import logging
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console

from benchmarks.cli import Parser, add_dtype, at_least, to_one_line
from benchmarks.reporting import comparison, figures, report
from benchmarks.reporting.progress import Overall
from benchmarks.runs.plan import Setting, Sweep
from benchmarks.runs.store import Job, Store, SweepError
from benchmarks.runs.workers import Deadline, announce, follow, work
from benchmarks.training import recipes
from benchmarks.training.build import make_trainer
from benchmarks.training.data import (
    DataError,
    Dataset,
    Split,
    compute_fingerprint,
    load,
    make_random_images,
)
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.models import ImageSizeError
from benchmarks.training.run import Run
from benchmarks.training.trainer import Trainer, count_steps

SAVE_EVERY = 60.0  # seconds
WARM_EPOCHS = 3
TRY_AGAIN = 75  # exit status when the time was up: EX_TEMPFAIL of sysexits.h


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.table2", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--columns", nargs="+", required=True, choices=recipes.COLUMNS)
    choices = [*recipes.PAPER_METHODS, *recipes.SINCE_THE_PAPER]
    add(
        "--methods",
        nargs="+",
        default=recipes.PAPER_METHODS,
        choices=choices,
        help="default: the paper's",
    )
    add("--seeds", type=at_least(int, 1), default=5, help="how many; they are 0, 1, ...")
    add("--epochs", type=at_least(int, 1), help="default: the column's; scales the milestones")
    add("--images", type=at_least(int, 1), help="training images; default: the column's")
    add("--batch-size", type=at_least(int, 1), default=recipes.BATCH_SIZE)
    add_dtype(parser)
    add("--data-dir", type=Path, help="holds NAME.npz or a TFDS folder; default: TFDS downloads")
    add("--out", type=Path, required=True, help="folder of the results; may be shared")
    help_text = "first choose learning rate and weight decay on the validation images"
    add("--grid", action="store_true", help=help_text)
    help_text = "of the grid, as multiples of the published one"
    add("--rates", nargs="+", type=at_least(float, 0.0), default=recipes.GRID_RATES, help=help_text)
    help_text = "of the grid, as L2 coefficients"
    add(
        "--decays",
        nargs="+",
        type=at_least(float, 0.0),
        default=recipes.GRID_DECAYS,
        help=help_text,
    )
    help_text = "that share every batch; default: all"
    add("--devices", type=at_least(int, 1), help=help_text)
    help_text = "work at each run together, by jax.distributed; without values: as the cluster says"
    add("--distributed", nargs="*", metavar="COORDINATOR:PORT PROCESSES PROCESS", help=help_text)
    help_text = "seconds between checkpoints"
    add("--save-every", type=at_least(float, 0.0), default=SAVE_EVERY, help=help_text)
    help_text = (
        "seconds after which this command should have ended: no run begins that would last longer"
    )
    add("--stop-after", type=at_least(float, 0.0), default=math.inf, help=help_text)
    help_text = (
        "only compile, on random images, and write how many images a second each method trains"
    )
    add("--warm", type=Path, metavar="FILE.json", help=help_text)
    help_text = "that --warm measures; 0: it compiles and measures nothing"
    add("--warm-epochs", type=at_least(int, 0), default=WARM_EPOCHS, help=help_text)
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, after those that training would stumble over later have ended the command."""
    args = parser.parse_args(argv)
    for name in ("columns", "methods"):  # each once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    parser.require_writable(args.out, args.out)
    if args.distributed is not None:
        join(parser, args.distributed)
    check_devices(parser, args)
    if args.seeds > recipes.GRID_SEED:
        parser.error(f"--seeds {args.seeds}: at most {recipes.GRID_SEED}, the seed of the grid")
    return args


def make_setting(args: argparse.Namespace) -> Setting:
    return Setting(**{name: getattr(args, name) for name in Setting._fields})


class Runner:
    """Trains the jobs of a sweep and shows how far they are."""

    def __init__(self, args: argparse.Namespace, store: Store, console: Console):
        self.args, self.store, self.console = args, store, console
        self.deadline = Deadline(args.stop_after)

    def get_trainer(self, job: Job) -> Trainer:
        args = self.args
        return get_trainer(job, args.data_dir, args.devices, random=args.warm is not None)

    def run(self, jobs: Sequence[Job], *, wait: bool = False) -> bool:
        """Returns whether there was time for all jobs."""
        missing = [job for job in jobs if self.store.read_result(job) is None]
        if missing:
            self.store.say(f"{len(jobs) - len(missing)} runs are there, {len(missing)} to be done")

        def count_done() -> int:
            """Epochs of finished runs, those of other processes included."""
            return sum(job.epochs for job in jobs if self.store.holds(job))

        overall = Overall(self.console, sum(job.epochs for job in jobs), count_done())

        def show(job: Job, run: Run) -> None:
            epoch, text = len(run.train_loss), f"loss {run.train_loss[-1]:.4f}"
            overall.update(describe_job(job), text, epoch, job.epochs, count_done() + epoch)

        def finish(job: Job, run: Run) -> None:
            overall.report_finished(f"{describe_job(job)}: {describe_run(job, run)}", count_done())

        with overall.bars:
            return work(
                missing,
                self.store,
                trainer=self.get_trainer,
                save_every=self.args.save_every,
                show=show,
                finished=finish,
                wait=wait,
                deadline=self.deadline,
            )


def describe_job(job: Job) -> str:
    return (
        f"{job.column}, {OPTIMIZERS[job.method].label}, rate {job.learning_rate:g}, "
        f"decay {job.weight_decay:g}, seed {job.seed}"
    )


def describe_run(job: Job, run: Run) -> str:
    accuracies = "diverged"
    if run.best_epoch is not None:
        accuracies = f"validation {run.validation_accuracy[run.best_epoch]:.2f} %"
    if run.selected_test_accuracy is not None:
        accuracies += f", test {run.selected_test_accuracy:.2f} %"
    speed = job.batch_size / statistics.median(run.step_time)
    return f"loss {run.train_loss[-1]:.4f}, {accuracies}, {speed:,.0f} images/s"


@functools.lru_cache(maxsize=1)
def load_training_data(
    dataset: str, data_dir: Path | None, images: int | None, random: bool = False
) -> Dataset:
    data = make_random_images(dataset) if random else load(dataset, data_dir)
    if images and images > len(data.train.labels):
        raise DataError(f"{dataset}: {len(data.train.labels)} training images, not {images}")
    return data._replace(train=Split(*(array[:images] for array in data.train)))


def get_trainer(
    job: Job, data_dir: Path | None, devices: int | None, random: bool = False
) -> Trainer:
    """A trainer that is compiled once for all seeds, learning rates and decays of a method.

    The first `devices` share its batches; by default, all devices of all processes do.
    """
    any_value = dict.fromkeys(recipes.select_injected(job.values), 1.0)
    return _make_trainer(job._replace(seed=0, **any_value), data_dir, devices, random)


@functools.lru_cache(maxsize=len(OPTIMIZERS))  # the methods take turns
def _make_trainer(job: Job, data_dir: Path | None, devices: int | None, random: bool) -> Trainer:
    dataset, name, *_ = recipes.COLUMNS[job.column]
    return make_trainer(
        load_training_data(dataset, data_dir, job.images, random),
        name,
        job.method,
        job.values,
        job.epochs,
        job.batch_size,
        job.dtype,
        devices=jax.devices()[:devices],
    )


def warm_up(sweep: Sweep, runner: Runner, column: str) -> dict[str, dict[str, Any]]:
    """Compiles what the runs of a column need, and times epochs of every method.

    The images are random: a compiled program depends only on their number, so this fills the
    compilation cache for the real ones.
    """
    jobs = sweep.list_grid_jobs(column) if sweep.setting.grid else sweep.list_jobs(column)
    rows = {}
    for method, job in {job.method: job for job in reversed(jobs)}.items():
        trainer = runner.get_trainer(job)
        times = trainer.time_epochs(runner.args.warm_epochs)
        images = trainer.steps * trainer.batch_size
        seconds = statistics.median(end - start for start, end in times) if times else None
        speed = images / seconds if seconds else None
        rows[method] = {"images": images, "images_per_second": speed, "epochs": times}
        outcome = f"{speed:,.0f} images/s" if speed else "compiled"
        print(f"{column}, {method}: {outcome}", flush=True)
    return rows


def join(parser: Parser, words: Sequence[str]) -> None:
    """Becomes one of the processes of `jax.distributed`."""
    if len(words) not in (0, 3):
        parser.error("--distributed: no values, or COORDINATOR:PORT PROCESSES PROCESS")
    try:
        if words:
            print(f"joining {words[1]} processes at {words[0]}", file=sys.stderr, flush=True)
            jax.distributed.initialize(words[0], int(words[1]), int(words[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        parser.error(f"--distributed: {to_one_line(error)}")


def leave(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    if jax.process_count() > 1:  # the others wait for this process: only its end frees them
        os._exit(status)
    raise SystemExit(status)


def check_data(column: str, args: argparse.Namespace) -> str:
    """Returns the data's fingerprint; raises the DataError that training would raise hours later."""
    about = recipes.COLUMNS[column]
    data = load_training_data(about.dataset, args.data_dir, args.images or about.images)
    count_steps(data, args.batch_size)
    return compute_fingerprint(data)


def check_devices(parser: Parser, args: argparse.Namespace) -> None:
    found = jax.device_count()
    if args.devices and jax.process_count() > 1:
        parser.error("--devices: with --distributed, all devices share the work")
    if args.devices and args.devices > found:
        parser.error(f"--devices {args.devices}: there are {found}")
    if args.batch_size % (args.devices or found):
        parser.error(
            f"--batch-size {args.batch_size}: no multiple of {args.devices or found} devices"
        )


def train(
    sweep: Sweep, runner: Runner, columns: Sequence[str]
) -> tuple[dict[str, list[Job]], bool]:
    """The jobs of every column, and whether there was time for all; no jobs if the grid had no time."""
    store = sweep.store
    store.platform = jax.default_backend()
    for column in columns:  # all columns, before hours of training
        store.data[column] = check_data(column, runner.args)
    if sweep.setting.grid:
        grid_jobs = [job for column in columns for job in sweep.list_grid_jobs(column)]
        # Waits for the cells of other processes, because the best of all cells decides what comes next.
        if not runner.run(grid_jobs, wait=True):
            return {}, False
    jobs = {column: sweep.list_jobs(column) for column in columns}
    in_time = runner.run([job for column in jobs.values() for job in column])
    announce(None)
    return jobs, in_time


def print_table(sweep: Sweep, jobs: dict[str, list[Job]], in_time: bool) -> None:
    """Prints the table of all finished runs and draws a figure for every column."""
    console, store = Console(), sweep.store
    results = {column: comparison.collect_results(store, of) for column, of in jobs.items()}
    grid = sweep.setting.grid
    source = (
        "by the grid, on the validation images" if grid else "as in benchmarks/training/recipes.py"
    )
    console.print(f"Learning rates and weight decays {source}")
    console.print("Test accuracy in per cent, mean ± std (seeds); the paper: 5 seeds, 405 epochs")
    if any("svhn" in column for column in jobs):
        console.print("(the paper's SVHN: validation accuracy)")
    console.print(comparison.make_table(results))
    unfinished = sum(store.read_result(job) is None for of in jobs.values() for job in of)
    if unfinished:
        why = "other processes have them" if in_time else "the time was up"
        console.print(f"{unfinished} runs are not finished: {why}")
    for column, rows in results.items():
        if rows:
            path = comparison.locate_figure(store.folder, jobs[column][0])
            figures.draw_training_loss_twice(rows, column, path)
            console.print(f"Wrote {path}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_parser(), argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Store says in one line what Orbax warns of
    messages = Console(stderr=True)
    store = Store(args.out, lambda line: messages.print(line, highlight=False, soft_wrap=True))
    sweep, runner = Sweep(make_setting(args), store), Runner(args, store, messages)
    try:
        if jax.process_index():
            follow(store, runner.get_trainer, args.save_every)
            return 0
        if args.warm:
            speeds = {column: warm_up(sweep, runner, column) for column in args.columns}
            about = {"environment": report.describe_environment(), "columns": speeds}
            report.write_json(args.warm, about)
            return 0
        jobs, in_time = train(sweep, runner, args.columns)
    except (DataError, ImageSizeError, SweepError) as error:
        leave(2, f"error: {error}")
    except KeyboardInterrupt:
        leave(130, "interrupted: the same command goes on from the last checkpoints")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        leave(1, f"error: another process is lost ({to_one_line(error)[:200]})")
    if jobs:
        print_table(sweep, jobs, in_time)
    return 0 if in_time else TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())

"""Table 2 and Figure 3 of the paper, by one command that can be interrupted and shared.

    python -m benchmarks.table2 --columns cifar10/resnet20 --seeds 5 --epochs 30 --data-dir DIR --out OUT

Trains what is missing in OUT, skips what is there, goes on from the last checkpoint of what was
interrupted, and prints the table. Several processes or machines may share OUT.
"""

import functools
import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.cli import Parser, add_dtype, at_least, to_one_line
from benchmarks.reporting import figures, report
from benchmarks.reporting.progress import Overall
from benchmarks.reporting.published import TABLE2
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
from benchmarks.training.trainer import Run, Trainer, count_steps

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


class Sweep:
    """The jobs of a command line, and what they have given so far."""

    def __init__(self, args: Any, store: Store, console: Console):
        self.args, self.store, self.console = args, store, console
        self.deadline = Deadline(args.stop_after)

    def trainer(self, job: Job) -> Trainer:
        args = self.args
        return get_trainer(job, args.data_dir, args.devices, random=args.warm is not None)

    def list_jobs(self, column: str) -> list[Job]:
        """Every method's first seed, then every method's second: an interrupted table has all rows."""
        chosen = self.choose(column)
        return [
            self._make_job(column, method, chosen[method], seed)
            for seed in range(self.args.seeds)
            for method in self.args.methods
        ]

    def list_grid_jobs(self, column: str) -> list[Job]:
        return [
            self._make_job(column, method, values, recipes.GRID_SEED)
            for method in self.args.methods
            for values in recipes.list_grid(method, rates=self.args.rates, decays=self.args.decays)
        ]

    def choose(self, column: str) -> dict[str, recipes.Hyperparameters]:
        """By the grid, all of which has been run, or those of benchmarks/training/recipes.py."""
        dataset, model, *_ = recipes.COLUMNS[column]
        if not self.args.grid:
            return {
                method: recipes.get_hyperparameters(dataset, model, method)
                for method in self.args.methods
            }
        found = {}
        results = {job: self.store.read_result(job) for job in self.list_grid_jobs(column)}
        for method in self.args.methods:
            cells = [job for job, result in results.items() if result and job.method == method]
            best = max(cells, key=lambda job: rank(results[job]))
            found[method] = recipes.Hyperparameters(best.learning_rate, best.b2, best.weight_decay)
        return found

    def _make_job(
        self, column: str, method: str, values: recipes.Hyperparameters, seed: int
    ) -> Job:
        args, about = self.args, recipes.COLUMNS[column]
        epochs, images = args.epochs or about.epochs, args.images or about.images
        return Job(column, method, *values, epochs, args.batch_size, images, args.dtype, seed)

    def run(self, jobs: Sequence[Job], *, wait: bool = False) -> bool:
        """Whether there was time for all of them."""
        missing = [job for job in jobs if self.store.read_result(job) is None]

        def done() -> int:  # also by other processes
            return sum(job.epochs for job in jobs if self.store.holds(job))

        overall = Overall(self.console, sum(job.epochs for job in jobs), done())

        def show(job: Job, run: Run) -> None:
            epoch, text = len(run.train_loss), f"loss {run.train_loss[-1]:.4f}"
            overall.update(_describe(job), text, epoch, job.epochs, done() + epoch)

        def finished(job: Job, run: Run) -> None:
            accuracies = "diverged"
            if run.best_epoch is not None:
                accuracies = f"validation {run.validation_accuracy[run.best_epoch]:.2f} %"
            if run.selected_test_accuracy is not None:
                accuracies += f", test {run.selected_test_accuracy:.2f} %"
            speed = job.batch_size / statistics.median(run.step_time)
            overall.report_finished(
                f"{_describe(job)}: loss {run.train_loss[-1]:.4f}, {accuracies}, {speed:,.0f} images/s",
                done(),
            )

        if missing:
            self.store.say(f"{len(jobs) - len(missing)} runs are there, {len(missing)} to be done")
        with overall.bars:
            return work(
                missing,
                self.store,
                trainer=self.trainer,
                save_every=self.args.save_every,
                show=show,
                finished=finished,
                wait=wait,
                deadline=self.deadline,
            )


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
    """Compiled once for all seeds, learning rates and decays of a method.

    Its batches are shared by the first `devices`; by default, by all of all processes.
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


def warm_up(sweep: Sweep, column: str) -> dict[str, dict[str, Any]]:
    """Compiles what the runs need, and times epochs of every method.

    A program knows of the images only how many there are: random ones fill the compilation cache too.
    """
    jobs = sweep.list_grid_jobs(column) if sweep.args.grid else sweep.list_jobs(column)
    found = {}
    for method, job in {job.method: job for job in reversed(jobs)}.items():
        made = sweep.trainer(job)
        times = made.time_epochs(sweep.args.warm_epochs)
        images = made.steps * made.batch_size
        seconds = statistics.median(end - start for start, end in times) if times else None
        speed = images / seconds if seconds else None
        found[method] = {"images": images, "images_per_second": speed, "epochs": times}
        print(
            f"{column}, {method}: " + (f"{speed:,.0f} images/s" if speed else "compiled"),
            flush=True,
        )
    return found


def _describe(job: Job) -> str:
    return (
        f"{job.column}, {OPTIMIZERS[job.method].label}, rate {job.learning_rate:g}, "
        f"decay {job.weight_decay:g}, seed {job.seed}"
    )


def rank(result: dict[str, Any] | None) -> tuple[float, float]:
    assert result is not None
    run = Run(**result["run"])
    if run.diverged:
        return -1.0, 0.0
    return max(run.validation_accuracy), -run.train_loss[-1]


def collect_results(store: Store, jobs: Sequence[Job]) -> list[report.Result]:
    """One row per method, of the jobs that have finished."""
    rows: dict[str, list[tuple[Job, Run]]] = {}
    for job in jobs:
        found = store.read_result(job)
        if found:
            rows.setdefault(job.method, []).append((job, Run(**found["run"])))
    return [
        report.Result(
            name, OPTIMIZERS[name].label, row[0][0].learning_rate, 0.0, [r for _, r in row]
        )
        for name, row in rows.items()
    ]


def make_table(columns: Mapping[str, Sequence[report.Result]]) -> Table:
    """Ours beside the paper's: mean and standard deviation of the test accuracy, and how many seeds."""
    made = Table()
    made.add_column("method", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
        made.add_column("paper", justify="right", no_wrap=True)
    found = {row.name for rows in columns.values() for row in rows}
    for method in (name for name in OPTIMIZERS if name in found):
        cells = []
        for column, rows in columns.items():
            ours = next((row for row in rows if row.name == method), None)
            cells += [format_cell(ours), format_published(column, method)]
        made.add_row(OPTIMIZERS[method].label, *cells)
    return made


def locate_figure(folder: Path, job: Job) -> Path:
    return folder / f"{job.column.replace('/', '_')}_{job.setting}_training_loss.png"


def format_cell(result: report.Result | None) -> str:
    if result is None:
        return "-"
    found = result.test_accuracies
    lost = sum(run.diverged for run in result.runs)
    text = report.format_mean_std(found, 2) + (f" ({len(found)})" if found else "")
    return f"{text}, {lost} diverged" if lost else text


def format_published(column: str, method: str) -> str:
    return "{:.2f} ± {:.2f}".format(*found) if (found := TABLE2.get((column, method))) else "-"


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


def check(column: str, args: Any) -> str:
    """The fingerprint of the data; raises DataError for what training would find out later."""
    about = recipes.COLUMNS[column]
    data = load_training_data(about.dataset, args.data_dir, args.images or about.images)
    count_steps(data, args.batch_size)
    return compute_fingerprint(data)


def check_devices(parser: Parser, args: Any) -> None:
    found = jax.device_count()
    if args.devices and jax.process_count() > 1:
        parser.error("--devices: with --distributed, all devices share the work")
    if args.devices and args.devices > found:
        parser.error(f"--devices {args.devices}: there are {found}")
    if args.batch_size % (args.devices or found):
        parser.error(
            f"--batch-size {args.batch_size}: no multiple of {args.devices or found} devices"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("columns", "methods"):  # each once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    parser.require_writable(args.out, args.out)
    if args.distributed is not None:
        join(parser, args.distributed)
    check_devices(parser, args)
    if args.seeds > recipes.GRID_SEED:
        parser.error(f"--seeds {args.seeds}: at most {recipes.GRID_SEED}, the seed of the grid")
    logging.getLogger("absl").setLevel(logging.ERROR)  # what Orbax warns of is said in one line
    console, messages = Console(), Console(stderr=True)
    store = Store(args.out, lambda line: messages.print(line, highlight=False, soft_wrap=True))
    sweep = Sweep(args, store, messages)
    try:
        if jax.process_index():
            follow(store, sweep.trainer, args.save_every)
            return 0
        if args.warm:
            speeds = {column: warm_up(sweep, column) for column in args.columns}
            about = {"environment": report.describe_environment(), "columns": speeds}
            report.write_json(args.warm, about)
            return 0
        store.platform = jax.default_backend()
        for column in args.columns:  # all of them, before hours of training
            store.data[column] = check(column, args)
        if args.grid:
            # All of it: what the table trains depends on it.
            grid_jobs = [job for column in args.columns for job in sweep.list_grid_jobs(column)]
            if not sweep.run(grid_jobs, wait=True):
                return TRY_AGAIN
        jobs = {column: sweep.list_jobs(column) for column in args.columns}
        in_time = sweep.run([job for column in jobs.values() for job in column])
        announce(None)
    except (DataError, ImageSizeError, SweepError) as error:
        leave(2, f"error: {error}")
    except KeyboardInterrupt:
        leave(130, "interrupted: the same command goes on from the last checkpoints")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        leave(1, f"error: another process is lost ({to_one_line(error)[:200]})")
    found = {column: collect_results(store, of) for column, of in jobs.items()}
    source = (
        "by the grid, on the validation images"
        if args.grid
        else "as in benchmarks/training/recipes.py"
    )
    console.print(f"Learning rates and weight decays {source}")
    console.print("Test accuracy in per cent, mean ± std (seeds); the paper: 5 seeds, 405 epochs")
    if any("svhn" in column for column in args.columns):
        console.print("(the paper's SVHN: validation accuracy)")
    console.print(make_table(found))
    unfinished = sum(store.read_result(job) is None for of in jobs.values() for job in of)
    if unfinished:
        why = "other processes have them" if in_time else "the time was up"
        console.print(f"{unfinished} runs are not finished: {why}")
    for column, rows in found.items():
        if rows:
            path = locate_figure(args.out, jobs[column][0])
            figures.draw_training_loss_twice(rows, column, path)
            console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0 if in_time else TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())

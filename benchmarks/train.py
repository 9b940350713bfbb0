"""Trains one model with one optimizer over several seeds, by default with the paper's recipe.

    python -m benchmarks.train --dataset cifar10 --data-dir DIR --model resnet20 \\
        --optimizer adamsrt --epochs 405 --seeds 5 --out OUT
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cli import Parser, add_dtype, at_least
from benchmarks.reporting import report
from benchmarks.reporting.progress import show_progress
from benchmarks.training import recipes
from benchmarks.training.build import make_trainer
from benchmarks.training.data import SOURCES, DataError, load
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.models import MODELS, ImageSizeError
from benchmarks.training.run import Run
from benchmarks.training.trainer import Trainer


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.train", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=SOURCES)
    add("--data-dir", type=Path, help="holds NAME.npz or a TFDS folder; default: TFDS downloads")
    add("--model", required=True, choices=MODELS)
    add("--optimizer", required=True, choices=OPTIMIZERS)
    add("--epochs", type=at_least(int, 1), default=recipes.EPOCHS)
    add("--seeds", type=at_least(int, 1), default=5, help="how many; they are 0, 1, ...")
    add("--out", type=Path, required=True, help="folder for the JSON file")
    add("--limit", type=at_least(int, 1), help="use only the first training images")
    add("--batch-size", type=at_least(int, 1), default=recipes.BATCH_SIZE)
    add_dtype(parser)
    for name, below in (("--learning-rate", math.inf), ("--weight-decay", math.inf), ("--b2", 1.0)):
        add(name, type=at_least(float, 0.0, below), help="default: the paper's")
    return parser


def train_seeds(trainer: Trainer, seeds: int, epochs: int) -> list[Run]:
    with show_progress(seeds * epochs) as advance:

        def show(run: Run, _: Any) -> None:
            advance(
                f"seed {run.seed}, epoch {len(run.train_loss)}: loss {run.train_loss[-1]:.4f}, "
                f"validation {run.validation_accuracy[-1]:.2f} %"
            )

        return [trainer.run(seed, epochs, show) for seed in range(seeds)]


def describe(run: Run) -> str:
    if run.diverged:
        return f"seed {run.seed}: diverged in epoch {len(run.train_loss)} (the loss is not finite)"
    assert run.best_epoch is not None
    return (
        f"seed {run.seed}: test {run.selected_test_accuracy:.2f} %, "
        f"best validation {run.validation_accuracy[run.best_epoch]:.2f} % in epoch "
        f"{run.best_epoch + 1}, train loss {run.train_loss[-1]:.4f}, "
        f"{1e3 * statistics.median(run.step_time):.1f} ms/step"
    )


def choose_values(args: Namespace) -> recipes.Hyperparameters:
    """The paper's values, but for those given on the command line."""
    published = recipes.get_hyperparameters(args.dataset, args.model, args.optimizer)
    given = {name: getattr(args, name) for name in published._fields}
    return published._replace(**{name: v for name, v in given.items() if v is not None})


def write_result(args: Namespace, values: recipes.Hyperparameters, result: report.Result) -> Path:
    recipe = {name: v for name, v in vars(args).items() if name not in ("out", "data_dir")}
    recipe |= values._asdict() | {"learning_rate_times_0.1_at_epochs_of_405": recipes.MILESTONES}
    path = args.out / f"{args.dataset}_{args.model}_{args.optimizer}.json"
    environment = report.describe_environment()
    content = {"recipe": recipe, "environment": environment, **report.to_json(result)}
    report.write_json(path, content)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        values = choose_values(args)
    except ValueError as error:
        parser.error(str(error))
    parser.require_writable(args.out, args.out)
    try:
        trainer = make_trainer(
            load(args.dataset, args.data_dir, args.limit),
            args.model,
            args.optimizer,
            values,
            epochs=args.epochs,
            batch_size=args.batch_size,
            dtype=args.dtype,
        )
    except (DataError, ImageSizeError) as error:
        parser.error(str(error))
    runs = train_seeds(trainer, args.seeds, args.epochs)
    for run in runs:
        print(describe(run))
    result = report.Result(
        name=args.optimizer,
        label=OPTIMIZERS[args.optimizer].label,
        learning_rate=values.learning_rate,
        state_bytes_per_parameter=trainer.state_bytes_per_parameter,
        runs=runs,
    )
    title = f"{args.dataset}, {args.model}, epochs: {args.epochs}, seeds: {args.seeds}"
    Console().print(report.make_table([result], title))
    print(write_result(args, values, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

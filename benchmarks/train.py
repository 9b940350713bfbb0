"""Trains one model with one optimizer over several seeds, by default with the paper's recipe.

    python -m benchmarks.train --dataset cifar10 --data-dir DIR --model resnet20 \\
        --optimizer adamsrt --epochs 405 --seeds 5 --out OUT
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.console import Console

import spherical_optax as so
from benchmarks import protocol, report
from benchmarks.cli import DTYPES, Parser, add_dtype, at_least
from benchmarks.data import SOURCES, DataError, Dataset, load
from benchmarks.loop import Run, Trainer, steps_per_epoch
from benchmarks.methods import METHODS, make_optimizer
from benchmarks.models import MODELS, ImageSizeError
from benchmarks.normalization import BatchNorm
from benchmarks.progress import progress
from benchmarks.spheres import filter_spheres


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.train", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=SOURCES)
    add("--data-dir", type=Path, help="holds NAME.npz or a TFDS folder; default: TFDS downloads")
    add("--model", required=True, choices=MODELS)
    add("--optimizer", required=True, choices=METHODS)
    add("--epochs", type=at_least(int, 1), default=protocol.EPOCHS)
    add("--seeds", type=at_least(int, 1), default=5, help="how many; they are 0, 1, ...")
    add("--out", type=Path, required=True, help="folder for the JSON file")
    add("--limit", type=at_least(int, 1), help="use only the first training images")
    add("--batch-size", type=at_least(int, 1), default=protocol.BATCH_SIZE)
    add_dtype(parser)
    for name, below in (("--learning-rate", math.inf), ("--weight-decay", math.inf), ("--b2", 1.0)):
        add(name, type=at_least(float, 0.0, below), help="default: the paper's")
    return parser


def make_trainer(
    data: Dataset,
    model: str,
    optimizer: str,
    values: protocol.Hyperparameters,
    epochs: int,
    batch_size: int,
    dtype: str = DTYPES[0],
    devices: Sequence[Any] | None = None,
    few_kernels: bool | None = None,
) -> Trainer:
    """Learning rate and weight decay are arguments of its compiled program: see `protocol.injected`.

    `few_kernels`, by default on accelerators, computes the same up to rounding with fewer kernels, each
    of which costs its launch there: BatchNorm's sums are computed in pairs, and the optimizer's small
    arrays are stacked. On ResNet-20, a step of AdamSRT has 325 in place of 443, and one of Adam 292 in
    place of 388 (`python -m benchmarks.kernels --training resnet20`). CPUs keep the program of the
    published results.
    """
    if few_kernels is None:
        few_kernels = jax.default_backend() != "cpu"
    steps = epochs * steps_per_epoch(data, batch_size)
    # What is invariant is measured in float32.
    spheres = filter_spheres(MODELS[model](data.source.num_classes), data.source.shape)
    norm = BatchNorm if few_kernels else nn.BatchNorm
    net = MODELS[model](data.source.num_classes, dtype=jnp.dtype(dtype), norm=norm)

    def build(learning_rate: Any, weight_decay: Any = 0.0) -> optax.GradientTransformation:
        schedule = protocol.step_schedule(learning_rate, steps)

        def make(spheres: Any) -> optax.GradientTransformation:
            return make_optimizer(optimizer, schedule, spheres, values.b2, weight_decay)

        # Those since the paper may go by the shapes of matrices, which a stack does not keep.
        stack = few_kernels and optimizer in protocol.METHODS
        return so.stacked(make, spheres) if stack else make(spheres)

    hyperparams = protocol.injected(values)
    static = {"weight_decay"} - hyperparams.keys()
    tx = optax.inject_hyperparams(build, static_args=static)(**hyperparams)
    return Trainer(net, data, tx, batch_size, devices=devices)


def train_seeds(trainer: Trainer, seeds: int, epochs: int) -> list[Run]:
    with progress(seeds * epochs) as advance:

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    values = protocol.hyperparameters(args.dataset, args.model, args.optimizer)
    given = {name: getattr(args, name) for name in values._fields}
    values = values._replace(**{name: v for name, v in given.items() if v is not None})
    parser.require_writable(args.out, args.out)
    try:
        data = load(args.dataset, args.data_dir, args.limit)
        trainer = make_trainer(
            *(data, args.model, args.optimizer, values),
            *(args.epochs, args.batch_size, args.dtype),
        )
    except (DataError, ImageSizeError) as error:
        parser.error(str(error))

    runs = train_seeds(trainer, args.seeds, args.epochs)
    result = report.Result(
        args.optimizer,
        METHODS[args.optimizer].label,
        values.learning_rate,
        trainer.state_bytes_per_parameter,
        runs,
    )
    for run in runs:
        print(describe(run))
    title = f"{args.dataset}, {args.model}, epochs: {args.epochs}, seeds: {args.seeds}"
    Console().print(report.table([result], title))

    recipe = {name: v for name, v in vars(args).items() if name not in ("out", "data_dir")}
    recipe |= values._asdict() | {"learning_rate_times_0.1_at_epochs_of_405": protocol.MILESTONES}
    path = args.out / f"{args.dataset}_{args.model}_{args.optimizer}.json"
    content = {"recipe": recipe, "environment": report.environment(), **report.as_json(result)}
    report.write_json(path, content)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What an H100 would run for one step of each optimizer: kernels, bytes, memory. Counted without one.

    python -m benchmarks.kernels [--model gpt2 resnet50 resnet18 small] [--only NAME] [--out DIR]
    python -m benchmarks.kernels --training resnet20 [--out DIR]

`pip install 'jax[cuda13]'` brings XLA's compiler for NVIDIA GPUs, which runs on any machine if it
gets the description of a GPU (measuring/h100.txtpb). No GPU is used, and no time is measured on
one. Each step is jitted with its parameters and its state donated; measuring/hlo.py says what
counts as a kernel. --training counts one training step, forward and backward pass included, for
each method of the paper's table.
"""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.cli import Parser, at_least
from benchmarks.measuring import contenders, h100
from benchmarks.measuring.contenders import REFERENCE
from benchmarks.measuring.hlo import Counts, count
from benchmarks.measuring.parameters import LISTED, describe_network
from benchmarks.reporting import report, tables
from benchmarks.training import recipes
from benchmarks.training.build import make_trainer
from benchmarks.training.data import SOURCES, Dataset, Split
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.models import MODELS

TRAINING_IMAGES = 12_800  # an epoch of 100 steps, whose number does not change a step
DEFAULT_MODELS = ("gpt2", "resnet50", "resnet18", "small")
LEFT_OUT = "so.adamp, guessing"  # chooses spheres of its own


def make_optimizers(spheres: Any, weight_decay: float) -> dict[str, optax.GradientTransformation]:
    optimizers = contenders.make_optimizers(spheres, weight_decay)
    return {name: tx for name, tx in optimizers.items() if name != LEFT_OUT}


def measure(tx: optax.GradientTransformation, shapes: Any) -> dict[str, Any]:
    """Counts the step of one optimizer."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, shapes)
    compiled, seconds = h100.compile_for_h100(step, shapes, state, shapes, donate=(0, 1))
    usual, most = (count(compiled.as_text(), larger=larger) for larger in (False, True))
    return to_json(usual) | {
        "at_most": None if most == usual else to_json(most),  # with the larger branches
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_cpu_seconds": seconds,
    }


def measure_training(model: str, method: str, few_kernels: bool) -> dict[str, Any]:
    """Counts a step within an epoch: bfloat16 activations, on images of CIFAR-10's shape."""
    source = SOURCES["cifar10"]
    images = np.zeros((TRAINING_IMAGES, *source.shape), np.uint8)
    labels = np.zeros(TRAINING_IMAGES, np.int32)
    one = Split(images[:1], labels[:1])
    data = Dataset(source, Split(images, labels), one, one)
    trainer = make_trainer(
        data,
        model,
        method,
        recipes.get_hyperparameters("cifar10", model, method),
        epochs=1,
        batch_size=recipes.BATCH_SIZE,
        dtype="bfloat16",
        few_kernels=few_kernels,
    )
    state, plan = trainer.get_shapes(), jax.eval_shape(lambda: trainer.draw_plan(0, 0))
    trainer.replicated = NamedSharding(h100.get_mesh(), PartitionSpec())
    trainer.sharded = NamedSharding(h100.get_mesh(), PartitionSpec("data"))
    compiled, seconds = h100.compile_for_h100(
        trainer.scan_epoch, state, *data.train, plan, donate=(0,)
    )
    return to_json(count(compiled.as_text(), loop_body=True)) | {
        "at_most": None,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_cpu_seconds": seconds,
    }


def to_json(counts: Counts) -> dict[str, Any]:
    kinds = dict(sorted(counts.kinds.items()))
    moved = {"read_bytes": counts.read, "written_bytes": counts.written}
    return {"kernels": counts.kernels, "kinds": kinds} | moved


def count_bytes_moved(row: dict[str, Any]) -> int:
    return row["read_bytes"] + row["written_bytes"]


HEADER = (
    "optimizer", "kernels", "x Adam", "MB read", "MB written", "x Adam", "temp. MiB", "compile s",
)  # fmt: skip


def format_rows(
    rows: dict[str, dict[str, Any]], reference: str = REFERENCE
) -> list[tuple[str, ...]]:
    """The figures of every optimizer as texts, some as ratios to those of the reference."""
    adam = rows[reference]
    return [
        (
            name,
            f"{row['kernels']}" + (f" to {most['kernels']}" if (most := row["at_most"]) else ""),
            f"{row['kernels'] / adam['kernels']:.2f}",
            f"{row['read_bytes'] / 1e6:.1f}",
            f"{row['written_bytes'] / 1e6:.1f}",
            f"{count_bytes_moved(row) / count_bytes_moved(adam):.2f}",
            f"{row['temporary_bytes'] / 2**20:.1f}",
            f"{row['compile_cpu_seconds']:.1f}",
        )
        for name, row in rows.items()
    ]


def make_table(rows: dict[str, dict[str, Any]], title: str, reference: str = REFERENCE) -> Table:
    return tables.to_rich(HEADER, format_rows(rows, reference), title)


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.kernels", description=str(__doc__).splitlines()[0])
    choices = [*MODELS, *LISTED]
    parser.add_argument("--model", nargs="+", choices=choices, default=DEFAULT_MODELS)
    help_text = "of whole training steps of this network, in place of --model"
    parser.add_argument("--training", choices=MODELS, help=help_text)
    names = list(make_optimizers(None, 0.0))
    help_text = "these beside optax.adam"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=help_text)
    help_text = "of ours and of adamw; optax.adam has none"
    parser.add_argument("--weight-decay", type=at_least(float, 0.0), default=0.0, help=help_text)
    help_text = "also write the numbers into kernels.json in this folder, which keeps other models"
    parser.add_argument("--out", type=Path, help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.training and (args.only or args.model != DEFAULT_MODELS):
        parser.error("--training: goes with neither --model nor --only")
    if not h100.list_compilers():
        parser.error(f"{h100.NO_COMPILER} (any machine will do, no GPU is needed)")
    if args.out:
        parser.require_writable(args.out, args.out)
    jax.config.update("jax_platforms", "cpu")  # leaves a GPU alone, even where there is one
    if args.training:
        count_training(args.training, args.out)
    else:
        for model in args.model:
            count_model(model, args)


def count_model(model: str, args: Namespace) -> None:
    """Counts the step of every optimizer on the parameters of a network."""
    shapes, spheres = describe_network(model)
    rows = {}
    for name, tx in make_optimizers(spheres, args.weight_decay).items():
        if args.only is None or name in (REFERENCE, *args.only):
            with Console(stderr=True).status(f"{model}: {name}"):
                rows[name] = measure(tx, shapes)
    sizes = [x.size for x in jax.tree.leaves(shapes)]
    about = f"{len(sizes)} arrays, {sum(sizes):,} parameters"
    title = f"One step on {model}, {about}, compiled for an H100"
    Console(width=100).print(make_table(rows, title))
    if args.out:
        path = args.out / "kernels.json"
        write(path, model, title, rows, args.weight_decay)
        print(f"written: {path}")


def count_training(model: str, out: Path | None) -> None:
    """Counts every method twice: with Flax's BatchNorm and a plain optimizer, and with few kernels."""
    rows = {}
    for few_kernels in (False, True):
        for method in recipes.PAPER_METHODS:
            with Console(stderr=True).status(f"{model}: {method}"):
                label = OPTIMIZERS[method].label + (", few kernels" if few_kernels else "")
                rows[label] = measure_training(model, method, few_kernels)
    title = (
        f"One training step of {model}, bfloat16, batches of {recipes.BATCH_SIZE}, "
        "compiled for an H100; x: of Adam"
    )
    Console(width=100).print(make_table(rows, title, OPTIMIZERS["adam"].label))
    if out:
        path, command = out / "kernels_training.json", f"--training {model}"
        about = {"command": f"python -m benchmarks.kernels {command}", "title": title}
        environment = h100.describe_environment()
        report.write_json(path, about | {"environment": environment, "optimizers": rows})
        print(f"written: {path}")


def write(path: Path, model: str, title: str, rows: dict[str, Any], weight_decay: float) -> None:
    """Adds the rows to the file. Its other rows stay if JAX and the weight decay are the same."""
    models: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if old["environment"]["jax"] == jax.__version__ and old["weight_decay"] == weight_decay:
            models = old["models"]
    rows = (models[model]["optimizers"] if model in models else {}) | rows
    names, order = list(make_optimizers(None, 0.0)), [*DEFAULT_MODELS, *MODELS, *LISTED]
    models[model] = {"title": title, "optimizers": {k: rows[k] for k in names if k in rows}}
    models = {k: models[k] for k in dict.fromkeys(order) if k in models}
    some = [name for name in names if any(name in m["optimizers"] for m in models.values())]
    command = (
        f"python -m benchmarks.kernels --model {' '.join(models)} --weight-decay {weight_decay:g}"
        + ("" if some == names else f" --only {shlex.join(some)}")
    )
    about = {
        "command": command,
        "environment": h100.describe_environment(),
        "weight_decay": weight_decay,
    }
    report.write_json(path, about | {"models": models})


if __name__ == "__main__":
    main()

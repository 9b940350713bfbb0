"""What an H100 would run for one step of each optimizer: kernels, bytes, memory. Counted without one.

    python -m benchmarks.kernels [--model gpt2 resnet50 resnet18 small] [--only NAME] [--out DIR]
    python -m benchmarks.kernels --training resnet20 [--out DIR]

XLA's compiler for NVIDIA GPUs, which `pip install 'jax[cuda13]'` brings, runs on any machine, given the
description of a GPU (measuring/h100.txtpb): no GPU is used, and no time of one is known. Each step is
jitted with its parameters and its state donated; measuring/hlo.py says what counts as a kernel. With
--training it is one step of training, forward and backward pass included, of the methods of the paper's
table.
"""

import functools
import importlib.util
import json
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import speed
from benchmarks.cli import Parser, at_least
from benchmarks.measuring.hlo import Counts, count
from benchmarks.measuring.parameters import LISTED, describe_network
from benchmarks.reporting import report
from benchmarks.speed import REFERENCE
from benchmarks.training import recipes
from benchmarks.training.build import make_trainer
from benchmarks.training.data import SOURCES, Dataset, Split
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.models import MODELS

DESCRIPTION = Path(__file__).parent / "measuring" / "h100.txtpb"
DEVICE = "H100 (described, compiled without one)"
COMPILERS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
NO_COMPILER = "the compiler for NVIDIA GPUs is not installed: pip install 'jax[cuda13]'"
TRAINING_IMAGES = 12_800  # an epoch of 100 steps, whose number does not change a step
DEFAULT_MODELS = ("gpt2", "resnet50", "resnet18", "small")
LEFT_OUT = "so.adamp, guessing"  # of which the spheres are another choice than that of the rest


@functools.cache
def get_mesh() -> Mesh:
    """The described device, for which one can compile and on which nothing can run."""
    text = DESCRIPTION.read_text("utf-8")
    described = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=text, topology="1x1x1"
    )
    return Mesh(np.array(described.devices[:1]), ("data",))


def compile_for_h100(fn: Any, *shapes: Any, donate: Sequence[int] = ()) -> tuple[Any, float]:
    """The compiled program, and the seconds of processor time that compiling took."""
    on = NamedSharding(get_mesh(), PartitionSpec())
    jitted = jax.jit(fn, donate_argnums=tuple(donate), in_shardings=on, out_shardings=on)
    there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), shapes)
    lowered = jitted.lower(*there)
    start = time.process_time()
    return lowered.compile(), time.process_time() - start


def measure(tx: optax.GradientTransformation, shapes: Any) -> dict[str, Any]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, shapes)
    compiled, seconds = compile_for_h100(step, shapes, state, shapes, donate=(0, 1))
    usual, most = (count(compiled.as_text(), larger=larger) for larger in (False, True))
    return to_json(usual) | {
        "at_most": None if most == usual else to_json(most),  # with the larger branches
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_cpu_seconds": seconds,
    }


def measure_training(model: str, method: str, few_kernels: bool) -> dict[str, Any]:
    """Of a step within an epoch: bfloat16 activations, on images of CIFAR-10's shape."""
    source = SOURCES["cifar10"]
    images = np.zeros((TRAINING_IMAGES, *source.shape), np.uint8)
    labels = np.zeros(TRAINING_IMAGES, np.int32)
    one = Split(images[:1], labels[:1])
    data = Dataset(source, Split(images, labels), one, one)
    values = recipes.get_hyperparameters("cifar10", model, method)
    trainer = make_trainer(
        data, model, method, values, 1, recipes.BATCH_SIZE, "bfloat16", few_kernels=few_kernels
    )
    state, plan = trainer.get_shapes(), jax.eval_shape(lambda: trainer.draw_plan(0, 0))
    trainer.replicated = NamedSharding(get_mesh(), PartitionSpec())
    trainer.sharded = NamedSharding(get_mesh(), PartitionSpec("data"))
    compiled, seconds = compile_for_h100(trainer.scan_epoch, state, *data.train, plan, donate=(0,))
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
    """Read and written, of a row as JSON."""
    return row["read_bytes"] + row["written_bytes"]


def make_optimizers(spheres: Any, weight_decay: float) -> dict[str, optax.GradientTransformation]:
    found = speed.make_optimizers(spheres, weight_decay)
    return {name: tx for name, tx in found.items() if name != LEFT_OUT}


HEADER = (
    "optimizer", "kernels", "x Adam", "MB read", "MB written", "x Adam", "temp. MiB", "compile s",
)  # fmt: skip


def format_rows(
    rows: dict[str, dict[str, Any]], reference: str = REFERENCE
) -> list[tuple[str, ...]]:
    """The numbers of every optimizer as texts, beside those of the reference."""

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
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for i, column in enumerate(HEADER):
        found.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in format_rows(rows, reference):
        found.add_row(*row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
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
    args = parser.parse_args(argv)
    if args.training and (args.only or args.model != DEFAULT_MODELS):
        parser.error("--training: goes with neither --model nor --only")
    if not any(map(importlib.util.find_spec, COMPILERS)):
        parser.error(f"{NO_COMPILER} (any machine will do, no GPU is needed)")
    if args.out:
        parser.require_writable(args.out, args.out)
    jax.config.update("jax_platforms", "cpu")  # Where there is a GPU, it is not used either.
    if args.training:
        count_training(args.training, args.out)
        return
    for model in args.model:
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
    """Every method twice: with Flax's BatchNorm and the optimizer as it is, and with few kernels."""
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
        report.write_json(path, about | {"environment": describe_environment(), "optimizers": rows})
        print(f"written: {path}")


def describe_environment() -> dict[str, Any]:
    """Of the described GPU, and of the compiler."""
    found = report.describe_environment() | {"device": DEVICE, "platform": "gpu"}
    del found["float32_products"], found["cores"]  # of the CPU
    plugins = [name.replace("_", "-") for name in COMPILERS if importlib.util.find_spec(name)]
    return found | {name: version(name) for name in plugins}


def write(path: Path, model: str, title: str, rows: dict[str, Any], weight_decay: float) -> None:
    """Beside what the file has of other models and optimizers, if JAX and weight decay are the same."""
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
        "environment": describe_environment(),
        "weight_decay": weight_decay,
    }
    report.write_json(path, about | {"models": models})


if __name__ == "__main__":
    main()

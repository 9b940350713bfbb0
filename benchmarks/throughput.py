"""How many images per second training takes, and what part of the device's peak that is.

    python -m benchmarks.throughput [--model resnet20] [--dtypes float32 bfloat16] [--seeds 1 2 4]
                                    [--processes 1 2] [--images 47500] [--rounds 3] [--out FILE.json]

Every way to train takes its turn of one epoch in every round: in each dtype, with several seeds at
once by `jax.vmap`, and with several processes side by side on the same device (on a CPU each gets its
share of the cores). The images are random. The peak is the speed of a large matrix product in the same
processes; the work of a step is the number of operations that XLA counts in it.
"""

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import spherical_optax as so
from benchmarks.cli import DTYPES, Parser, at_least
from benchmarks.reporting import report, tables
from benchmarks.training import recipes
from benchmarks.training.data import SOURCES, Dataset, Split
from benchmarks.training.methods import OPTIMIZERS, make_optimizer
from benchmarks.training.models import MODELS
from benchmarks.training.trainer import Trainer

CPU_MATRIX, MATRIX = 2048, 8192  # rows, for the peak
TRIES = 5
HEADER = ("dtype", "seeds, vmap", "processes", "images/s", "ratio", "of the peak")


class Way(NamedTuple):
    dtype: str
    seeds: int  # in one program
    processes: int  # side by side


class ManySeeds(Trainer):
    """Trains `seeds` networks in one program: every array of its state has a leading axis for them."""

    def __init__(self, *args: Any, seeds: int):
        super().__init__(*args)
        self.seeds = seeds

    def init(self, seed: int, hyperparams: Any = None) -> Any:
        return _stack(
            [super(ManySeeds, self).init(seed + i, hyperparams) for i in range(self.seeds)]
        )

    def draw_plan(self, seed: int, epoch: int) -> Any:
        return _stack(
            [super(ManySeeds, self).draw_plan(seed + i, epoch) for i in range(self.seeds)]
        )

    def train_step(self, *args: Any) -> Any:
        return jax.vmap(super().train_step, in_axes=(0, None, None, 0, None))(*args)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Worker:
    """A process that trains in one way, an epoch at a time."""

    def __init__(self, args: Any, way: Way, place: int):
        take_cores(way.processes, place)  # before JAX counts the cores
        self.trainer, self.dtype = make_trainer(args, way), way.dtype
        self.images = way.seeds * self.trainer.steps * args.batch_size
        self.state = self.trainer.init(0)
        self.train_epoch()  # compiles, and touches memory for the first time

    def train_epoch(self) -> None:
        self.state, *_ = self.trainer.train_epoch(self.state, 0, 0)

    def count_operations(self) -> float | None:
        """The operations of an epoch as XLA counts them; None on a GPU, where it does not."""
        data = (*self.trainer.train, self.trainer.draw_plan(0, 0), np.int32(0))
        step = jax.jit(self.trainer.train_step).lower(self.state, *data)
        cost: Any = step.cost_analysis()
        return None if cost is None else cost["flops"] * self.trainer.steps

    def measure_peak(self) -> float:
        """Operations per second of a large matrix product."""
        n = CPU_MATRIX if jax.default_backend() == "cpu" else MATRIX
        # Random, because a GPU can multiply constants faster than real data.
        matrix = jax.random.normal(jax.random.key(0), (n, n), self.dtype)
        product, times = jax.jit(jnp.matmul), []
        for _ in range(TRIES + 1):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / min(times[1:])


def take_cores(processes: int, place: int) -> None:
    """Restricts this process, number `place` of several, to its share of the cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // processes)
        os.sched_setaffinity(0, cores[place * share :][:share] or cores)


def make_trainer(args: Any, way: Way) -> Trainer:
    """A trainer on random images."""
    source = SOURCES[args.dataset]
    net = MODELS[args.model](source.num_classes, dtype=jnp.dtype(way.dtype))
    shapes = jax.eval_shape(
        lambda x: net.init(jax.random.key(0), x, train=False)["params"],
        jax.ShapeDtypeStruct((1, *source.shape), jnp.float32),
    )
    rate, b2, weight_decay = recipes.get_hyperparameters(source.name, args.model, args.optimizer)
    tx = make_optimizer(args.optimizer, rate, so.spheres_where(shapes, "Conv"), b2, weight_decay)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, *source.shape), np.uint8)
    labels = rng.integers(0, source.num_classes, args.images).astype(np.int32)
    few = Split(images[:1], labels[:1])
    data = Dataset(source, Split(images, labels), few, few)
    if way.seeds > 1:
        return ManySeeds(net, data, tx, args.batch_size, seeds=way.seeds)
    return Trainer(net, data, tx, args.batch_size)


_worker: Worker


def _start(*args: Any) -> None:
    global _worker
    _worker = Worker(*args)


def _describe() -> tuple[int, float | None, str]:
    return _worker.images, _worker.count_operations(), jax.devices()[0].device_kind


def _measure_peak() -> float:
    return _worker.measure_peak()


def _train_epoch() -> None:
    _worker.train_epoch()


Pools = dict[Way, list[ProcessPoolExecutor]]


def measure(args: Any) -> list[dict[str, Any]]:
    """A row of figures for every way to train."""
    ways = [Way(dtype, seeds, 1) for dtype in args.dtypes for seeds in args.seeds]
    ways += [Way(dtype, 1, n) for dtype in args.dtypes for n in args.processes if n > 1]
    pools = start_processes(args, ways)
    try:
        # In turn, because XLA chooses a GPU's kernels by timing them, and others would disturb that.
        about = {
            way: [f.result() for f in [p.submit(_describe) for p in pool]]
            for way, pool in pools.items()
        }
        peaks = {way: pool[0].submit(_measure_peak).result() for way, pool in pools.items()}
        seconds = time_epochs(pools, args.rounds)
    finally:
        for pool in itertools.chain(*pools.values()):
            pool.shutdown()
    rows = []
    for way in ways:
        # A process with a share of the cores measures a share of the peak: the largest is the device's.
        peak = max(peaks[other] for other in ways if other.dtype == way.dtype)
        rows.append(summarize(way, *about[way][0], peak, seconds[way]))
    return rows


def start_processes(args: Any, ways: Sequence[Way]) -> Pools:
    spawn = multiprocessing.get_context("spawn")
    # Processes that share an accelerator must not take all of its memory at their start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return {
        way: [
            ProcessPoolExecutor(1, spawn, _start, (args, way, place))
            for place in range(way.processes)
        ]
        for way in ways
    }


def time_epochs(pools: Pools, rounds: int) -> dict[Way, list[float]]:
    """The seconds of one epoch in all processes of a way, for every round."""
    seconds: dict[Way, list[float]] = {way: [] for way in pools}
    for _ in range(rounds):
        for way, pool in pools.items():
            start = time.perf_counter()
            for epoch in [process.submit(_train_epoch) for process in pool]:
                epoch.result()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def summarize(
    way: Way,
    images: int,
    operations: float | None,
    device: str,
    peak: float,
    seconds: list[float],
) -> dict[str, Any]:
    median = statistics.median(seconds)
    counted = operations is not None
    return way._asdict() | {
        "device": device,
        "images_per_second": way.processes * images / median,
        "operations_per_image": operations / images if counted else None,
        "peak_operations_per_second": peak,
        "fraction_of_peak": way.processes * operations / median / peak if counted else None,
        "seconds": seconds,
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The texts of a table under `HEADER`, a line for every way."""
    return [
        [
            row["dtype"],
            str(row["seeds"]),
            str(row["processes"]),
            f"{row['images_per_second']:,.0f}",
            f"{row['images_per_second'] / rows[0]['images_per_second']:.2f}",
            "-" if (part := row["fraction_of_peak"]) is None else f"{100 * part:.1f} %",
        ]
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.throughput", description=str(__doc__).splitlines()[0])
    add, positive = parser.add_argument, at_least(int, 1)
    add("--dataset", choices=SOURCES, default="cifar10", help="whose shape the images have")
    add("--model", choices=MODELS, default="resnet20")
    add("--optimizer", choices=OPTIMIZERS, default="adamsrt")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--seeds", nargs="+", type=positive, default=[1, 2, 4], help="at once, by jax.vmap")
    add("--processes", nargs="+", type=positive, default=[1, 2], help="side by side")
    add("--images", type=positive, default=47_500, help="in an epoch")
    add("--batch-size", type=positive, default=recipes.BATCH_SIZE)
    add("--rounds", type=positive, default=3)
    add("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out.parent)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images}: fewer than one batch of {args.batch_size}")
    rows = measure(args)
    title = f"{args.model}, {args.optimizer}, {args.dataset}'s shape, {rows[0]['device']}"
    Console().print(tables.to_rich(HEADER, format_rows(rows), title, framed=True))
    if args.out:
        recipe = {name: value for name, value in vars(args).items() if name != "out"}
        content = {"recipe": recipe, "environment": report.describe_environment(), "ways": rows}
        report.write_json(args.out, content)
        print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What one optimizer step costs on a network's parameters, beside `optax.adam` in the same run.

    python -m benchmarks.speed [--model resnet18] [--rounds 101] [--weight-decay 1e-4] [--batch 128]
                               [--out FILE.json]

Every step is jitted, with donated buffers, and takes its turn of ten steps in every round: the ratios
mean something on a noisy machine, the milliseconds do not. Without --batch the optimizers run alone;
with it as part of training steps, forward and backward pass included, on as many random images.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import spherical_optax as so
from benchmarks import report
from benchmarks.methods import METHODS, make_optimizer
from benchmarks.models import MODELS
from benchmarks.spheres import filter_spheres
from benchmarks.train import Parser, at_least

LEARNING_RATE = 1e-3
IMAGE = (32, 32, 3)
EVERY = 10  # steps in a row, of which `track` measures one


def optimizers(spheres: Any, weight_decay: float) -> dict[str, optax.GradientTransformation]:
    optaxs = {
        "optax.adam": optax.adam(LEARNING_RATE),
        "optax.adamw": optax.adamw(LEARNING_RATE, weight_decay=weight_decay),
        "optax.sgd": optax.sgd(LEARNING_RATE, momentum=0.9),
    }
    ours = {
        f"so.{name}": make_optimizer(name, LEARNING_RATE, spheres, 0.999, weight_decay)
        for name in METHODS
        if name != "adamw"  # made of the same blocks as so.adam
    }
    tracked = {
        f"so.track(optax.adam, every={EVERY})": so.track(
            optax.adam(LEARNING_RATE), spheres, every=EVERY
        )
    }
    return {**optaxs, **tracked, **ours}


class Step:
    """One optimizer, compiled, with parameters and state of its own; timed over ten steps in a row.

    `gradient` makes the gradients from the parameters, and is timed too; None leaves them as they are.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        shapes: Any,
        gradient: Callable[[Any], Any] | None = None,
    ):
        keys = iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(shapes))))

        def normal(x):
            return 0.05 * jax.random.normal(next(keys), x.shape, x.dtype)

        def step(params, state, grads):
            grads = grads if gradient is None else gradient(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.grads = jax.tree.map(normal, shapes), jax.tree.map(normal, shapes)
        self.state = tx.init(self.params)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.grads)
        start = time.perf_counter()
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        memory: Any = self._compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        for _ in range(EVERY):
            self.params, self.state = self._compiled(self.params, self.state, self.grads)
            jax.block_until_ready((self.params, self.state))
        self.seconds.append((time.perf_counter() - start) / EVERY)


def network(model: str) -> tuple[Any, Any]:
    """Shapes of the parameters, and their spheres."""
    images = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    init = functools.partial(MODELS[model](10).init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
    return shapes, filter_spheres(MODELS[model](10), IMAGE)


def gradient(model: str, batch: int) -> Callable[[Any], Any]:
    """Of the loss on random images, with the model in training mode."""
    net = MODELS[model](10)
    images = jax.random.normal(jax.random.key(1), (batch, *IMAGE))
    labels = jnp.arange(batch) % 10
    stats = net.init(jax.random.key(0), images[:1], train=False)["batch_stats"]

    def loss(params: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        logits: Any = net.apply(variables, images, train=True, mutable=["batch_stats"])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.grad(loss)


def measure(
    shapes: Any,
    spheres: Any,
    rounds: int,
    weight_decay: float,
    gradient: Callable[[Any], Any] | None = None,
) -> dict[str, dict[str, float]]:
    steps = {
        name: Step(tx, shapes, gradient) for name, tx in optimizers(spheres, weight_decay).items()
    }
    for step in steps.values():  # the first call touches memory for the first time
        step.run()
        step.seconds.clear()
    for _ in range(rounds):
        for step in steps.values():
            step.run()
    adam = steps["optax.adam"]
    adam_seconds = statistics.median(adam.seconds)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(step.seconds),
            "time_ratio": statistics.median(step.seconds) / adam_seconds,
            "state_bytes": step.state_bytes,
            "state_ratio": step.state_bytes / adam.state_bytes,
            "temporary_bytes": step.temporary_bytes,
            "compile_ratio": step.compile_seconds / adam.compile_seconds,
        }
        for name, step in steps.items()
    }


def table(rows: dict[str, dict[str, float]], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column("optimizer", no_wrap=True)
    for column in ("ms", "time ratio", "state ratio", "temp. MiB", "compile ratio"):
        found.add_column(column, justify="right")
    for name, row in rows.items():
        found.add_row(
            name,
            f"{row['milliseconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['state_ratio']:.3f}",
            f"{row['temporary_bytes'] / 2**20:.2f}",
            f"{row['compile_ratio']:.2f}",
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.speed", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--rounds", type=at_least(int, 1), default=101)
    help_text = "the L2 coefficient of ours; optax.adam has none"
    parser.add_argument("--weight-decay", type=at_least(float, 0.0), default=1e-4, help=help_text)
    help_text = "time whole training steps on this many images, not the optimizers alone"
    parser.add_argument("--batch", type=at_least(int, 1), help=help_text)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out.parent)
    shapes, spheres = network(args.model)
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    training = None if args.batch is None else gradient(args.model, args.batch)
    rows = measure(shapes, spheres, args.rounds, args.weight_decay, training)
    what = "One step" if training is None else f"One training step with {args.batch} images"
    title = f"{what} on {args.model}, {parameters:,} parameters; ratios are to optax.adam"
    Console().print(table(rows, title))
    if args.out:
        command = (
            f"python -m benchmarks.speed --model {args.model} --rounds {args.rounds} "
            f"--weight-decay {args.weight_decay}{f' --batch {args.batch}' if args.batch else ''}"
        )
        content = {"command": command, "environment": report.environment(), "optimizers": rows}
        report.write_json(args.out, content)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()

"""What one optimizer step costs beside `optax.adam` in the same run: time, state, memory, compilation.

    python -m benchmarks.speed [--model resnet18 resnet50 small] [--rounds 21] [--only NAME] [--torch]
                               [--out DIR]

Every step is jitted, with donated buffers, and takes its turn of ten steps in every round: the ratios
mean something on a noisy machine, the milliseconds do not. An accelerator gets the ten in one call, each
with gradients of its own, and is waited for after them. The floor of an optimizer is the time that
x <- x + c g takes in the same rounds, in proportion to the bytes that each has to read and write once:
gradients, and parameters and state twice. Where torch, adamp, pytorch_optimizer and geoopt are
installed, they take part. Without --batch the optimizers run alone; with it as part of training steps,
forward and backward pass included, on as many random images.
"""

import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import spherical_optax as so
from benchmarks.cli import Parser, at_least, to_one_line
from benchmarks.measuring.parameters import IMAGE, LISTED, describe_network
from benchmarks.measuring.speed_peers import TorchStep, describe_torch, make_torch_steps
from benchmarks.reporting import report
from benchmarks.training.methods import OPTIMIZERS, make_optimizer
from benchmarks.training.models import MODELS

LEARNING_RATE = 1e-3
EVERY = 10  # steps in a row, of which `track` measures one
REFERENCE, FLOOR = "optax.adam", "x + c g"


def make_optimizers(spheres: Any, weight_decay: float) -> dict[str, optax.GradientTransformation]:
    adam = optax.adam(LEARNING_RATE)
    return {
        FLOOR: optax.sgd(LEARNING_RATE),
        REFERENCE: adam,
        "optax.adamw": optax.adamw(LEARNING_RATE, weight_decay=weight_decay),
        "optax.sgd": optax.sgd(LEARNING_RATE, momentum=0.9),
        **{
            f"so.{name}": make_optimizer(name, LEARNING_RATE, spheres, 0.999, weight_decay)
            for name in OPTIMIZERS
            if name not in ("adamw", "muonh")  # the blocks of so.adam; matrix products
        },
        "so.stacked(so.adamsrt)": so.stacked(
            lambda s: so.adamsrt(LEARNING_RATE, s, weight_decay=weight_decay), spheres
        ),
        "so.adamp, guessing": so.adamp(LEARNING_RATE, weight_decay=weight_decay),
        f"so.track(optax.adam, every={EVERY})": so.track(adam, spheres, every=EVERY),
    }


class Step:
    """One Optax optimizer, compiled, with parameters and state of its own.

    A CPU gets a call for every step, and an accelerator (`scan`) one call for ten: there, a call from
    the host can take longer than the step. `grads` holds gradients along a leading axis, which take
    turns. In a scan each step has its own: XLA would compute what depends on one gradient once for all.
    `gradient` makes them from the parameters in their place, and is timed too.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        grads: Any,
        gradient: Callable[[Any], Any] | None = None,
        scan: bool = False,
    ):
        def step(params, state, grads):
            grads = grads if gradient is None else gradient(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def steps(params, state, grads):
            (params, state), _ = jax.lax.scan(
                lambda carry, grads: (step(*carry, grads), None), (params, state), grads
            )
            return params, state

        self.scan = scan
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.state_bytes = _count_bytes(self.state)
        self.seconds: list[float] = []
        count = len(jax.tree.leaves(grads)[0])
        self._grads = [grads] if self.scan else [_select_step(grads, i) for i in range(count)]
        self._lowered = jax.jit(steps if self.scan else step, donate_argnums=(0, 1)).lower(
            self.params, self.state, self._grads[0]
        )

    def compile(self) -> None:
        """Apart, because it may take place in a thread."""
        start = time.perf_counter()
        self._compiled = self._lowered.compile()
        # With a cache, it is only the time that loading takes.
        cached = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        self.compile_seconds = None if cached else time.perf_counter() - start
        memory: Any = self._compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def run(self) -> None:
        start = time.perf_counter()
        for grads in itertools.islice(itertools.cycle(self._grads), 1 if self.scan else EVERY):
            self.params, self.state = self._compiled(self.params, self.state, grads)
            jax.block_until_ready((self.params, self.state))
        self.seconds.append((time.perf_counter() - start) / EVERY)


def _select_step(grads: Any, step: int) -> Any:
    return jax.tree.map(lambda g: g[step], grads)


def _count_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def make_gradient(model: str, batch: int) -> Callable[[Any], Any]:
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


def compile_all(steps: Sequence[Step]) -> None:
    """Side by side where an accelerator is waiting; on a CPU in turn, because the time is reported."""
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:
        list(pool.map(Step.compile, steps))


def measure(
    shapes: Any,
    spheres: Any,
    rounds: int,
    weight_decay: float,
    gradient: Callable[[Any], Any] | None = None,
    only: Sequence[str] | None = None,
    torch: bool = True,
    scan: bool | None = None,
    turn: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """`turn` returns when it is time to measure; everything is compiled before."""
    scan = jax.default_backend() != "cpu" if scan is None else scan
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(shapes))))

    def random(x: Any, *more: int) -> jax.Array:
        return 0.05 * jax.random.normal(next(keys), (*more, *x.shape), x.dtype)

    params = jax.tree.map(random, shapes)
    grads = jax.tree.map(lambda x: random(x, EVERY if scan else 1), shapes)
    contenders: dict[str, Step | TorchStep] = {}
    for name, tx in make_optimizers(spheres, weight_decay).items():
        if only is None or name in (REFERENCE, FLOOR, *only):
            contenders[name] = Step(tx, params, grads, gradient, scan)
    compile_all([step for step in contenders.values() if isinstance(step, Step)])
    if gradient is None and torch:
        try:
            contenders |= make_torch_steps(
                params, grads, spheres, LEARNING_RATE, weight_decay, EVERY
            )
        except (
            RuntimeError
        ) as error:  # PyTorch's, out of memory, say: ours are measured all the same
            print(f"without PyTorch: {to_one_line(error)[:200]}", file=sys.stderr)
    turn()
    for step in contenders.values():  # the first call touches memory for the first time
        step.run()
        step.seconds.clear()
    for _ in range(rounds):
        for step in contenders.values():
            step.run()

    def bytes_moved(step: Step | TorchStep) -> int:
        return 3 * _count_bytes(params) + 2 * step.state_bytes

    reference, floor = contenders[REFERENCE], contenders[FLOOR]
    floor_seconds = statistics.median(floor.seconds)
    rows = {}
    for name, step in contenders.items():
        seconds = statistics.median(step.seconds)
        rows[name] = {
            "milliseconds": 1e3 * seconds,
            "time_ratio": seconds / statistics.median(reference.seconds),
            "floor_ratio": None
            if gradient is not None
            else seconds / floor_seconds * (bytes_moved(floor) / bytes_moved(step)),
            "state_bytes": step.state_bytes,
            "state_ratio": step.state_bytes / reference.state_bytes,
            "temporary_bytes": step.temporary_bytes,
            "compile_seconds": step.compile_seconds,
        }
    return rows


HEADER = ("optimizer", "ms", "time", "x floor", "state", "temp. MiB", "compile s")


def format_rows(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The numbers of every optimizer as texts, a dash for what there is not."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return [
        (
            name,
            text(row["milliseconds"], "{:.2f}"),
            text(row["time_ratio"], "{:.2f}"),
            text(row["floor_ratio"], "{:.2f}"),
            text(row["state_ratio"], "{:.3f}"),
            text(None if (t := row["temporary_bytes"]) is None else t / 2**20, "{:.2f}"),
            text(row["compile_seconds"], "{:.2f}"),
        )
        for name, row in rows.items()
    ]


def make_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for i, column in enumerate(HEADER):
        found.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in format_rows(rows):
        found.add_row(*row)
    return found


def make_file_name(model: str, training: bool = False, few: bool = False, device: str = "") -> str:
    """Of the results on a device, by default on this one."""
    parts = (
        "training" if training else "",
        "few" if few else "",
        device or report.make_device_slug(),
    )
    return "_".join(("speed", *filter(None, parts), f"{model}.json"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.speed", description=str(__doc__).splitlines()[0])
    choices = [*MODELS, *LISTED]
    default = ["resnet18", "resnet50", "small"]
    parser.add_argument("--model", nargs="+", choices=choices, default=default)
    parser.add_argument("--rounds", type=at_least(int, 1), default=21)
    help_text = "of ours and of adamw; optax.adam has none"
    parser.add_argument("--weight-decay", type=at_least(float, 0.0), default=0.0, help=help_text)
    help_text = "time whole training steps on this many images, not the optimizers alone"
    parser.add_argument("--batch", type=at_least(int, 1), help=help_text)
    names = list(make_optimizers(None, 0.0))
    help_text = "these beside optax.adam, and none of PyTorch's: fewer disturb each other less"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=help_text)
    help_text = "PyTorch's beside --only too"
    parser.add_argument("--torch", action="store_true", help=help_text)
    help_text = "also write the numbers into this folder, as JSON"
    parser.add_argument("--out", type=Path, help=help_text)
    help_text = "compile, then measure when this file is there, one process at a time"
    parser.add_argument("--wait-for", type=Path, metavar="FILE", help=help_text)
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out)
    if args.batch and (listed := [name for name in args.model if name in LISTED]):
        parser.error(f"--batch: {', '.join(listed)} are parameters without a network")
    lock = None if args.wait_for is None else filelock.FileLock(f"{args.wait_for}.lock")

    def turn() -> None:
        if lock is not None:
            while not args.wait_for.exists():
                time.sleep(0.1)
            lock.acquire()  # until this process ends

    for model in args.model:
        shapes, spheres = describe_network(model)
        training = None if args.batch is None else make_gradient(model, args.batch)
        rows = measure(
            shapes,
            spheres,
            args.rounds,
            args.weight_decay,
            training,
            only=args.only,
            torch=args.torch or args.only is None,
            turn=turn,
        )
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        what = "One step" if training is None else f"One training step with {args.batch} images"
        title = f"{what} on {model}, {parameters:,} parameters; time and state: x {REFERENCE}"
        Console().print(make_table(rows, title))
        if args.out:
            path = args.out / make_file_name(model, bool(args.batch), bool(args.only))
            words = ["python -m benchmarks.speed", "--model", model, "--rounds", args.rounds]
            words += ["--weight-decay", f"{args.weight_decay:g}"]
            words += ["--batch", args.batch] if args.batch else []
            words += ["--only", *map(shlex.quote, args.only)] if args.only else []
            words += ["--torch"] if args.torch else []
            command = " ".join(map(str, words))
            environment = report.describe_environment() | describe_torch()
            about = {"command": command, "title": title, "environment": environment}
            report.write_json(path, about | {"optimizers": rows})
            print(f"written: {path}")


if __name__ == "__main__":
    main()

"""What one optimizer step costs beside `optax.adam` in the same run: time, state, memory, compilation.

    python -m benchmarks.speed [--model resnet18 resnet50 small] [--rounds 21] [--only NAME] [--torch]
                               [--trace] [--out DIR]

Every step is jitted, with donated buffers, and takes its turn of ten steps in every round.
Therefore the ratios are meaningful on a noisy machine; the milliseconds are not. An accelerator
gets the ten steps in one call, each step with gradients of its own, and is waited for after the
call. The floor of an optimizer is the time that x <- x + c g takes in the same rounds, in
proportion to the bytes that each of the two has to read and write once: gradients, and twice
parameters and state. Where torch, adamp, pytorch_optimizer and geoopt are installed, they take
part. Without --batch the optimizers run alone. With --batch they are part of training steps on that
many random images, forward and backward pass included.
"""

import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
from rich.console import Console
from rich.table import Table

from benchmarks.cli import Parser, at_least, to_one_line
from benchmarks.measuring import hlo, kernel_times
from benchmarks.measuring.contenders import EVERY, FLOOR, LEARNING_RATE, REFERENCE, make_optimizers
from benchmarks.measuring.optax_steps import Step, compile_all, count_bytes, make_gradient
from benchmarks.measuring.parameters import LISTED, describe_network
from benchmarks.measuring.speed_peers import TorchStep, describe_torch, make_torch_steps
from benchmarks.reporting import report, tables
from benchmarks.training.models import MODELS

Contenders = Mapping[str, Step | TorchStep]


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
    trace: bool = False,
) -> dict[str, dict[str, Any]]:
    """A row of figures for every optimizer.

    `turn` is called when everything is compiled, and returns when it is time to measure. With `trace`,
    each row has one key more, "trace": the times of single kernels.
    """
    scan = jax.default_backend() != "cpu" if scan is None else scan
    params, grads = make_arrays(shapes, gradients=EVERY if scan else 1)
    steps = {
        name: Step(tx, params, grads, gradient, scan)
        for name, tx in make_optimizers(spheres, weight_decay).items()
        if only is None or name in (REFERENCE, FLOOR, *only)
    }
    compile_all(list(steps.values()))
    peers = {}
    if gradient is None and torch:
        try:
            peers = make_torch_steps(params, grads, spheres, LEARNING_RATE, weight_decay, EVERY)
        except RuntimeError as error:  # PyTorch's, of a GPU without memory, for example
            print(f"without PyTorch: {to_one_line(error)[:200]}", file=sys.stderr)
    turn()
    contenders = {**steps, **peers}
    take_turns(contenders, rounds)
    rows = summarize(contenders, count_bytes(params), alone=gradient is None)
    for name, step in steps.items() if trace else ():
        launches = kernel_times.trace(step.run)
        rows[name]["trace"] = kernel_times.summarize(launches, step.read_program(), EVERY)
    return rows


def make_arrays(shapes: Any, gradients: int) -> tuple[Any, Any]:
    """Random parameters, and random gradients along a leading axis."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(shapes))))

    def draw(x: Any, *more: int) -> jax.Array:
        return 0.05 * jax.random.normal(next(keys), (*more, *x.shape), x.dtype)

    return jax.tree.map(draw, shapes), jax.tree.map(lambda x: draw(x, gradients), shapes)


def take_turns(contenders: Contenders, rounds: int) -> None:
    for step in contenders.values():  # the first call touches memory for the first time
        step.run()
        step.seconds.clear()
    for _ in range(rounds):
        for step in contenders.values():
            step.run()


def summarize(contenders: Contenders, params_bytes: int, alone: bool) -> dict[str, dict[str, Any]]:
    """`alone`: whether the optimizers ran without a network, and can be compared with the floor."""

    def count_bytes_moved(step: Step | TorchStep) -> int:
        return 3 * params_bytes + 2 * step.state_bytes

    reference, floor = contenders[REFERENCE], contenders[FLOOR]
    reference_seconds = statistics.median(reference.seconds)
    floor_seconds = statistics.median(floor.seconds)
    rows = {}
    for name, step in contenders.items():
        seconds = statistics.median(step.seconds)
        share_of_bytes = count_bytes_moved(floor) / count_bytes_moved(step)
        rows[name] = {
            "milliseconds": 1e3 * seconds,
            "time_ratio": seconds / reference_seconds,
            "floor_ratio": seconds / floor_seconds * share_of_bytes if alone else None,
            "state_bytes": step.state_bytes,
            "state_ratio": step.state_bytes / reference.state_bytes,
            "temporary_bytes": step.temporary_bytes,
            "compile_seconds": step.compile_seconds,
        }
    return rows


HEADER = ("optimizer", "ms", "time", "x floor", "state", "temp. MiB", "compile s")


def format_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The figures of every optimizer as texts, with a dash where there is none."""

    def format_or_dash(value: float | None, form: str = "{:.2f}") -> str:
        return "-" if value is None else form.format(value)

    return [
        (
            name,
            format_or_dash(row["milliseconds"]),
            format_or_dash(row["time_ratio"]),
            format_or_dash(row["floor_ratio"]),
            format_or_dash(row["state_ratio"], "{:.3f}"),
            format_or_dash(None if (t := row["temporary_bytes"]) is None else t / 2**20),
            format_or_dash(row["compile_seconds"]),
        )
        for name, row in rows.items()
    ]


def make_table(rows: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    return tables.to_rich(HEADER, format_rows(rows), title)


TRACE_HEADER = ("optimizer", *hlo.LISTED_KINDS, "busy, us", "waiting, us")


def format_traces(traces: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For every optimizer, by kind of kernel: launches, microseconds, and bytes per time."""

    def format_kind(row: Mapping[str, float] | None) -> str:
        if not row:
            return "-"
        speed = row["bytes"] / row["microseconds"] / 1e6
        return f"{row['launches']:.0f}, {row['microseconds']:.0f} us, {speed:.2f} TB/s"

    return [
        (
            name,
            *(format_kind(trace["kinds"].get(kind)) for kind in hlo.LISTED_KINDS),
            f"{trace['busy_microseconds']:.0f}",
            f"{trace['span_microseconds'] - trace['busy_microseconds']:.0f}",
        )
        for name, trace in traces.items()
    ]


def make_file_name(model: str, training: bool = False, few: bool = False, device: str = "") -> str:
    """The name of the file with the results on a device, by default on this one."""
    device = device or report.make_device_slug()
    parts = ("training" if training else "", "few" if few else "", device)
    return "_".join(("speed", *filter(None, parts), f"{model}.json"))


def make_parser() -> Parser:
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
    help_text = "also the times of single kernels, from one more turn under JAX's profiler"
    parser.add_argument("--trace", action="store_true", help=help_text)
    help_text = "also write the numbers into this folder, as JSON"
    parser.add_argument("--out", type=Path, help=help_text)
    help_text = "compile, then measure when this file is there, one process at a time"
    parser.add_argument("--wait-for", type=Path, metavar="FILE", help=help_text)
    return parser


def make_turn(file: Path | None) -> Callable[[], None]:
    """A function that returns when `file` exists and no other process is measuring."""
    if file is None:
        return lambda: None
    lock = filelock.FileLock(f"{file}.lock")

    def turn() -> None:
        print("compiled, waits for its turn", file=sys.stderr, flush=True)
        while not file.exists():
            time.sleep(0.1)
        lock.acquire()  # until this process ends

    return turn


def measure_model(model: str, args: Namespace, turn: Callable[[], None]) -> None:
    shapes, spheres = describe_network(model)
    rows = measure(
        shapes,
        spheres,
        args.rounds,
        args.weight_decay,
        gradient=None if args.batch is None else make_gradient(model, args.batch),
        only=args.only,
        torch=args.torch or args.only is None,
        turn=turn,
        trace=args.trace,
    )
    traces = {name: row.pop("trace") for name, row in rows.items() if "trace" in row}
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    what = f"One training step with {args.batch} images" if args.batch else "One step"
    title = f"{what} on {model}, {parameters:,} parameters; time and state: x {REFERENCE}"
    Console().print(make_table(rows, title))
    if traces:
        what = f"Kernels of one step on {model}: launches, microseconds, TB/s"
        Console().print(tables.to_rich(TRACE_HEADER, format_traces(traces), what))
    if args.out:
        path = args.out / make_file_name(model, bool(args.batch), bool(args.only))
        environment = report.describe_environment() | describe_torch()
        about = {"command": make_command(model, args), "title": title, "environment": environment}
        if traces:
            kernels = {name: trace.pop("kernels") for name, trace in traces.items()}
            report.write_json(
                path.with_name(f"kernels_of_{path.name}"), about | {"kernels": kernels}
            )
        report.write_json(path, about | {"optimizers": rows, "traces": traces})
        print(f"written: {path}")


def make_command(model: str, args: Namespace) -> str:
    words = ["python -m benchmarks.speed", "--model", model, "--rounds", args.rounds]
    words += ["--weight-decay", f"{args.weight_decay:g}"]
    words += ["--batch", args.batch] if args.batch else []
    words += ["--only", *map(shlex.quote, args.only)] if args.only else []
    words += ["--torch"] if args.torch else []
    words += ["--trace"] if args.trace else []
    return " ".join(map(str, words))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out)
    if args.batch and (listed := [name for name in args.model if name in LISTED]):
        parser.error(f"--batch: {', '.join(listed)} are parameters without a network")
    turn = make_turn(args.wait_for)
    for model in args.model:
        measure_model(model, args, turn)


if __name__ == "__main__":
    main()

"""Does the learning rate transfer over width? Optimizers on residual networks of several widths.

    python -m benchmarks.transfer [--widths 32 64 128 256] [--steps 200] [--seeds 4] \\
        [--methods NAME ...] [--out FOLDER]

Every method trains every width at all rates of its grid. The spheres are found in the network of width
32 and declare those of all widths, which is checked before training.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cli import Parser, at_least, write_command
from benchmarks.reporting import report, tables
from benchmarks.reporting.progress import show_progress
from benchmarks.training.flat_digits import BATCH_SIZE
from benchmarks.transfer.findings import Outcome, describe
from benchmarks.transfer.methods import METHODS
from benchmarks.transfer.network import (
    BLOCKS,
    NARROWEST,
    check_shared_spheres,
    find_shared_spheres,
    load_split,
)
from benchmarks.transfer.picture import draw
from benchmarks.transfer.statistics import find_best_cell
from benchmarks.transfer.table import (
    PENALTY_HEADER,
    format_losses,
    format_penalties,
    format_rates,
    make_losses_header,
    make_rates_header,
)
from benchmarks.transfer.training import Ends, Experiment

DEFAULTS: dict[str, Any] = {
    "widths": [32, 64, 128, 256],
    "steps": 200,
    "seeds": 4,
    "methods": list(METHODS),
}
SMALLEST_WIDTH = 8  # below it, LayerNorm's epsilon is no longer small beside a variance


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.transfer", description=str(__doc__).splitlines()[0])
    add, words = parser.add_argument, " ".join(map(str, DEFAULTS["widths"]))
    width = at_least(int, SMALLEST_WIDTH)
    add("--widths", nargs="+", type=width, default=DEFAULTS["widths"], help=f"default: {words}")
    add("--steps", type=at_least(int, 1), default=DEFAULTS["steps"], help="default: %(default)s")
    add("--seeds", type=at_least(int, 1), default=DEFAULTS["seeds"], help="default: %(default)s")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULTS["methods"], help="default: all")
    add("--out", type=Path, help="folder for transfer.json and transfer.png")
    return parser


def run(args: Namespace) -> list[Outcome]:
    training, validation = load_split()
    spheres = find_shared_spheres(training.images)
    for width in args.widths:
        check_shared_spheres(spheres, width, training.images)
    experiment = Experiment(training, validation, spheres, args.steps)
    outcomes = []
    with show_progress(len(args.methods) * len(args.widths)) as advance:
        for name in args.methods:
            method, ends = METHODS[name], dict[int, Ends]()
            for width in args.widths:
                found = experiment.train(method, width, method.rates, range(args.seeds))
                ends[width] = found
                advance(f"{name}, width {width}: rate {method.rates[find_best_cell(found.loss)]:g}")
            outcomes.append(Outcome(name, ends))
    return outcomes


def to_json(args: Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "command": write_command("python -m benchmarks.transfer", args, DEFAULTS),
        "environment": report.describe_environment(),
        "widths": args.widths,
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "blocks": BLOCKS,
        "width_of_the_spheres": NARROWEST,
        "seeds": list(range(args.seeds)),
        **describe(outcomes),
    }


def write_title(content: dict[str, Any]) -> str:
    return (
        f"Digits, {content['steps']} steps, rate decaying linearly to zero, "
        f"seeds: {len(content['seeds'])}"
    )


def print_findings(console: Console, content: dict[str, Any]) -> None:
    methods, title = content["methods"], write_title(content)
    title = f"{title}\nlog2 of the best rate, with 95 % intervals"
    console.print(tables.to_rich(make_rates_header(methods), format_rates(methods), title))
    title = "Loss of the widest network at the narrow one's best rate, to that at its own"
    console.print(tables.to_rich(PENALTY_HEADER, format_penalties(methods), title))
    title = "Training loss, and validation accuracy in %, at the best rate"
    console.print(tables.to_rich(make_losses_header(methods), format_losses(methods), title))
    for sentence in content["verdict"]:
        console.print(sentence, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.widths, args.methods = sorted(set(args.widths)), list(dict.fromkeys(args.methods))
    if args.out:
        parser.require_writable(args.out, args.out)
    console, content = Console(), to_json(args, run(args))
    print_findings(console, content)
    if args.out:
        report.write_json(args.out / "transfer.json", content)
        draw(content["methods"], write_title(content), args.out / "transfer.png")
        console.print(f"written: {args.out}/transfer.json, .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

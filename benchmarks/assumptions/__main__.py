"""The paper's checks of its own hypotheses, on every filter and at every step of a real training.

    python -m benchmarks.assumptions --data-dir DIR [--steps 300] [--model resnet20] [--limit N] \\
        [--out FOLDER]

Theorem 2 requires that 1 - A <c, u> is positive and that steps on the sphere are shorter than pi
(appendix C.1.2). Theorem 4 neglects a term of the radius' fourth power (C.1.5).
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.assumptions.hypotheses import (
    FIRST_STEPS,
    QUANTITIES,
    Array,
    compute_values,
    measure_drift,
    summarize_all,
    write_verdict,
)
from benchmarks.assumptions.picture import draw, make_table
from benchmarks.assumptions.recording import SEED, Diverged, Optimizer, Step, record
from benchmarks.cli import Parser, at_least
from benchmarks.reporting import report
from benchmarks.training import recipes
from benchmarks.training.data import SOURCES, DataError, load
from benchmarks.training.models import MODELS, ImageSizeError


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.assumptions", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--dataset", choices=SOURCES, default="cifar10")
    add("--data-dir", type=Path, help="holds NAME.npz or a TFDS folder; default: TFDS downloads")
    add("--model", choices=MODELS, default="resnet20")
    add("--steps", type=at_least(int, 1), default=300)
    add("--limit", type=at_least(int, 1), help="use only the first training images")
    add("--out", type=Path, help="folder for assumptions.json and assumptions.png")
    return parser


class Findings(NamedTuple):
    """The figures and sentences about the recorded steps, for terminal, file and picture."""

    title: str
    filters: int
    values: dict[str, dict[str, Array]]
    rows: dict[str, dict[str, dict[str, Any]]]
    verdict: dict[str, str]
    drift: dict[str, float]


def judge(args: Namespace, compared: dict[str, Optimizer], steps: dict[str, Step]) -> Findings:
    rates = {name: optimizer.learning_rate for name, optimizer in compared.items()}
    values = compute_values(steps, rates)
    rows = summarize_all(values)
    filters = steps["SGD"].radius.shape[1]
    title = (
        f"{args.model} on {args.dataset}, batches of {recipes.BATCH_SIZE}: all {filters:,} filters "
        f"in the first {args.steps:,} steps, {filters * args.steps:,} values each"
    )
    drift = measure_drift(steps["SGD"], compared["SGD"])
    return Findings(title, filters, values, rows, write_verdict(rows), drift)


def print_findings(console: Console, found: Findings, steps: int) -> None:
    console.print(make_table(found.rows, found.title))
    for key, sentence in found.verdict.items():
        console.print(f"{QUANTITIES[key].label}: {sentence}", highlight=False, markup=False)
    console.print(
        f"radius of SGD by Theorem 4 after {steps} steps: off by {found.drift['median']:.1e} in the "
        f"median, at most {found.drift['max']:.1e} (relative)",
        highlight=False,
    )


def to_json(args: Namespace, compared: dict[str, Optimizer], found: Findings) -> dict[str, Any]:
    limit = f" --limit {args.limit}" if args.limit else ""
    return {
        "command": f"python -m benchmarks.assumptions --dataset {args.dataset} --data-dir DIR "
        f"--model {args.model} --steps {args.steps}{limit} --out FOLDER",
        "environment": report.describe_environment(),
        "filters": found.filters,
        "steps": args.steps,
        "first_steps": FIRST_STEPS,
        "batch_size": recipes.BATCH_SIZE,
        "seed": SEED,
        "optimizers": {
            name: {"learning_rate": o.learning_rate, "l2": o.weight_decay}
            for name, o in compared.items()
        },
        "verdict": found.verdict,
        "quantities": {
            key: {"meaning": QUANTITIES[key].meaning, **by_name}
            for key, by_name in found.rows.items()
        },
        "radius_of_sgd_by_theorem_4_relative_error_after_all_steps": found.drift,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out)
    try:
        data = load(args.dataset, args.data_dir, args.limit)
        compared, steps = record(data, args.model, args.steps)
    except (DataError, ImageSizeError, Diverged) as error:
        parser.error(str(error))
    console, found = Console(), judge(args, compared, steps)
    print_findings(console, found, args.steps)
    if args.out:
        report.write_json(args.out / "assumptions.json", to_json(args, compared, found))
        draw(found.values, found.verdict, found.title, args.out / "assumptions.png")
        console.print(f"written: {args.out}/assumptions.json, .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An effective learning rate that dies: optimizers on tasks one after another, at a constant rate.

    python -m benchmarks.plasticity [--tasks 60] [--steps 150] [--seeds 10] [--methods NAME ...] \\
        [--out FOLDER] [--small]

Every task gives the same 256 images new random labels; network and optimizer state go on. Learning rate
and decay of each method are chosen on three seeds of their own. `--small` takes about a minute: fewer
methods, tasks and seeds, at the rates and decays that benchmarks/results/plasticity.json has.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cli import Parser, at_least, write_command
from benchmarks.plasticity import grid
from benchmarks.plasticity.findings import Outcome, describe
from benchmarks.plasticity.methods import METHODS, Cell
from benchmarks.plasticity.picture import draw
from benchmarks.plasticity.statistics import LAST_TASKS
from benchmarks.plasticity.table import (
    ACCURACY_HEADER,
    TURNS_HEADER,
    format_accuracies,
    format_turns,
)
from benchmarks.plasticity.tasks import (
    IMAGES,
    find_hidden_spheres,
    load_images,
)
from benchmarks.plasticity.training import Experiment
from benchmarks.reporting import report, tables
from benchmarks.reporting.progress import show_progress
from benchmarks.training.flat_digits import BATCH_SIZE, CLASSES

CHOSEN = Path(__file__).parents[1] / "results" / "plasticity.json"
FULL: dict[str, Any] = {"tasks": 60, "steps": 150, "seeds": 10, "methods": list(METHODS)}
SMALL: dict[str, Any] = {**FULL, "tasks": 20, "seeds": 3, "methods": ["adam", "adamw", "nap-head"]}


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.plasticity", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--tasks", type=at_least(int, 1), help=f"default: {FULL['tasks']}")
    add("--steps", type=at_least(int, 1), help=f"of every task; default: {FULL['steps']}")
    add("--seeds", type=at_least(int, 1), help=f"default: {FULL['seeds']}")
    add("--methods", nargs="+", choices=METHODS, help="default: all")
    add("--out", type=Path, help="folder for plasticity.json and plasticity.png")
    small = f"{' '.join(SMALL['methods'])}, {SMALL['tasks']} tasks, {SMALL['seeds']} seeds, no grid"
    add("--small", action="store_true", help=small)
    return parser


def fill_in(args: Namespace) -> Namespace:
    """The options that were not given, of the full or of the small form."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Namespace(**{"out": None, **(SMALL if args.small else FULL), **given})


def read_chosen(path: Path, names: Sequence[str]) -> dict[str, Cell]:
    """The rates and decays that an earlier run has chosen; a `ValueError` if it has not."""
    try:
        methods = json.loads(path.read_text("utf-8"))["methods"]
        return {
            name: Cell(methods[name]["learning_rate"], methods[name]["weight_decay"])
            for name in names
        }
    except (OSError, KeyError) as error:
        raise ValueError(f"--small: no chosen rates ({type(error).__name__}: {error})") from error


def run(args: Namespace, chosen: dict[str, Cell]) -> dict[str, Outcome]:
    """Trains the methods, those without a chosen cell also on the grid."""
    images = load_images()
    experiment = Experiment(images, find_hidden_spheres(images), args.tasks, args.steps)
    outcomes = {}
    with show_progress(2 * len(args.methods)) as advance:
        for name in args.methods:
            method, search, cell = METHODS[name], None, chosen.get(name)
            if cell is None:
                search = grid.search(experiment, method)
                cell = search.chosen
            advance(f"{name}: rate {cell.learning_rate:g}, decay {cell.weight_decay:g}")
            curves = experiment.train(method, [cell], range(args.seeds))
            outcomes[name] = outcome = Outcome(cell, type(curves)(*(x[0] for x in curves)), search)
            advance(f"{name}: accuracy of the last tasks {outcome.last_accuracy.mean():.3f}")
    return outcomes


def to_json(args: Namespace, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    command = "python -m benchmarks.plasticity" + (" --small" if args.small else "")
    return {
        "command": write_command(command, args, FULL),
        "environment": report.describe_environment(),
        "tasks": args.tasks,
        "steps_per_task": args.steps,
        "last_tasks": min(LAST_TASKS, args.tasks),
        "images": IMAGES,
        "classes": CLASSES,
        "batch_size": BATCH_SIZE,
        "seeds": list(range(args.seeds)),
        "grid_seeds": None if args.small else grid.SEEDS,
        **describe(outcomes),
    }


def write_title(content: dict[str, Any]) -> str:
    return (
        f"{content['tasks']} tasks of random labels, {content['steps_per_task']} steps each, "
        f"seeds: {len(content['seeds'])}"
    )


def print_findings(console: Console, content: dict[str, Any]) -> None:
    methods, title = content["methods"], write_title(content)
    title = (
        f"{title}\nTraining accuracy, %, with 95 % intervals; last tasks: {content['last_tasks']}"
    )
    console.print(tables.to_rich(ACCURACY_HEADER, format_accuracies(methods), title))
    title = (
        "Second hidden layer: radius, angle per step and effective rate,\n"
        "means over the steps of the first and of the last task; then the head"
    )
    console.print(tables.to_rich(TURNS_HEADER, format_turns(methods), title))
    for sentence in content["verdict"]:
        console.print(sentence, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = fill_in(parser.parse_args(argv))
    if args.out:
        parser.require_writable(args.out, args.out)
    try:
        chosen = read_chosen(CHOSEN, args.methods) if args.small else {}
    except ValueError as error:
        parser.error(str(error))
    console, content = Console(), to_json(args, run(args, chosen))
    print_findings(console, content)
    if args.out:
        report.write_json(args.out / "plasticity.json", content)
        draw(content["methods"], write_title(content), args.out / "plasticity.png")
        console.print(f"written: {args.out}/plasticity.json, .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

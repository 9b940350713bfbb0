"""What optimizers and discovery cost for large networks, by simulation: nothing large is trained.

    python -m benchmarks.scale [--devices 64 256 1024] [--arrays 10 100 1000 4000] \\
        [--parameters 4e8] [--only sharded arrays discovery] [--out FOLDER]

sharded: one step on 7 billion parameters and on a mixture of experts with 100 layers, compiled for
meshes of fake devices from shapes alone: memory of a device, and what the devices send one another.
arrays: processor time of tracing and compiling a step, against the number of parameter arrays.
discovery: processor time and peak memory of `so.find_spheres`, on transformers of several sizes.

Every measurement has a process of its own. With --out, scale.json is written after each, and the parts
that are not run keep their place in it if it was made with the same version of JAX.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.cli import Parser, at_least, write_options
from benchmarks.reporting import report, tables
from benchmarks.reporting.progress import show_progress
from benchmarks.scale import cases
from benchmarks.scale.sharded import MODEL
from benchmarks.scale.table import TABLES, write_marginal_copies

PARTS = ("sharded", "arrays", "discovery")
DEFAULTS: dict[str, Any] = {
    "devices": cases.DEVICES,
    "arrays": cases.ARRAYS,
    "parameters": 4e8,
    "only": list(PARTS),
}
COMMAND = "python -m benchmarks.scale"


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.scale", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    help_text = "fake devices of the part `sharded`; default: all"
    add("--devices", nargs="+", type=int, choices=MODEL, help=help_text)
    help_text = "numbers of arrays of the part `arrays`; default: 10 100 1000 4000"
    add("--arrays", nargs="+", type=at_least(int, 1), help=help_text)
    help_text = "largest number of the part `discovery`; default: %(default)g"
    add("--parameters", type=at_least(float, 1), help=help_text)
    add("--only", nargs="+", choices=PARTS, help="these parts; default: all")
    add("--out", type=Path, help="folder for scale.json")
    parser.set_defaults(**DEFAULTS)
    return parser


def list_cases(args: Namespace) -> list[cases.Case]:
    listed = {
        "sharded": cases.list_sharded(args.devices),
        "arrays": cases.list_arrays(args.arrays),
        "discovery": cases.list_discovery(args.parameters),
    }
    return [case for part in args.only for case in listed[part]]


def run(args: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measures every part that is asked for, and writes the file after each case."""
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in args.only}
    wanted = list_cases(args)
    with show_progress(max(len(wanted), 1)) as advance:
        for case in wanted:
            row = cases.run(case)
            found[case["part"]].append(row)
            if args.out:
                write(args.out / "scale.json", args, found)
            advance(", ".join(str(value) for value in case.values()))
    return found


def write(path: Path, args: Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Puts the parts into the file, beside those that another call has measured."""
    environment = report.describe_environment()
    parts: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if old["environment"]["jax"] == environment["jax"]:
            parts = old["parts"]
    options = write_options(args, {**DEFAULTS, "only": args.only})
    for part, rows in found.items():
        if not rows:
            continue
        command = " ".join([COMMAND, *options, "--only", part, "--out FOLDER"])
        parts[part] = {"command": command, "cases": rows}
    ordered = {part: parts[part] for part in PARTS if part in parts}
    about = {"command": f"{COMMAND} --out FOLDER", "environment": environment}
    report.write_json(path, about | {"parts": ordered})


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.devices, args.arrays = sorted(set(args.devices)), sorted(set(args.arrays))
    args.only = [part for part in PARTS if part in args.only]
    if args.out:
        parser.require_writable(args.out, args.out)
    jax.config.update("jax_platforms", "cpu")  # leaves a GPU alone, even where there is one
    console, found = Console(width=120), run(args)
    for part, rows in found.items():
        table = TABLES[part]
        console.print(tables.to_rich(table.header, table.format_rows(rows), table.title))
        if part == "discovery":
            console.print(write_marginal_copies(rows), highlight=False)
    if args.out:
        console.print(f"written: {args.out}/scale.json", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

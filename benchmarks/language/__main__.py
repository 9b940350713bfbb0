"""A small language model: optimizers on a decoder with normalised queries and keys.

    python -m benchmarks.language [--width 64] [--layers 2] [--heads 4] [--context 64] [--batch 16] \\
        [--steps 600] [--seeds 5] [--dtype float32] [--methods NAME ...] [--out FOLDER]

The text is that of Python's own help, character by character. Rate, and decay or ratio, of each method
are chosen on a seed of their own. FOLDER keeps every run: the same command goes on where it was stopped,
and a second one that is started beside it shares the work.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.cli import Parser, add_dtype, at_least, write_command
from benchmarks.language import grid
from benchmarks.language.findings import Outcome, describe
from benchmarks.language.methods import METHODS, Cell, Spheres
from benchmarks.language.network import Sizes, init_params
from benchmarks.language.picture import draw
from benchmarks.language.runs import Job, Runs
from benchmarks.language.spheres import declare_matrices, find_narrow_spheres
from benchmarks.language.table import LOSS_HEADER, TURNS_HEADER, format_losses, format_turns
from benchmarks.language.text import Corpus, load_corpus
from benchmarks.language.training import Record, Setting, Trainer
from benchmarks.reporting import report, tables

EVALUATIONS = 12
DEFAULTS: dict[str, Any] = {
    "width": 64,
    "layers": 2,
    "heads": 4,
    "context": 64,
    "batch": 16,
    "steps": 600,
    "seeds": 5,
    "dtype": "float32",
    "methods": list(METHODS),
}
LARGEST_CONTEXT = 8192


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.language", description=str(__doc__).splitlines()[0])
    help_texts = {
        "width": "features of the residual stream",
        "layers": "blocks",
        "heads": "of every attention, with an even number of features each",
        "context": "characters of a window",
        "batch": "windows of a step",
        "steps": "of every run",
        "seeds": "of the table",
    }
    for name, text in help_texts.items():
        limits = (2, LARGEST_CONTEXT + 1) if name == "context" else (1,)
        kind, default = at_least(int, *limits), DEFAULTS[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text}; {default}")
    add_dtype(parser)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=DEFAULTS["methods"], help="default: all")
    add("--out", type=Path, help="folder for language.json, language.png and runs/")
    return parser


def run(args: Namespace, corpus: Corpus, folder: Path) -> list[Outcome]:
    sizes = read_sizes(args, corpus)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), sizes))
    spheres = Spheres(find_narrow_spheres(sizes), declare_matrices(shapes))
    setting = Setting(corpus, sizes, args.batch, args.steps)
    recipe = {
        "sizes": sizes._asdict(),
        "batch": args.batch,
        "steps": args.steps,
        "text": corpus.sha256,
        "device": jax.devices()[0].device_kind,
    }
    runs, progress, outcomes = Runs(folder, recipe), Console(stderr=True), []

    def say(job: Job, record: Record) -> None:
        rate, decay, ratio = job.cell
        progress.print(
            f"{job.method}, rate {rate:g}, decay {decay:g}, ratio {ratio:g}, seed {job.seed}: "
            f"loss {record.validation[-1]:.4f} in {record.seconds:.0f} s",
            highlight=False,
        )

    for name in args.methods:
        trainer = Trainer(setting, METHODS[name], spheres)
        complete = partial(runs.complete, train=trainer.train, finished=say)
        seconds = list[float]()

        def compute_losses(
            cells: Sequence[Cell], name: str = name, complete: Any = complete, to: Any = seconds
        ) -> list[float]:
            records = complete([Job(name, cell, grid.SEED, 1) for cell in cells])
            to.extend(record.seconds for record in records)
            return [record.validation[-1] for record in records]

        found = grid.search(METHODS[name], compute_losses)
        jobs = [Job(name, found.chosen, seed, EVALUATIONS) for seed in range(args.seeds)]
        records = complete(jobs)
        seconds.extend(record.seconds for record in records)
        outcomes.append(Outcome(name, found, records, sum(seconds)))
    return outcomes


def read_sizes(args: Namespace, corpus: Corpus) -> Sizes:
    characters = len(corpus.characters)
    return Sizes(args.width, args.layers, args.heads, args.context, characters, args.dtype)


def to_json(args: Namespace, corpus: Corpus, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "command": write_command("python -m benchmarks.language", args, DEFAULTS),
        "environment": report.describe_environment(),
        "text": {
            "training_characters": len(corpus.training),
            "validation_characters": len(corpus.validation),
            "different_characters": len(corpus.characters),
            "sha256": corpus.sha256,
        },
        **read_sizes(args, corpus)._asdict(),
        "parameters": count_parameters(read_sizes(args, corpus)),
        "batch": args.batch,
        "steps": args.steps,
        "seeds": list(range(args.seeds)),
        "grid_seeds": [grid.SEED],
        "seconds_of_all_runs": sum(outcome.seconds for outcome in outcomes),
        **describe(outcomes),
    }


def count_parameters(sizes: Sizes) -> int:
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), sizes))
    return sum(x.size for x in jax.tree.leaves(shapes))


def write_title(content: dict[str, Any]) -> str:
    return (
        f"Characters of Python's help, {content['parameters']:,} parameters, {content['steps']} steps, "
        f"seeds: {len(content['seeds'])}"
    )


def print_findings(console: Console, content: dict[str, Any]) -> None:
    methods, title = content["methods"], write_title(content)
    title = f"{title}\nValidation loss in nats per character, with 95 % intervals"
    console.print(tables.to_rich(LOSS_HEADER, format_losses(methods), title))
    title = (
        "Queries and keys by head, the other matrices whole: radius, angle per step and\n"
        "effective rate, medians, from the end of the warm-up to the last steps"
    )
    console.print(tables.to_rich(TURNS_HEADER, format_turns(methods), title, words=2))
    for sentence in content["verdict"]:
        console.print(sentence, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} is no multiple of twice --heads {args.heads}")
    if args.out:
        parser.require_writable(args.out, args.out)
    console, corpus = Console(), load_corpus()
    if args.context >= len(corpus.validation):
        parser.error(f"--context {args.context} is longer than the validation text")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = (args.out or Path(nowhere)) / "runs"
        content = to_json(args, corpus, run(args, corpus, folder))
    print_findings(console, content)
    if args.out:
        report.write_json(args.out / "language.json", content)
        stops, path = content["evaluated_after"], args.out / "language.png"
        draw(content["methods"], stops, write_title(content), path)
        console.print(f"written: {args.out}/language.json, .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

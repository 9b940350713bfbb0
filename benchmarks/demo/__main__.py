"""`make demo`: the paper's Table 2 and Figure 3 in miniature, in a few minutes on two CPU cores.

python -m benchmarks.demo            trains with the committed learning rates
python -m benchmarks.demo --grid     chooses these rates anew
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import spherical_optax as so
from benchmarks.cli import Parser
from benchmarks.demo import grid
from benchmarks.demo.recipe import RECIPE, make_model, make_trainer
from benchmarks.reporting import figures, report
from benchmarks.reporting.progress import show_progress
from benchmarks.reporting.significance import write_verdict
from benchmarks.training.build import find_filter_spheres
from benchmarks.training.data import load
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.recipes import PAPER_METHODS
from benchmarks.training.run import Run
from benchmarks.training.trainer import State, Trainer

SEEDS = (0, 1, 2)
ROOT = Path(__file__).parents[2]
OUT = ROOT / "results" / "demo"


Radii = list[np.ndarray]  # of all filters, at the start and after each epoch


def run_demo(console: Console) -> None:
    start = time.perf_counter()
    data, rates = load("digits"), grid.read_chosen_rates()
    spheres = find_filter_spheres(make_model(data), data.source.shape)
    count = len(jax.tree.leaves(spheres))
    console.print(f"Found by measurement: {count} arrays on spheres, one sphere per filter\n")

    @jax.jit
    def measure_radii(params: Any) -> jax.Array:
        radii = jax.tree.leaves(so.geometry.norm(params, spheres))
        return jnp.concatenate([r.ravel() for r in radii])

    results, radii = [], {}
    with show_progress(len(PAPER_METHODS) * len(SEEDS) * RECIPE.epochs) as advance:
        for name in PAPER_METHODS:
            trainer = make_trainer(name, rates[name], data)
            result, filters = train_method(name, rates[name], trainer, measure_radii, advance)
            results.append(result)
            radii[result.label] = compute_median_radius(filters)

    print_results(console, results, test_images=len(data.test.labels))
    write_results(results, radii)
    console.print(f"\nWrote {', '.join(sorted(p.name for p in OUT.iterdir()))} in results/demo/")
    console.print(f"Took {time.perf_counter() - start:.0f} s", highlight=False)


def train_method(
    name: str,
    learning_rate: float,
    trainer: Trainer,
    measure_radii: Callable[[Any], jax.Array],
    advance: Callable[[str], None],
) -> tuple[report.Result, list[Radii]]:
    """The runs of all seeds, and the radii in each."""
    label, runs, radii = OPTIMIZERS[name].label, [], []

    def show(run: Run) -> None:
        epoch, loss = len(run.train_loss), run.train_loss[-1]
        advance(f"{label}, seed {run.seed}, epoch {epoch}: loss {loss:.4f}")

    for seed in SEEDS:
        run, filters = train(trainer, seed, measure_radii, show)
        runs.append(run)
        radii.append(filters)
    memory = trainer.state_bytes_per_parameter
    return report.Result(name, label, learning_rate, memory, runs), radii


def train(
    trainer: Trainer,
    seed: int,
    measure_radii: Callable[[Any], jax.Array],
    show: Callable[[Run], None],
) -> tuple[Run, Radii]:
    radii = [np.asarray(measure_radii(trainer.init(seed).params))]

    def on_epoch(run: Run, state: State) -> None:
        radii.append(np.asarray(measure_radii(state.params)))
        show(run)

    return trainer.run(seed, RECIPE.epochs, on_epoch), radii


def compute_median_radius(radii: Sequence[Radii]) -> list[float]:
    """The median over all filters and the seeds that finished, for each epoch from 0."""
    finished = [run for run in radii if len(run) == RECIPE.epochs + 1]
    return np.median(np.concatenate(finished, axis=1), axis=1).tolist() if finished else []


def print_results(console: Console, results: Sequence[report.Result], test_images: int) -> None:
    title = f"digits: test accuracy on {test_images} images, mean ± std over {len(SEEDS)} seeds"
    console.print(report.make_table(results, title))
    console.print(f"Learning rates: chosen beforehand in {grid.PATH.relative_to(ROOT)}")
    console.print(f"\n{write_verdict(results)}", highlight=False)


def write_results(results: Sequence[report.Result], radii: dict[str, list[float]]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m benchmarks.demo",
        "recipe": RECIPE.describe(),
        "learning_rates_chosen_in": str(grid.PATH.relative_to(ROOT)),
        "environment": report.describe_environment(),
        "verdict": write_verdict(results),
        "results": [report.to_json(result) for result in results],
        "median_radius_of_the_filters": radii,
    }
    report.write_json(OUT / "demo.json", content)
    figures.draw_training_loss(results, OUT / "training_loss.png")
    figures.draw_median_radius(radii, OUT / "radii.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.demo", description=str(__doc__))
    parser.add_argument("--grid", action="store_true", help="choose the learning rates anew")
    console = Console()
    if parser.parse_args(argv).grid:
        console.print(grid.search())
    else:
        run_demo(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

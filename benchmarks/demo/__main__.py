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


def train(
    trainer: Trainer,
    seed: int,
    filter_radii: Callable[[Any], jax.Array],
    advance: Callable[[Run], None],
) -> tuple[Run, list[np.ndarray]]:
    """One run, and the filters' radii at its start and after each epoch."""
    radii = [np.asarray(filter_radii(trainer.init(seed).params))]

    def on_epoch(run: Run, state: State) -> None:
        radii.append(np.asarray(filter_radii(state.params)))
        advance(run)

    return trainer.run(seed, RECIPE.epochs, on_epoch), radii


def compute_median_radius(radii: Sequence[list[np.ndarray]]) -> list[float]:
    """Over all filters and the seeds that finished, for each epoch from 0."""
    finished = [run for run in radii if len(run) == RECIPE.epochs + 1]
    return np.median(np.concatenate(finished, axis=1), axis=1).tolist() if finished else []


def run_demo(console: Console) -> None:
    start = time.perf_counter()
    data = load("digits")
    rates = grid.read_chosen_rates()
    spheres = find_filter_spheres(make_model(data), data.source.shape)
    found = len(jax.tree.leaves(spheres))
    console.print(f"Found by measurement: {found} arrays on spheres, one sphere per filter\n")

    @jax.jit
    def filter_radii(params: Any) -> jax.Array:
        radii = jax.tree.leaves(so.geometry.norm(params, spheres))
        return jnp.concatenate([r.ravel() for r in radii])

    results, radii = [], {}
    with show_progress(len(PAPER_METHODS) * len(SEEDS) * RECIPE.epochs) as advance:
        for name in PAPER_METHODS:
            label = OPTIMIZERS[name].label
            trainer = make_trainer(name, rates[name], data)

            def show(run: Run, label: str = label) -> None:
                epoch, loss = len(run.train_loss), run.train_loss[-1]
                advance(f"{label}, seed {run.seed}, epoch {epoch}: loss {loss:.4f}")

            trained = [train(trainer, seed, filter_radii, show) for seed in SEEDS]
            memory = trainer.state_bytes_per_parameter
            runs = [run for run, _ in trained]
            results.append(report.Result(name, label, rates[name], memory, runs))
            radii[label] = compute_median_radius([filters for _, filters in trained])

    test_images = len(data.test.labels)
    title = f"digits: test accuracy on {test_images} images, mean ± std over {len(SEEDS)} seeds"
    console.print(report.make_table(results, title))
    console.print(f"Learning rates: chosen beforehand in {grid.PATH.relative_to(ROOT)}")
    console.print(f"\n{write_verdict(results)}", highlight=False)

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
    console.print(f"\nWrote {', '.join(sorted(p.name for p in OUT.iterdir()))} in results/demo/")
    console.print(f"Took {time.perf_counter() - start:.0f} s", highlight=False)


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

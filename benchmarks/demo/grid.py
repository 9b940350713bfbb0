"""The demo's learning rates: one grid for all methods, judged on the validation images.

The outcome is committed, with every cell, so that the demo itself tunes nothing. The grid and the demo
have different seeds: the demo's table is no maximum over the runs that chose the rates.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.demo.recipe import RECIPE, make_trainer
from benchmarks.reporting import report
from benchmarks.reporting.progress import show_progress
from benchmarks.training import recipes
from benchmarks.training.data import load
from benchmarks.training.run import Run

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = (100, 101, 102)
PATH = Path(__file__).parents[1] / "results" / "demo_grid.json"


def search() -> dict[str, float]:
    """Runs every cell, writes all cells to `PATH` and returns the rate chosen for each method."""
    data = load("digits")
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes.PAPER_METHODS}
    with show_progress(len(recipes.PAPER_METHODS) * len(RATES)) as advance:
        for name in recipes.PAPER_METHODS:
            for rate in RATES:
                trainer = make_trainer(name, rate, data)
                runs = [trainer.run(seed, RECIPE.epochs) for seed in SEEDS]
                cells[name].append(_summarize_cell(rate, runs))
                accuracy = cells[name][-1]["mean_validation_accuracy"]
                advance(f"{name} at {rate:g}: validation {accuracy:.2f} %")
    chosen = {name: choose_rate(cells[name]) for name in recipes.PAPER_METHODS}
    content = {
        "command": "python -m benchmarks.demo --grid",
        "criterion": "highest mean validation accuracy, then lowest mean training loss",
        "recipe": RECIPE.describe(),
        "environment": report.describe_environment(),
        "seeds": SEEDS,
        "chosen": chosen,
        "cells": cells,
    }
    PATH.parent.mkdir(exist_ok=True)
    report.write_json(PATH, content)
    return chosen


def choose_rate(cells: list[dict[str, Any]]) -> float:
    def rank(cell: dict[str, Any]) -> tuple[float, float]:
        return recipes.rank(cell["mean_validation_accuracy"], cell["mean_train_loss"])

    return max((cell for cell in cells if not cell["diverged"]), key=rank)["learning_rate"]


def read_chosen_rates() -> dict[str, float]:
    """The committed rates; ends the program if they were chosen under another recipe."""
    grid = json.loads(PATH.read_text(encoding="utf-8"))
    if grid["recipe"] != RECIPE.describe():
        raise SystemExit(f"{PATH.name} belongs to another recipe: run {grid['command']}")
    return grid["chosen"]


def _summarize_cell(rate: float, runs: list[Run]) -> dict[str, Any]:
    validation = [max(run.validation_accuracy, default=0.0) for run in runs]
    train_loss = [run.train_loss[-1] for run in runs]
    return {
        "learning_rate": rate,
        "diverged": sum(run.diverged for run in runs),
        "mean_validation_accuracy": statistics.fmean(validation),
        "mean_train_loss": statistics.fmean(train_loss),
        "validation_accuracy": validation,
        "train_loss": train_loss,
    }

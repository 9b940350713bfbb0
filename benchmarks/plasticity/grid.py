"""The learning rate and decay of each method, chosen on seeds that the table does not use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.plasticity.methods import Cell, Method
from benchmarks.plasticity.statistics import average_last_tasks
from benchmarks.plasticity.training import Experiment

SEEDS = (100, 101, 102)


class Search(NamedTuple):
    """A grid: for each cell the mean accuracy of the last ten tasks, one number per seed."""

    cells: list[Cell]
    accuracies: np.ndarray  # (cells, seeds)

    @property
    def chosen(self) -> Cell:
        return choose(self.cells, self.accuracies)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            cell._asdict() | {"mean": float(row.mean()), "seeds": row.tolist()}
            for cell, row in zip(self.cells, self.accuracies, strict=True)
        ]


def search(experiment: Experiment, method: Method) -> Search:
    cells = method.list_cells()
    return Search(cells, average_last_tasks(experiment.train(method, cells, SEEDS).accuracy))


def choose(cells: Sequence[Cell], accuracies: np.ndarray) -> Cell:
    """The cell with the highest mean over the seeds; of equal ones the first."""
    return cells[int(np.argmax(accuracies.mean(1)))]

"""The rate, and the decay or ratio, of each method, chosen on a seed that the table does not use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.language.methods import Cell, Method
from benchmarks.reporting.report import round_all

SEED = 100


class Search(NamedTuple):
    """The cells that were tried, and the validation loss behind the last step for each."""

    cells: Sequence[Cell]
    losses: Sequence[float]

    @property
    def chosen(self) -> Cell:
        """The cell with the smallest loss, of equal ones the first; a run that diverged has none."""
        return self.cells[int(np.argmin(np.nan_to_num(self.losses, nan=np.inf)))]

    def to_json(self) -> list[Mapping[str, Any]]:
        losses = round_all(self.losses)
        return [cell._asdict() | {"loss": x} for cell, x in zip(self.cells, losses, strict=True)]


def search(method: Method, compute_losses: Callable[[Sequence[Cell]], Sequence[float]]) -> Search:
    """Some rates at first; then all cells beside the best one, until none of these is better.

    What is beside it has half the rate, the same or twice as much, and any decay, or a quarter of the
    ratio, the same or four times as much.
    """
    found, wanted = dict[Cell, float](), method.list_first()
    while wanted:
        found |= zip(wanted, compute_losses(wanted), strict=True)
        chosen = Search(list(found), list(found.values())).chosen
        wanted = [cell for cell in method.list_beside(chosen) if cell not in found]
    cells = sorted(found, key=lambda cell: (cell.weight_decay, cell.ratio, cell.learning_rate))
    return Search(cells, [found[cell] for cell in cells])

"""The rate, and the decay or ratio, of each method, chosen on a seed that the table does not use."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.language.methods import Cell
from benchmarks.reporting.report import round_all

SEED = 100


class Search(NamedTuple):
    """A grid, and the validation loss behind the last step for each cell."""

    cells: Sequence[Cell]
    losses: Sequence[float]

    @property
    def chosen(self) -> Cell:
        """The cell with the smallest loss, of equal ones the first; a run that diverged has none."""
        return self.cells[int(np.argmin(np.nan_to_num(self.losses, nan=np.inf)))]

    def to_json(self) -> list[Mapping[str, Any]]:
        losses = round_all(self.losses)
        return [cell._asdict() | {"loss": x} for cell, x in zip(self.cells, losses, strict=True)]

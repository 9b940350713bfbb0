"""The runs that a table needs: the cells of a grid, then every method with every seed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.runs.store import Job, Store
from benchmarks.training import recipes
from benchmarks.training.run import Run


class Setting(NamedTuple):
    """Everything that decides which runs one column of the table needs."""

    methods: Sequence[str]
    seeds: int
    epochs: int | None  # None: the column's
    images: int | None  # of the training set; None: the column's
    batch_size: int
    dtype: str
    grid: bool  # whether a grid chooses learning rates and weight decays
    rates: Sequence[float] = recipes.GRID_RATES
    decays: Sequence[float] = recipes.GRID_DECAYS


class Sweep:
    """The jobs of a setting. After a grid, their learning rates depend on what the store holds."""

    def __init__(self, setting: Setting, store: Store):
        self.setting, self.store = setting, store

    def list_jobs(self, column: str) -> list[Job]:
        """Every method's first seed, then every method's second: an interrupted table has all rows."""
        chosen = self.choose(column)
        return [
            self._make_job(column, method, chosen[method], seed)
            for seed in range(self.setting.seeds)
            for method in self.setting.methods
        ]

    def list_grid_jobs(self, column: str) -> list[Job]:
        setting = self.setting
        return [
            self._make_job(column, method, values, recipes.GRID_SEED)
            for method in setting.methods
            for values in recipes.list_grid(method, rates=setting.rates, decays=setting.decays)
        ]

    def choose(self, column: str) -> dict[str, recipes.Hyperparameters]:
        """The best cells of a grid that has been run, or the values of training/recipes.py."""
        dataset, model, *_ = recipes.COLUMNS[column]
        if not self.setting.grid:
            return {
                method: recipes.get_hyperparameters(dataset, model, method)
                for method in self.setting.methods
            }
        grid = self.list_grid_jobs(column)
        results = {job: result for job in grid if (result := self.store.read_result(job))}
        return {
            method: choose_best(
                {job: result for job, result in results.items() if job.method == method}
            ).values
            for method in self.setting.methods
        }

    def _make_job(
        self, column: str, method: str, values: recipes.Hyperparameters, seed: int
    ) -> Job:
        setting, about = self.setting, recipes.COLUMNS[column]
        return Job(
            column=column,
            method=method,
            **values._asdict(),
            epochs=setting.epochs or about.epochs,
            batch_size=setting.batch_size,
            images=setting.images or about.images,
            dtype=setting.dtype,
            seed=seed,
        )


def choose_best(results: dict[Job, dict[str, Any]]) -> Job:
    """The job of the best cell; a cell that diverged comes last."""

    def rank(job: Job) -> tuple[float, float]:
        run = Run(**results[job]["run"])
        if run.diverged:
            return -1.0, 0.0
        return recipes.rank(max(run.validation_accuracy), run.train_loss[-1])

    return max(results, key=rank)

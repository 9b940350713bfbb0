"""Stored runs of `benchmarks.table2`, one study for each column and setting, and its parts of a page."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import claims, comparison, report
from benchmarks.reporting.published import TABLE2
from benchmarks.reporting.tables import to_markdown
from benchmarks.runs.plan import Setting, Sweep, choose_best
from benchmarks.runs.store import Job, Store
from benchmarks.training import recipes
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.run import Run


class Study:
    """All stored runs of one column in one setting."""

    def __init__(self, store: Store, stored: Sequence[Job]):
        self.store, self.any_job = store, stored[0]
        self.column, self.setting = self.any_job.column, reconstruct_setting(stored)
        sweep = Sweep(self.setting, store)
        self.grid = [job for job in sweep.list_grid_jobs(self.column) if store.holds(job)]
        self.jobs = [job for job in sweep.list_jobs(self.column) if store.holds(job)]
        self.results = comparison.collect_results(store, self.jobs)
        self.figure = comparison.locate_figure(store.folder, self.any_job)

    @property
    def title(self) -> str:
        job = self.any_job
        images = "all" if job.images is None else f"{job.images:,}"
        return (
            f"{job.column}: {images} training images, {job.epochs} epochs, "
            f"batches of {job.batch_size}, {job.dtype}"
        )

    @property
    def command(self) -> str:
        """The command line that trains all these runs."""
        setting = self.setting
        methods = list(dict.fromkeys(job.method for job in [*self.grid, *self.jobs]))
        words = ["python -m benchmarks.table2 --columns", self.column]
        if not set(methods) <= set(recipes.PAPER_METHODS):  # these are the default
            words += ["--methods", *methods]
        words += ["--seeds", setting.seeds] if setting.seeds else []
        words += ["--epochs", setting.epochs]
        words += [] if setting.images is None else ["--images", setting.images]
        words += ["--batch-size", setting.batch_size, "--dtype", setting.dtype]
        words += ["--grid", *self._list_grid_options()] if self.grid else []
        return " ".join(map(str, [*words, "--data-dir DIR --out OUT"]))

    def _list_grid_options(self) -> list[str]:
        """Options for a grid of which only a part was run."""
        cells = {(job.method, job.learning_rate, job.weight_decay) for job in self.grid}

        def was_tried(**axis: Sequence[float]) -> bool:
            return any(
                (method, cell.learning_rate, cell.weight_decay) in cells
                for method in {job.method for job in self.grid}
                for cell in recipes.list_grid(method, 0.99, **axis)
            )

        rates = [f"{rate:g}" for rate in recipes.GRID_RATES if was_tried(rates=[rate])]
        decays = [f"{decay:g}" for decay in recipes.GRID_DECAYS if was_tried(decays=[decay])]
        options = ["--rates", *rates] if len(rates) < len(recipes.GRID_RATES) else []
        return options + (["--decays", *decays] if len(decays) < len(recipes.GRID_DECAYS) else [])

    def list_rows(self) -> list[tuple[report.Result, Job]]:
        """Each result with one of its jobs, which has the values that all seeds share."""
        first = {job.method: job for job in reversed(self.jobs)}
        return [(result, first[result.name]) for result in self.results]

    def read_results(self, jobs: Sequence[Job]) -> dict[Job, dict[str, Any]]:
        return {job: content for job in jobs if (content := self.store.read_result(job))}


def reconstruct_setting(stored: Sequence[Job]) -> Setting:
    """The setting of the command line that made these runs."""
    any_job = stored[0]
    grid = any(job.seed == recipes.GRID_SEED for job in stored)
    # After a grid, a method's learning rate is known only if the method was in the grid.
    methods = {job.method for job in stored if not grid or job.seed == recipes.GRID_SEED}
    seeds = [job.seed for job in stored if job.seed != recipes.GRID_SEED]
    return Setting(
        methods=[name for name in OPTIMIZERS if name in methods],
        seeds=1 + max(seeds, default=-1),
        epochs=any_job.epochs,
        images=any_job.images,
        batch_size=any_job.batch_size,
        dtype=any_job.dtype,
        grid=grid,
    )


def list_studies(folder: Path) -> list[Study]:
    store = Store(folder, print)
    settings: dict[tuple, list[Job]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text("utf-8"))
            job = Job(**content["recipe"])
            platform = report.read_platform(content["environment"])
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"error: {path}: no result of a run ({error})") from error
        key = (platform, job.column, job.epochs, job.batch_size, str(job.images), job.dtype)
        settings.setdefault(key, []).append(job)
    return [Study(store, jobs) for _, jobs in sorted(settings.items())]


# --- parts of a page --------------------------------------------------------------------------


def write_heading(study: Study) -> Iterator[str]:
    yield f"### {study.title}"
    yield f"```\n{study.command}\n```"
    yield describe_cost(study)


def describe_cost(study: Study) -> str:
    contents = study.read_results([*study.grid, *study.jobs]).values()
    hours = sum(content["wall_seconds"] for content in contents) / 3600
    devices = sorted({str(content["environment"]["device"]) for content in contents})
    speed = statistics.median(
        content["recipe"]["batch_size"] / statistics.median(content["run"]["step_time"])
        for content in contents
    )
    return (
        f"{len(contents)} runs, {hours:.1f} hours of them added up, {speed:,.0f} images per second in "
        f"the median run; device: {', '.join(devices)}. Commits: "
        f"{', '.join(sorted({str(content['commit'])[:7] for content in contents}))}."
    )


def make_accuracy_table(study: Study, *more: tuple[report.Result, Job]) -> str:
    """One row per method; the rows of `more` come first."""
    has_published = any(column == study.column for column, _ in TABLE2)
    rows = []
    for result, job in (*more, *study.list_rows()):
        row = [result.label, f"{job.learning_rate:g}", f"{job.weight_decay:g}"]
        row.append(comparison.format_cell(result))
        if has_published:
            row.append(comparison.format_published(study.column, result.name))
        rows.append([*row, report.format_mean_std(result.train_losses, 4)])
    header = ["method", "rate", "decay", "test accuracy, % (seeds)"]
    header += ["paper"] if has_published else []
    return to_markdown([*header, "last training loss"], rows)


def make_claims_table(study: Study) -> str:
    runs = {result.name: {run.seed: run for run in result.runs} for result in study.results}
    rows = [
        (
            finding.claim.words,
            finding.claim.quantity,
            finding.name_methods(),
            finding.describe(),
            str(finding.seeds),
            finding.verdict,
        )
        for finding in claims.judge_claims(runs)
    ]
    return to_markdown(("the paper", "of", "what", "here (95 %)", "seeds", ""), rows)


def make_grid_table(study: Study) -> str:
    """The best validation accuracy of every cell; the chosen cell in bold."""
    contents = study.read_results(study.grid)
    rows = []
    for method in dict.fromkeys(job.method for job in contents):
        results = {job: content for job, content in contents.items() if job.method == method}
        chosen, texts = choose_best(results), {}
        for job, content in results.items():
            run = Run(**content["run"])
            epoch = run.best_epoch
            text = "diverged" if epoch is None else f"{run.validation_accuracy[epoch]:.2f}"
            place = job.learning_rate, job.weight_decay
            texts[place] = f"**{text}**" if job == chosen else text
        row = [texts.get((rate, decay), "") for rate, _, decay in recipes.list_grid(method)]
        if len(row) == len(recipes.GRID_RATES):  # a method without decay: one cell for two
            row = [text for cell in row for text in (cell, "")]
        rows.append([OPTIMIZERS[method].label, f"{recipes.LEARNING_RATES[method]:g} x", *row])
    cells = [f"{rate:g}, {decay:g}" for rate in recipes.GRID_RATES for decay in recipes.GRID_DECAYS]
    return to_markdown(("method", "rate", *cells), rows)

"""The results of a table beside those that the paper published."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.reporting import report, tables
from benchmarks.reporting.published import TABLE2
from benchmarks.runs.store import Job, Store
from benchmarks.training.methods import OPTIMIZERS
from benchmarks.training.run import Run


def collect_results(store: Store, jobs: Sequence[Job]) -> list[report.Result]:
    """One result per method, from the jobs that have finished."""
    finished: dict[str, list[tuple[Job, Run]]] = {}
    for job in jobs:
        if content := store.read_result(job):
            finished.setdefault(job.method, []).append((job, Run(**content["run"])))
    return [
        report.Result(
            name=method,
            label=OPTIMIZERS[method].label,
            learning_rate=rows[0][0].learning_rate,
            state_bytes_per_parameter=0.0,  # is not stored
            runs=[run for _, run in rows],
        )
        for method, rows in finished.items()
    ]


def make_table(columns: Mapping[str, Sequence[report.Result]]) -> Table:
    """One row per method: for each column our test accuracy, then the paper's."""
    header = ["method", *(name for column in columns for name in (column, "paper"))]
    by_name = {
        column: {result.name: result for result in results} for column, results in columns.items()
    }
    rows = []
    for method, optimizer in OPTIMIZERS.items():
        if any(method in results for results in by_name.values()):
            cells = [
                text
                for column, results in by_name.items()
                for text in (format_cell(results.get(method)), format_published(column, method))
            ]
            rows.append([optimizer.label, *cells])
    return tables.to_rich(header, rows, framed=True)


def format_cell(result: report.Result | None) -> str:
    """Mean and standard deviation of the test accuracy, and the number of seeds."""
    if result is None:
        return "-"
    accuracies = result.test_accuracies
    diverged = sum(run.diverged for run in result.runs)
    text = report.format_mean_std(accuracies, 2) + (f" ({len(accuracies)})" if accuracies else "")
    return f"{text}, {diverged} diverged" if diverged else text


def format_published(column: str, method: str) -> str:
    published = TABLE2.get((column, method))
    return "{:.2f} ± {:.2f}".format(*published) if published else "-"


def locate_figure(folder: Path, job: Job) -> Path:
    return folder / f"{job.column.replace('/', '_')}_{job.setting}_training_loss.png"

"""The result of a set of runs: a row of a table, and JSON with every number."""

import json
import math
import os
import platform as python_platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import spherical_optax as so
from benchmarks.reporting import tables
from benchmarks.training.run import Run

HEADER = ("method", "optimizer", "rate", "test acc. %", "train loss", "ms/step", "B/param")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Result:
    """All seeds of one method. Statistics leave out the seeds that diverged."""

    name: str  # as on the command line
    label: str  # as in the paper
    learning_rate: float
    state_bytes_per_parameter: float
    runs: Sequence[Run]

    @property
    def test_accuracies(self) -> list[float]:
        return [x for run in self.runs if (x := run.selected_test_accuracy) is not None]

    @property
    def train_losses(self) -> list[float]:
        return [run.train_loss[-1] for run in self.runs if not run.diverged]

    @property
    def step_time(self) -> float:
        return statistics.median(t for run in self.runs for t in run.step_time)


def _summarize(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of the sample (n - 1). A single value has no standard deviation."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def format_mean_std(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation if there is one; a dash if there are no values."""
    found = _summarize(values)
    return " ± ".join(f"{x:.{digits}f}" for x in found.values() if x is not None) or "-"


def make_table(results: Sequence[Result], title: str) -> Table:
    rows = [
        (
            result.label,
            result.name,
            f"{result.learning_rate:g}",
            format_mean_std(result.test_accuracies, 2),
            format_mean_std(result.train_losses, 4),
            f"{1e3 * result.step_time:.2f}",
            f"{result.state_bytes_per_parameter:.2f}",
        )
        for result in results
    ]
    table = tables.to_rich(HEADER, rows, title, words=2)
    counts = {r.name: (sum(run.diverged for run in r.runs), len(r.runs)) for r in results}
    lost = [f"{name}: {n} of {total} seeds diverged" for name, (n, total) in counts.items() if n]
    table.caption, table.caption_justify = "; ".join(lost) or None, "left"
    return table


def to_json(result: Result) -> dict[str, Any]:
    return {
        "optimizer": result.name,
        "method": result.label,
        "learning_rate": result.learning_rate,
        "optimizer_state_bytes_per_parameter": result.state_bytes_per_parameter,
        "step_time_seconds_median": result.step_time,
        "test_accuracy_percent": _summarize(result.test_accuracies),
        "final_train_loss": _summarize(result.train_losses),
        "runs": [asdict(run) | find_outcome(run) for run in result.runs],
    }


def find_outcome(run: Run) -> dict[str, Any]:
    return {"best_epoch": run.best_epoch, "selected_test_accuracy": run.selected_test_accuracy}


def describe_environment() -> dict[str, Any]:
    """Everything that a result depends on beside its recipe and the commit."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "float32_products": find_float32_products(),
        # On a CPU, XLA's order of summation depends on the number of cores.
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": python_platform.python_version(),
        "spherical_optax": so.__version__,
        **{package: version(package) for package in PACKAGES},
    }


def make_device_slug() -> str:
    """A part of file names, so that times on one device do not overwrite those of another.

    Empty on a CPU."""
    kind = jax.devices()[0].device_kind
    return "" if kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", kind.lower())


def read_platform(environment: Mapping[str, Any]) -> str:
    """The platform of a result: "cpu" or "gpu". The oldest results, all from CPUs, do not name it."""
    return environment.get("platform", "cpu")


def find_float32_products() -> str:
    """The precision of convolutions and matrix products of float32 arrays."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None and jax.default_backend() == "gpu":
        return "tensorfloat32"  # XLA's default on NVIDIA's tensor cores
    return chosen or "float32"


def round_all(values: Iterable[float]) -> list[float]:
    """The numbers with six significant digits, for a file."""
    return [float(f"{value:.6g}") for value in values]


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole; an interruption leaves the old file as it was."""
    text = json.dumps(_replace_nonfinite(content), indent=1, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(path)


def _replace_nonfinite(content: Any) -> Any:
    """Replaces NaN and infinity, the loss of a run that diverged, by null: JSON has neither."""
    if isinstance(content, dict):
        return {key: _replace_nonfinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_nonfinite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content

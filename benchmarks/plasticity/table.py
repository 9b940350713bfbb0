"""The tables, as texts, from what the result file holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.reporting.tables import format_ends

ACCURACY_HEADER = (
    "method",
    "rate",
    "decay",
    "first task",
    "last tasks",
    "minus Adam",
)
TURNS_HEADER = ("method", "radius", "angle, mrad", "rate, 1e-3", "head's radius")
Methods = Mapping[str, Mapping[str, Any]]  # as in the result file


def format_accuracies(methods: Methods) -> list[tuple[str, ...]]:
    return [
        (
            row["label"],
            f"{row['learning_rate']:g}",
            f"{row['weight_decay']:g}" if row["weight_decay"] else "-",
            format_percent(row["first_accuracy"]),
            format_percent(row["last_accuracy"]),
            format_percent(row["minus_reference"], "+"),
        )
        for row in methods.values()
    ]


def format_turns(methods: Methods) -> list[tuple[str, ...]]:
    """The second hidden layer and the head in the first and in the last task."""
    return [
        (
            row["label"],
            format_ends(row["curves"]["radius"], "#.3g"),
            format_ends(row["curves"]["angle"], "#.2g", 1e3),
            format_ends(row["curves"]["effective_lr"], "#.2g", 1e3),
            format_ends(row["curves"]["head_radius"], "#.3g"),
        )
        for row in methods.values()
    ]


def format_percent(estimate: Mapping[str, float | None] | None, sign: str = "") -> str:
    if estimate is None or (mean := estimate["mean"]) is None:
        return "-"
    halfwidth = estimate["halfwidth"]
    # A single seed has no interval.
    width = "" if halfwidth is None or np.isnan(halfwidth) else f" ± {100 * halfwidth:.1f}"
    return f"{100 * mean:{sign}.1f}{width}"


def format_grid(methods: Methods) -> list[tuple[str, ...]]:
    """A row for each method and decay: every rate with its accuracy in per cent, the chosen one bold."""
    rows = []
    for row in methods.values():
        decays = dict.fromkeys(cell["weight_decay"] for cell in row["grid"])
        for decay in decays:
            cells = [cell for cell in row["grid"] if cell["weight_decay"] == decay]
            texts = (format_cell(cell, row) for cell in cells)
            rows.append((row["label"], f"{decay:g}" if decay else "-", *texts))
    width = max(map(len, rows))
    return [row + ("",) * (width - len(row)) for row in rows]


def format_cell(cell: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    accuracy = f"{100 * cell['mean']:.1f}"
    is_chosen = all(cell[name] == row[name] for name in ("learning_rate", "weight_decay"))
    return f"{cell['learning_rate']:g}: {f'**{accuracy}**' if is_chosen else accuracy}"

"""The tables, as texts, from what the result file holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.language.methods import METHODS, RATIO, REFERENCE
from benchmarks.reporting.tables import format_ends

LOSS_HEADER = (
    "method",
    "rate",
    "decay",
    "ratio",
    "validation loss",
    f"minus {METHODS[REFERENCE].label}",
)
TURNS_HEADER = ("method", "matrices", "radius", "angle, mrad", "rate, 1e-3")
GROUP_NAMES = {"normalised": "queries, keys", "others": "others"}
NEUTRAL = {"weight_decay": 0.0, "ratio": RATIO}
Methods = Mapping[str, Mapping[str, Any]]  # as in the result file


def format_losses(methods: Methods) -> list[tuple[str, ...]]:
    return [
        (
            row["label"],
            format_power(row["learning_rate"]),
            format_optional(row, "weight_decay"),
            format_optional(row, "ratio"),
            format_loss(row["loss"]),
            format_loss(row["minus_reference"], "+"),
        )
        for row in methods.values()
    ]


def format_turns(methods: Methods) -> list[tuple[str, ...]]:
    """Behind the warm-up, and at the end."""
    return [
        (
            row["label"],
            GROUP_NAMES[group],
            format_ends(turns["radius"], "#.3g", first=find_peak(turns)),
            format_ends(turns["angle"], "#.2g", 1e3, find_peak(turns)),
            format_ends(turns["effective_lr"], "#.3g", 1e3, find_peak(turns)),
        )
        for row in methods.values()
        for group, turns in row["turns"].items()
    ]


def find_peak(turns: Mapping[str, Any]) -> int:
    """The part of the run in which the warm-up ends: the second one, if there is one."""
    return min(1, len(turns["angle"]["mean"]) - 1)


def format_loss(estimate: Mapping[str, float | None] | None, sign: str = "") -> str:
    if estimate is None or (mean := estimate["mean"]) is None or np.isnan(mean):
        return "-"
    halfwidth = estimate["halfwidth"]
    # A single seed has no interval.
    width = "" if halfwidth is None or np.isnan(halfwidth) else f" ± {halfwidth:.3f}"
    return f"{mean:{sign}.3f}{width}"


def format_power(rate: float) -> str:
    return f"2^{np.log2(rate):.0f}"


def format_optional(row: Mapping[str, Any], number: str) -> str:
    """The decay or the ratio of a method, and a dash if it has none."""
    has_one = {cell[number] for cell in row["grid"]} != {NEUTRAL[number]}
    return f"{row[number]:g}" if has_one else "-"


def make_grid_header(methods: Methods) -> tuple[str, ...]:
    longest = max(len(list_rates(row)) for row in methods.values())
    return ("method", "decay", "ratio", *(" " for _ in range(longest)))


def format_grid(methods: Methods) -> list[tuple[str, ...]]:
    """A row for each method and decay or ratio: the rates with their losses, the chosen one bold."""
    rows, width = [], len(make_grid_header(methods))
    for row in methods.values():
        seconds = dict.fromkeys((cell["weight_decay"], cell["ratio"]) for cell in row["grid"])
        for second in seconds:
            cells = [c for c in row["grid"] if (c["weight_decay"], c["ratio"]) == second]
            beside = (format_optional({**row, **cells[0]}, x) for x in ("weight_decay", "ratio"))
            texts = (row["label"], *beside, *(format_cell(cell, row) for cell in cells))
            rows.append(texts + ("",) * (width - len(texts)))
    return rows


def list_rates(row: Mapping[str, Any]) -> list[float]:
    return list(dict.fromkeys(cell["learning_rate"] for cell in row["grid"]))


def format_cell(cell: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    loss = "-" if cell["loss"] is None or np.isnan(cell["loss"]) else f"{cell['loss']:.3f}"
    numbers = ("learning_rate", "weight_decay", "ratio")
    is_chosen = all(cell[number] == row[number] for number in numbers)
    return f"{format_power(cell['learning_rate'])}: {f'**{loss}**' if is_chosen else loss}"

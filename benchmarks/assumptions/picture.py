"""The table and the figure of the hypotheses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.assumptions.hypotheses import FIRST_STEPS, PUBLISHED, QUANTILES, QUANTITIES, Array

# Okabe and Ito's colours, as in the other figures.
COLORS = {"SGD": "#0072B2", "SGD-M": "#D55E00", "Adam": "#009E73"}


def make_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in ("", " "):
        found.add_column(column, no_wrap=True)
    for column in (*QUANTILES, f"worst from {FIRST_STEPS + 1}", "broken"):
        found.add_column(column, justify="right", no_wrap=column in QUANTILES)
    for key, quantity in QUANTITIES.items():
        for name, row in rows[key].items():
            numbers = [row[q] for q in QUANTILES] + [row["worst_after_the_first_steps"]]
            found.add_row(
                quantity.label,
                name,
                *("-" if x is None else format(x, quantity.digits) for x in numbers),
                str(row["violations"]),
            )
    return found


def draw(
    values: Mapping[str, Mapping[str, Array]], sentences: Mapping[str, str], title: str, path: Path
) -> None:
    """One panel per hypothesis; its title says whether it held."""
    made = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    for axes, key in ((left, "factor"), (middle, "angle"), (right, "neglected")):
        bins = _choose_bins(values[key], log=key != "factor")
        for name, found in values[key].items():
            # What a logarithmic axis cannot show, a filter that did not move, is in its first bin.
            shown = np.clip(found.ravel(), bins[0], bins[-1])
            axes.hist(shown, bins, histtype="step", lw=1.6, color=COLORS[name], label=name)
        words = sentences[key]
        lines = words.replace(": ", ":\n", 1) if ": " in words else words.replace(", ", ",\n", 1)
        axes.set(yscale="log", ylabel="count (filters, steps)", ylim=(0.7, None))
        axes.set_title(lines, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="1 - A⟨c, u⟩  (no unit; Theorem 2 needs it above 0)")
    middle.set(xscale="log", xlabel="angle moved in one step, rad")
    term = r"$(\eta\,\|\nabla L(u_k)\|\,/\,r_k)^4\,/\,r_{k+1}^4$"
    right.set(xscale="log", xlabel=f"neglected part of $r_{{k+1}}^4$ (SGD, no unit): {term}")
    if left.get_xlim()[0] < 0:
        _mark(left, 0.0, "0")
    _mark(middle, np.pi, "π")
    _mark(right, PUBLISHED, r"published: $10^{-4}$")
    handles, labels = left.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    made.suptitle(title, fontsize=12)
    made.savefig(path, dpi=150)


def _choose_bins(values: Mapping[str, Array], log: bool) -> Array:
    flat = np.concatenate([found.ravel() for found in values.values()])
    if log:
        positive = flat[flat > 0]
        return np.geomspace(0.99 * positive.min(), 1.01 * positive.max(), 80)
    return np.linspace(flat.min() - 1e-6, flat.max() + 1e-6, 80)


def _mark(axes: Axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.4", ls=":", lw=1.2)
    place = axes.get_xaxis_transform()
    axes.text(x, 1.0, f"{text} ", transform=place, ha="right", va="top", color="0.3")

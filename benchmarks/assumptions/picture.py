"""The table and the figure of the hypotheses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.assumptions.hypotheses import FIRST_STEPS, PUBLISHED, QUANTILES, QUANTITIES, Array
from benchmarks.reporting import tables
from benchmarks.reporting.figures import BLUE, GREEN, VERMILION

COLORS = {"SGD": BLUE, "SGD-M": VERMILION, "Adam": GREEN}


def make_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> Table:
    wrapped = (f"worst from {FIRST_STEPS + 1}", "broken")
    texts = []
    for key, quantity in QUANTITIES.items():
        for name, row in rows[key].items():
            numbers = [row[q] for q in QUANTILES] + [row["worst_after_the_first_steps"]]
            figures = ["-" if x is None else format(x, quantity.digits) for x in numbers]
            texts.append([quantity.label, name, *figures, str(row["violations"])])
    header = ("", " ", *QUANTILES, *wrapped)
    return tables.to_rich(header, texts, title, words=2, wrapped=wrapped)


def draw(
    values: Mapping[str, Mapping[str, Array]], sentences: Mapping[str, str], title: str, path: Path
) -> None:
    """One panel per hypothesis; its title says whether the hypothesis held."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, key in ((left, "factor"), (middle, "angle"), (right, "neglected")):
        _draw_counts(axes, values[key], sentences[key], log=key != "factor")
    left.set(xlabel="1 - A⟨c, u⟩  (no unit; Theorem 2 needs it above 0)")
    middle.set(xscale="log", xlabel="angle moved in one step, rad")
    term = r"$(\eta\,\|\nabla L(u_k)\|\,/\,r_k)^4\,/\,r_{k+1}^4$"
    right.set(xscale="log", xlabel=f"neglected part of $r_{{k+1}}^4$ (SGD, no unit): {term}")
    if left.get_xlim()[0] < 0:
        _mark(left, 0.0, "0")
    _mark(middle, np.pi, "π")
    _mark(right, PUBLISHED, r"published: $10^{-4}$")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def _draw_counts(axes: Axes, values: Mapping[str, Array], sentence: str, log: bool) -> None:
    """A histogram for every optimizer."""
    bins: Any = _choose_bins(values, log)
    for name, found in values.items():
        # A logarithmic axis cannot show 0, the value of a filter that did not move: the first bin does.
        shown = np.clip(found.ravel(), bins[0], bins[-1])
        axes.hist(shown, bins, histtype="step", lw=1.6, color=COLORS[name], label=name)
    mark = ": " if ": " in sentence else ", "
    axes.set(yscale="log", ylabel="count (filters, steps)", ylim=(0.7, None))
    axes.set_title(sentence.replace(mark, f"{mark.rstrip()}\n", 1), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


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

"""The figure, from what the result file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.reporting.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE
from benchmarks.transfer.table import Methods

LIGHTEST, DARKEST = 0.85, 0.05  # of viridis, for the narrowest and the widest network
COLUMNS, PANEL = 3, (4.4, 3.8)  # width and height in inches
ASIDE = 1.02  # factor in width between the points of two methods
STYLES: Mapping[str, tuple[str, str, str]] = {
    "adam": (BLACK, "-", "o"),
    "adamsrt": (PURPLE, "-", "s"),
    "adamh": (GREEN, "-", "^"),
    "muonh": (BLUE, "-", "D"),
    "decoupled": (ORANGE, "--", "v"),
}


def draw(methods: Methods, title: str, path: Path) -> None:
    """A panel for each method, loss over rate, and one with the best rates over the width."""
    columns = min(COLUMNS, len(methods) + 1)
    rows = -(-(len(methods) + 1) // columns)
    size = PANEL[0] * columns, PANEL[1] * rows
    figure = Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(len(methods) + 1)]
    first, best = panels[0], panels[-1]
    for axes, row in zip(panels, methods.values(), strict=False):
        if axes is not first:
            axes.sharey(first)
        draw_losses(axes, row)
    first.legend(title="width", frameon=False)
    draw_best_rates(best, methods)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def draw_losses(axes: Axes, row: Mapping[str, Any]) -> None:
    """A line per width, geometric means over the seeds; dots where the parabolas have their minimum."""
    colors = mpl.colormaps["viridis"](np.linspace(LIGHTEST, DARKEST, len(row["widths"])))
    for (width, found), color in zip(row["widths"].items(), colors, strict=True):
        logs = np.log(np.array(found["losses"], float)).mean(1)
        axes.plot(row["rates"], np.exp(logs), color=color, lw=1.6, label=width)
        best = found["log2_best_rate"]["mean"]
        height = np.exp(np.interp(best, np.log2(row["rates"]), logs))
        axes.plot(2.0**best, height, "o", color=color, ms=8, mec="white")
    axes.set(xlabel="learning rate", ylabel="training loss", title=row["label"], yscale="log")
    axes.set_xscale("log", base=2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_best_rates(axes: Axes, methods: Methods) -> None:
    """Means over the seeds with the range of the seeds, each method moved aside by a little."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    widths = np.array([int(width) for width in next(iter(methods.values()))["widths"]])
    for place, (name, row) in enumerate(methods.items()):
        color, dashes, marker = STYLES[name]
        seeds = np.array([x["log2_best_rate_of_seeds"] for x in row["widths"].values()])
        mean, low, high = (2.0**x for x in (seeds.mean(1), seeds.min(1), seeds.max(1)))
        axes.errorbar(
            widths * ASIDE ** (place - len(methods) // 2),
            mean,
            (mean - low, high - mean),
            color=color,
            ls=dashes,
            marker=marker,
            ms=5,
            lw=1.4,
            label=row["label"],
        )
    axes.xaxis.set_major_locator(FixedLocator(widths.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="width", ylabel="best learning rate", title="Best rates, range of the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

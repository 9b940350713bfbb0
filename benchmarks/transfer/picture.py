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
STYLES: Mapping[str, tuple[str, str, str]] = {
    "adam": (BLACK, "-", "o"),
    "adamsrt": (PURPLE, "-", "s"),
    "adamh": (GREEN, "-", "^"),
    "muonh": (BLUE, "-", "D"),
    "decoupled": (ORANGE, "--", "v"),
}


def draw(methods: Methods, title: str, path: Path) -> None:
    """A panel for each method, loss over rate, and one with the best rates over the width."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    losses = [axes for axes, _ in zip(panels, methods, strict=False)]
    for axes, row in zip(losses, methods.values(), strict=True):
        draw_losses(axes, row)
        axes.sharey(losses[0])
    losses[0].legend(title="width", frameon=False)
    for axes in panels[len(methods) : -1]:
        axes.remove()
    draw_best_rates(panels[-1], methods)
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
    for place, (name, row) in enumerate(methods.items()):
        color, dashes, marker = STYLES[name]
        seeds = np.array([x["log2_best_rate_of_seeds"] for x in row["widths"].values()])
        widths = np.array([int(width) for width in row["widths"]])
        mean, low, high = (2.0**x for x in (seeds.mean(1), seeds.min(1), seeds.max(1)))
        axes.errorbar(
            widths * 1.02 ** (place - len(methods) // 2),
            mean,
            (mean - low, high - mean),
            color=color,
            ls=dashes,
            marker=marker,
            ms=5,
            lw=1.4,
            label=row["label"],
        )
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="width", ylabel="best learning rate", title="Best rates, range of the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

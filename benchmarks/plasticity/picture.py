"""The figure, from what the result file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.plasticity.table import Methods
from benchmarks.reporting.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
)

STYLES: Mapping[str, tuple[str, Any]] = {
    "adam": (BLACK, "-"),
    "adamw-default": (SKY_BLUE, "--"),
    "adamw": (BLUE, "-"),
    # The next two and AdamH keep one radius: dashes leave the lines below them visible.
    "nap": (ORANGE, "-"),
    "nap-head": (VERMILION, (0, (8, 4))),
    "decoupled": (ORANGE, (0, (1, 1))),
    "decoupled-head": (VERMILION, (0, (1, 1))),
    "adamh": (GREEN, (0, (3, 6))),
    "adamsrt": (PURPLE, "-"),
    "sgd": ("0.6", "-."),
}
PANELS = {
    "accuracy": ("training accuracy at the end of the task, %", "linear", 100.0),
    "radius": ("radius of the second hidden layer", "log", 1.0),
    "angle": ("angle per step of this layer, mrad", "log", 1e3),
}


def draw(methods: Methods, title: str, path: Path) -> None:
    """A panel for each quantity: means over the seeds, bands of one standard deviation."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 3), PANELS, strict=True):
        label, scale, unit = PANELS[quantity]
        axes.set(xlabel="task", ylabel=label, yscale=scale)
        draw_curves(axes, methods, quantity, unit)
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    options = {"ncols": 5, "frameon": False, "handlelength": 3}
    figure.legend(handles, labels, loc="outside lower center", **options)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def draw_curves(axes: Axes, methods: Methods, quantity: str, unit: float) -> None:
    for name, row in methods.items():
        color, dashes = STYLES[name]
        mean, std = (
            unit * np.array(row["curves"][quantity][key], float) for key in ("mean", "std")
        )
        tasks = np.arange(1, len(mean) + 1)
        axes.plot(tasks, mean, ls=dashes, color=color, lw=1.6, label=row["label"])
        axes.fill_between(tasks, mean - std, mean + std, color=color, alpha=0.07, lw=0)

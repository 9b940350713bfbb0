"""The figure, from what the result file holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.language.table import Methods
from benchmarks.reporting.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE

STYLES: Mapping[str, tuple[str, Any]] = {
    "adamw": (BLACK, "-"),
    "adamw-ratio": (SKY_BLUE, "-"),
    "adamsrt": (PURPLE, "--"),  # close to AdamW's line, which stays visible below
    "adamh": (GREEN, "-"),
    "muonh": (BLUE, "-"),
    "decoupled": (ORANGE, "-"),
}
PANELS = {
    "effective_lr": ("effective rate, 1e-3", 1e3),
    "angle": ("angle per step, mrad", 1e3),
}
TITLES = {"normalised": "Queries and keys, by head", "others": "The other matrices"}
LATE = 0.6  # of the steps, from where the loss is drawn once more


def draw(methods: Methods, stops: Sequence[int], title: str, path: Path) -> None:
    """Validation loss, whole and late; effective rate and angle of both kinds of groups."""
    figure = Figure(figsize=(14, 7.6), layout="constrained")
    (whole, *above), (late, *below) = figure.subplots(2, 3)
    steps = np.array(stops)
    for axes, where in ((whole, steps > 0), (late, steps >= LATE * steps[-1])):
        draw_curves(
            axes, {name: row["validation"] for name, row in methods.items()}, methods, steps, where
        )
        axes.set(xlabel="step", ylabel="validation loss, nats per character")
    whole.set(title="Validation loss")
    late.set(title="The same, late")
    middles = (steps + np.array([0, *stops[:-1]])) / 2
    for group, row in zip(TITLES, (above, below), strict=True):
        for axes, (quantity, (label, unit)) in zip(row, PANELS.items(), strict=True):
            curves = {name: m["turns"][group][quantity] for name, m in methods.items()}
            draw_curves(axes, curves, methods, middles, steps > 0, unit)
            axes.set(xlabel="step", ylabel=label, yscale="log", title=TITLES[group])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = whole.get_legend_handles_labels()
    options = {"ncols": 6, "frameon": False, "handlelength": 3}
    figure.legend(handles, labels, loc="outside lower center", **options)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Mapping[str, Any]],
    methods: Methods,
    steps: np.ndarray,
    where: np.ndarray,
    unit: float = 1.0,
) -> None:
    """Means over the seeds, and bands of one standard deviation; nothing where a rate is not known."""
    for name, curve in curves.items():
        color, dashes = STYLES[name]
        mean, std = (unit * np.array(curve[key], float)[where] for key in ("mean", "std"))
        axes.plot(steps[where], mean, ls=dashes, color=color, lw=1.6, label=methods[name]["label"])
        axes.fill_between(steps[where], mean - std, mean + std, color=color, alpha=0.12, lw=0)
    axes.spines[["top", "right"]].set_visible(False)

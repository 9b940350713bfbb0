"""Training loss and radius over the epochs, drawn for several methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.report import Result
from benchmarks.training import recipes

# The palette of Okabe and Ito, whose colours colour-blind readers can tell apart.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
VERMILION, BLUE, PURPLE = "#D55E00", "#0072B2", "#CC79A7"
# Colour and dashes of each method: through a dashed line another line below it stays visible.
STYLES = (
    (BLACK, "-"),
    (ORANGE, "-"),
    (SKY_BLUE, "--"),
    (GREEN, "--"),
    (VERMILION, "-"),
    (BLUE, "--"),
    (PURPLE, "-."),
)


def draw_training_loss(results: Sequence[Result], path: Path) -> None:
    """Draws the mean over the seeds as a line, and the range as a band; one colour per method."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result, (color, dashes) in zip(results, STYLES, strict=False):
        losses = np.array([run.train_loss for run in result.runs if not run.diverged])
        if losses.size:
            epochs = np.arange(1, losses.shape[1] + 1)
            label = f"{result.label}, rate {result.learning_rate:g}"
            axes.plot(epochs, losses.mean(0), dashes, color=color, label=label)
            axes.fill_between(epochs, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
    axes.set(yscale="log", ylabel="training loss", title="Training loss, mean and range over seeds")
    _finish(axes)
    figure.savefig(path, dpi=150)


def draw_training_loss_twice(results: Sequence[Result], title: str, path: Path) -> None:
    """Draws all epochs and the last fifth, as in the paper's Figure 3; bands: one standard deviation."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    whole, last = figure.subplots(1, 2)
    for result, (color, dashes) in zip(results, STYLES, strict=False):
        losses = np.array([run.train_loss for run in result.runs if not run.diverged])
        if not losses.size:
            continue
        mean, std = losses.mean(0), losses.std(0, ddof=1) if len(losses) > 1 else 0 * losses[0]
        epochs = np.arange(1, len(mean) + 1)
        late = epochs >= min(
            0.8 * len(epochs), len(epochs) - 1
        )  # two points, unless there is one epoch
        for axes, where in ((whole, slice(None)), (last, late)):
            axes.plot(epochs[where], mean[where], dashes, color=color, label=result.label)
            band = mean[where] - std[where], mean[where] + std[where]
            axes.fill_between(epochs[where], *band, color=color, alpha=0.15, lw=0)
    seeds = max(len(result.runs) for result in results)
    whole.set(yscale="log", ylabel="training loss", title=f"{title}: mean, seeds: {seeds}")
    last.set(title="the last epochs")
    _finish(whole)
    _finish(last)
    whole.get_legend().remove()
    figure.savefig(path, dpi=150)


def draw_median_radius(radii: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws the median over all filters and seeds, one line per method."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, medians), (color, dashes) in zip(radii.items(), STYLES, strict=False):
        axes.plot(medians, dashes, color=color, label=label)
    title = "Radius of the median filter: the larger it is, the less a step turns the filter"
    axes.set(ylabel="radius", title=title)
    _finish(axes)
    figure.savefig(path, dpi=150)


def _finish(axes: Axes) -> None:
    start, end = axes.dataLim.intervalx
    for milestone in recipes.MILESTONES:
        axes.axvline(end * milestone / recipes.EPOCHS, color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel="epoch (grey: learning rate x 0.1)")
    if start < end:
        axes.set_xlim(start, end)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3)

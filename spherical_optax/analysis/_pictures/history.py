"""Pictures of a training run that `so.track` has measured, with Matplotlib."""

from typing import TYPE_CHECKING, Any

import numpy as np

from spherical_optax.analysis._pictures.curves import Curves, History, Paths, read_history
from spherical_optax.analysis._pictures.palette import COLORS, DASHES, ORDERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "radius": "radius ‖x‖",
    "effective_lr": "effective learning rate ηᵉ",
    "angle": "angle per step, rad",
}


def plot_radii(
    history: History, ax: "Axes | None" = None, *, paths: Paths = None, predicted: Any = None
) -> "Axes":
    """Draws the radii ||x|| over the steps of a training run, one line per parameter.

    Use this when you want to see whether weight decay and the growth of the radii have come to balance.

    Up to seven parameters have a colour each. More parameters are coloured from first to last in the
    order of the tree, and their median is black.

    Args:
      history: a list of `so.analysis.summary(state)`. A step that is in the list twice is drawn once.
      ax: Matplotlib Axes, of a figure with `layout="constrained"`, which makes room for the legend.
        None: `matplotlib.pyplot.gca()`, whose figure gets this layout if it has none.
      paths: the parameters to draw: a path such as "Conv_0/kernel", a regular expression that is
        searched in the paths, or several of both. None: all.
      predicted: a radius to compare with, such as `so.analysis.adamw_equilibrium(...).radius`: a number,
        or one per entry of the history.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, if `paths` matches nothing, or if `predicted` has another
        length than the history.

    >>> from matplotlib.figure import Figure
    >>> state = so.track(optax.sgd(0.5), so.Sphere()).init({"w": jnp.array([[2.0], [0.0]])})
    >>> ax = so.analysis.plot_radii([so.analysis.summary(state)], Figure().subplots())
    >>> ax.get_ylabel(), [line.get_label() for line in ax.lines]
    ('radius ‖x‖', ['w'])

    Source: the quantity is that of `so.track`.
    """
    return _plot("plot_radii", "radius", history, ax, paths, predicted)


def plot_effective_lr(history: History, ax: "Axes | None" = None, *, paths: Paths = None) -> "Axes":
    """Draws the effective learning rates eta^e over the steps of a run, one line per parameter.

    Use this when you want to see the schedule that training really follows on the spheres.

    The axis is logarithmic. It leaves out zeros, before the first step or where nothing moved, and the
    negative rates of steps beyond a right angle.

    Args:
      history: a list of `so.analysis.summary(state)`, as for `plot_radii`.
      ax: Matplotlib Axes or None, as for `plot_radii`.
      paths: the parameters to draw, as for `plot_radii`.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, for example because the effective learning rate of the
        optimizer is not known, or if `paths` matches nothing.

    >>> from matplotlib.figure import Figure
    >>> history = [{"step": 0.0, "effective_lr/w": 0.0}, {"step": 1.0, "effective_lr/w": 0.125}]
    >>> ax = so.analysis.plot_effective_lr(history, Figure().subplots())
    >>> ax.lines[0].get_xydata()
    array([[1.   , 0.125]])

    Source: [11].
    """
    return _plot("plot_effective_lr", "effective_lr", history, ax, paths)


def plot_angles(
    history: History, ax: "Axes | None" = None, *, paths: Paths = None, predicted: Any = None
) -> "Axes":
    """Draws the angles of the steps of a training run, in radians, one line per parameter.

    Use this when you want to compare how fast the parameters turn, with each other or with a prediction.

    The axis is logarithmic. It leaves out zeros, before the first step or where nothing moved.

    Args:
      history: a list of `so.analysis.summary(state)`, as for `plot_radii`.
      ax: Matplotlib Axes or None, as for `plot_radii`.
      paths: the parameters to draw, as for `plot_radii`.
      predicted: an angle in radians to compare with, such as `so.analysis.adamw_equilibrium(...).angle`:
        a number, or for a schedule one per entry of the history.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, if `paths` matches nothing, or if `predicted` has another
        length than the history.

    >>> from matplotlib.figure import Figure
    >>> history = [{"step": 1.0, "angle/w": 0.02}, {"step": 2.0, "angle/w": 0.01}]
    >>> ax = so.analysis.plot_angles(history, Figure().subplots(), predicted=0.01)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['w', 'predicted at equilibrium']

    Source: the quantity is that of `so.track`.
    """
    return _plot("plot_angles", "angle", history, ax, paths, predicted)


def _plot(
    caller: str, quantity: str, history: History, ax: Any, paths: Paths, predicted: Any = None
) -> Any:
    """Draws one quantity: a line per parameter, their median if they are many, and the prediction."""
    curves = read_history(caller, quantity, history, paths, predicted)
    if ax is None:
        ax = _get_current_axes()
    many = len(curves.named) > len(COLORS)
    lines = _draw_many(ax, curves) if many else _draw_few(ax, curves)
    if curves.predicted is not None:
        # The gaps between the dashes are white: a black median would fill them otherwise.
        style = {"color": "black", "gapcolor": "white", "ls": (0, (4, 3)), "lw": 1.5, "zorder": 4}
        label = "predicted at equilibrium"
        lines.append(_draw_line(ax, curves.steps, curves.predicted, label=label, **style))
    ax.set(xlabel="step", ylabel=LABELS[quantity])
    if quantity != "radius":
        ax.set_yscale("log")
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        lines,
        [_label_line(line) for line in lines],
        title="first to last parameter" if many else None,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        handlelength=3.5,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
    )
    return ax


def _get_current_axes() -> Any:
    import matplotlib.pyplot as plt

    ax: Any = plt.gca()
    if ax.figure.get_layout_engine() is None:
        ax.figure.set_layout_engine("constrained")
    return ax


def _draw_few(ax: Any, curves: Curves) -> list[Any]:
    """Draws every parameter in a colour of its own; returns the lines of the legend."""
    styles = zip(COLORS, DASHES, strict=True)
    return [
        _draw_line(ax, curves.steps, values, label=path, color=color, ls=dashes, lw=1.6)
        for (path, values), (color, dashes) in zip(curves.named.items(), styles, strict=False)
    ]


def _draw_many(ax: Any, curves: Curves) -> list[Any]:
    """Draws all parameters in ordered colours, and their median; returns the lines of the legend."""
    from matplotlib import colormaps

    # Viridis ends in a yellow that is too pale on white: we stop before it.
    colors = colormaps[ORDERED](np.linspace(0, 0.9, len(curves.named)))
    lines = [
        _draw_line(ax, curves.steps, values, label=path, color=color, lw=0.8, alpha=0.8)
        for (path, values), color in zip(curves.named.items(), colors, strict=True)
    ]
    # Five entries in the legend are enough to show the order of the colours.
    lines = [lines[i] for i in np.linspace(0, len(lines) - 1, 5).round().astype(int)]
    values = np.stack(list(curves.named.values()))
    is_drawn = ~np.isnan(values).all(0)
    median = np.nanmedian(values[:, is_drawn], 0)
    style = {
        "color": "black",
        "lw": 2.5,
        "label": f"median of all {len(curves.named)}",
        "zorder": 3,
    }
    return [*lines, _draw_line(ax, curves.steps[is_drawn], median, **style)]


def _draw_line(ax: Any, steps: np.ndarray, values: np.ndarray, **style: Any) -> Any:
    is_drawn = ~np.isnan(values)
    # A line through a single point is invisible.
    marker = "o" if is_drawn.sum() == 1 else None
    return ax.plot(steps[is_drawn], values[is_drawn], marker=marker, ms=4, **style)[0]


def _label_line(line: Any) -> str:
    label = str(line.get_label())
    label = label if len(label) <= 40 else "…" + label[-39:]
    return label if len(line.get_xdata()) else f"{label} (no values)"

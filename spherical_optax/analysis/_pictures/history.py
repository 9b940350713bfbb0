"""Pictures of what `so.track` has kept, with Matplotlib."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spherical_optax.analysis._tracking.summary import in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow, too pale on white,
# and without black, which is the median's and the prediction's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
DASHES: Any = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (10, 2)), (0, (2, 1)))
LABELS = {
    "radius": "radius ‖x‖",
    "effective_lr": "effective learning rate ηᵉ",
    "angle": "angle per step, rad",
}

History = Sequence[Mapping[str, float]]
Paths = str | Iterable[str] | None


def plot_radii(
    history: History, ax: "Axes | None" = None, *, paths: Paths = None, predicted: Any = None
) -> "Axes":
    """The radii ||x|| over the steps of a training run, one line per parameter.

    Up to seven parameters have a colour each; more are coloured from first to last in the order of the
    tree, with their median in black.

    Args:
      history: a list of `so.analysis.summary(state)`. A step that is in it twice is drawn once.
      ax: Matplotlib Axes, of a figure with `layout="constrained"` for the legend to fit in; None:
        `matplotlib.pyplot.gca()`, whose figure gets this layout if it has none.
      paths: the parameters to draw: a path such as "Conv_0/kernel", a regular expression that is
        searched in the paths, or several of both. None: all.
      predicted: a radius to compare with, such as `so.analysis.adamw_equilibrium(...).radius`: a number,
        or one per entry of the history.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, nothing that `paths` matches, or if `predicted` has
        another length than the history.

    >>> from matplotlib.figure import Figure
    >>> state = so.track(optax.sgd(0.5), so.Sphere()).init({"w": jnp.array([[2.0], [0.0]])})
    >>> ax = so.analysis.plot_radii([so.analysis.summary(state)], Figure().subplots())
    >>> ax.get_ylabel(), [line.get_label() for line in ax.lines]
    ('radius ‖x‖', ['w'])

    Source: the quantity is that of `so.track`.
    """
    return _plot("plot_radii", "radius", history, ax, paths, predicted)


def plot_effective_lr(history: History, ax: "Axes | None" = None, *, paths: Paths = None) -> "Axes":
    """The effective learning rates eta^e over the steps of a training run, one line per parameter.

    On a logarithmic axis, which leaves out zeros (before the first step, where nothing moved) and the
    negative rates of steps beyond a right angle.

    Args:
      history: a list of `so.analysis.summary(state)`, as for `plot_radii`.
      ax: Matplotlib Axes or None, as for `plot_radii`.
      paths: the parameters to draw, as for `plot_radii`.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, such as for an optimizer whose effective learning rate is
        not known, or nothing that `paths` matches.

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
    """The angles by which the steps of a training run moved, one line per parameter.

    On a logarithmic axis, which leaves out zeros: those before the first step, or where nothing moved.

    Args:
      history: a list of `so.analysis.summary(state)`, as for `plot_radii`.
      ax: Matplotlib Axes or None, as for `plot_radii`.
      paths: the parameters to draw, as for `plot_radii`.
      predicted: an angle in radians to compare with, such as `so.analysis.adamw_equilibrium(...).angle`:
        a number, or one per entry of the history, for a schedule.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is nothing to draw, nothing that `paths` matches, or if `predicted` has
        another length than the history.

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
    steps, named, guess = _table(caller, quantity, history, paths, predicted)
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
        if ax.figure.get_layout_engine() is None:
            ax.figure.set_layout_engine("constrained")
    few = len(named) <= len(COLORS)
    if few:
        styles = [{"color": c, "ls": d, "lw": 1.6} for c, d in zip(COLORS, DASHES, strict=True)]
    else:
        from matplotlib import colormaps

        # Not up to its end, a yellow too pale on white.
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(named)))
        styles = [{"color": color, "lw": 0.8, "alpha": 0.8} for color in colors]
    lines = [
        _line(ax, steps, values, label=path, **style)
        for (path, values), style in zip(named.items(), styles, strict=False)
    ]
    if not few:
        # As many as show which colour is where.
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, 5).round().astype(int)]
        values = np.stack(list(named.values()))
        there = ~np.isnan(values).all(0)
        middle = np.nanmedian(values[:, there], 0)
        label = f"median of all {len(named)}"
        lines.append(_line(ax, steps[there], middle, color="black", lw=2.5, label=label, zorder=3))
    if guess is not None:
        # White between the dashes, or the median would hide them.
        style = {"color": "black", "gapcolor": "white", "ls": (0, (4, 3)), "lw": 1.5, "zorder": 4}
        lines.append(_line(ax, steps, guess, label="predicted at equilibrium", **style))
    ax.set(xlabel="step", ylabel=LABELS[quantity])
    if quantity != "radius":
        ax.set_yscale("log")
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        lines,
        [_short(line) for line in lines],
        title=None if few else "first to last parameter",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        handlelength=3.5,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
    )
    return ax


def _table(
    caller: str, quantity: str, history: History, paths: Paths, predicted: Any
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Steps, values per path and prediction; NaN where there is nothing to draw."""
    listed = isinstance(history, Iterable) and not isinstance(history, Mapping)
    entries = list(history) if listed else []
    if not entries or not all(isinstance(e, Mapping) and "step" in e for e in entries):
        raise ValueError(f"{caller}: give a list of so.analysis.summary(state), one per step or so")
    found = list(dict.fromkeys(name for entry in entries for name in entry))
    known = [name.partition("/")[2] for name in found if name.startswith(f"{quantity}/")]
    if not known and quantity == "effective_lr" and any("/" in name for name in found):
        raise ValueError(
            f"{caller}: the effective learning rate of this optimizer is not known; "
            "plot_angles shows what is"
        )
    if not known:
        raise ValueError(f"{caller}: no {quantity} in the history; so.track needs spheres")
    at = {float(entry["step"]): i for i, entry in enumerate(entries)}  # the last of equal ones
    steps = np.array(sorted(at))
    rows = [at[step] for step in steps]

    def drawn(values: Any) -> np.ndarray:
        values = np.asarray(values, float)
        fine = np.isfinite(values)
        if quantity != "radius":
            fine &= (values > 0) & (steps > 0)
        return np.where(fine, values, np.nan)

    named = {
        path: drawn([entries[i].get(f"{quantity}/{path}", np.nan) for i in rows])
        for path in _chosen(caller, known, paths)
    }
    if np.isnan(list(named.values())).all():
        sign = "" if quantity == "radius" else "positive "
        raise ValueError(
            f"{caller}: no finite {sign}{quantity} in the history, nothing to draw; "
            "add the summaries of states after an update"
        )
    if predicted is None:
        return steps, named, None
    if np.shape(predicted) not in ((), (len(entries),)):
        raise ValueError(
            f"{caller}: predicted has shape {np.shape(predicted)}; give a number, or one for each "
            f"of the {len(entries)} entries of the history"
        )
    return steps, named, drawn(np.broadcast_to(np.asarray(predicted, float), len(entries))[rows])


def _chosen(caller: str, known: list[str], paths: Paths) -> list[str]:
    known = in_order(known)
    if paths is None:
        return known
    chosen: set[str] = set()
    for wanted in [paths] if isinstance(paths, str) else paths:
        try:
            hits = {wanted} if wanted in known else {p for p in known if re.search(wanted, p)}
        except re.error as error:
            raise ValueError(f"{caller}: {wanted!r} is no regular expression: {error}") from None
        if not hits:
            raise ValueError(f"{caller}: {wanted!r} matches none of the paths {', '.join(known)}")
        chosen |= hits
    if not chosen:
        raise ValueError(f"{caller}: paths is empty; there are {', '.join(known)}")
    return [path for path in known if path in chosen]


def _line(ax: Any, steps: np.ndarray, values: np.ndarray, **style: Any) -> Any:
    there = ~np.isnan(values)
    # A line through a single point would not be seen.
    marker = "o" if there.sum() == 1 else None
    return ax.plot(steps[there], values[there], marker=marker, ms=4, **style)[0]


def _short(line: Any) -> str:
    label = str(line.get_label())
    label = label if len(label) <= 40 else "…" + label[-39:]
    return label if len(line.get_xdata()) else f"{label} (no values)"

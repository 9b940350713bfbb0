"""Trajectories of a toy filter on the unit sphere, with Matplotlib."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spherical_optax.analysis._pictures.palette import COLORS, LOSS

if TYPE_CHECKING:
    from mpl_toolkits.mplot3d import Axes3D

MARKS: dict[str, dict[str, Any]] = {
    "start": {"marker": "o", "ms": 7, "mec": "white"},
    "end": {"marker": "*", "ms": 14, "mec": "white"},
}


def plot_sphere(
    trajectories: Mapping[str, Any],
    ax: "Axes3D",
    *,
    loss: Callable[[np.ndarray], Any] | None = None,
) -> "Axes3D":
    """Draws the directions u = x / ||x|| of a filter of three weights, on the unit sphere.

    Use this when you want to show on a toy problem how optimizers move.

    Lines on the far side of the sphere are faded. The far side is that of the view that `ax` has at the
    call: choose another view with `ax.view_init` beforehand.

    Args:
      trajectories: for every label an array (steps, 3) of points x, of any radius but 0. Great circles
        join consecutive points. A circle marks the start and a star the end.
      ax: Matplotlib Axes with `projection="3d"`.
      loss: function that colours the sphere, from directions of shape (n, 3) to numbers of shape (n,).

    Returns:
      The Axes.

    Raises:
      ValueError: if the Axes are not three-dimensional or `trajectories` is no dict; if a trajectory has
        another shape, or a point that is 0 or not finite; if `loss` returns another shape, or no finite
        number.

    >>> from matplotlib.figure import Figure
    >>> ax = Figure().add_subplot(projection="3d")
    >>> ax = so.analysis.plot_sphere({"GD": [[2.0, 0.0, 0.0], [2.0, 1.0, 0.0]]}, ax)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['GD', 'start', 'end']

    Source: after figures 1 and 2.
    """
    if getattr(ax, "name", None) != "3d":
        raise ValueError('plot_sphere: the Axes are not 3-D; make them with projection="3d"')
    if not isinstance(trajectories, Mapping):
        raise ValueError('plot_sphere: give a dict of trajectories by label, {"SGD": points}')
    directions = {label: _take_directions(label, points) for label, points in trajectories.items()}
    # We choose the order of drawing: Matplotlib sorts whole lines by their distance, and a line may go
    # around the sphere. In parallel projection one half of the sphere is near.
    ax.computed_zorder = False
    ax.set_proj_type("ortho")
    ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    ax.set_box_aspect((1, 1, 1), zoom=1.25)  # pyright: ignore
    ax.set_axis_off()
    view = -ax.get_proj()[2, :3]
    view /= np.linalg.norm(view)
    _draw_globe(ax, view, loss)
    for i, (label, u) in enumerate(directions.items()):
        _draw_trajectory(ax, view, label, u, COLORS[i % len(COLORS)])
    for text, mark in MARKS.items():
        ax.plot([], [], [], color="0.4", ls="", label=text, **mark)
    # More than two columns would make the sphere smaller.
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 2}
    ax.legend(**place, frameon=False, fontsize="small")
    return ax


def _draw_trajectory(ax: Any, view: np.ndarray, label: str, u: np.ndarray, color: str) -> None:
    arc = _join_by_great_circles(u)
    is_far = arc @ view < 0
    # The faded pieces overlap the others by a point: without it there would be gaps at the outline.
    is_faded = np.convolve(is_far, np.ones(3))[1:-1] > 0
    for is_drawn, text, style in (
        (is_faded, f"_{label}", {"alpha": 0.4, "lw": 1.2, "zorder": 2}),
        (~is_far, label, {"alpha": 1.0, "lw": 2.2, "zorder": 3}),
    ):
        piece = np.where(is_drawn[:, None], arc, np.nan)
        ax.plot(*piece.T, color=color, label=text, solid_capstyle="round", **style)
    for point, mark in zip((u[0], u[-1]), MARKS.values(), strict=True):
        style = {"alpha": 0.4, "zorder": 2} if point @ view < 0 else {"alpha": 1.0, "zorder": 4}
        ax.plot(*point[:, None], color=color, ls="", **mark, **style)


def _take_directions(label: str, points: Any) -> np.ndarray:
    """x / ||x|| for each of the points."""
    x = np.asarray(points, float)
    if x.ndim != 2 or x.shape[1] != 3 or not len(x):
        raise ValueError(f"plot_sphere: {label!r} has shape {x.shape}; needed is (steps, 3)")
    if not np.isfinite(x).all() or not x.any(1).all():
        raise ValueError(f"plot_sphere: {label!r} has a point that is 0 or not finite")
    x = x / np.abs(x).max(1, keepdims=True)  # squares of tiny and huge numbers are no floats
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _join_by_great_circles(u: np.ndarray) -> np.ndarray:
    """Adds points between the points, at most 0.03 rad apart; between antipodes through the centre."""
    before, after = u[:-1], u[1:]
    chord, across = (np.linalg.norm(v, axis=1) for v in (after - before, after + before))
    angle = np.maximum(2 * np.arctan2(chord, across), 1e-6)[:, None, None]
    parts = int(np.ceil(angle.max(initial=0.03) / 0.03))
    # t is the place on the chord, from 0 to 1, of points that are evenly spaced on the arc.
    t = np.arange(parts)[:, None] / parts
    t = 0.5 + np.tan((t - 0.5) * angle) / (2 * np.tan(angle / 2))
    arc = (before[:, None] * (1 - t) + after[:, None] * t).reshape(-1, 3)
    arc = np.concatenate([arc, u[-1:]])
    return arc / np.maximum(np.linalg.norm(arc, axis=1, keepdims=True), 1e-9)


def _draw_globe(ax: Any, view: np.ndarray, loss: Callable[[np.ndarray], Any] | None) -> None:
    """Draws the near side of the sphere: its faces, a grid, and its outline."""
    polar, azimuth = np.linspace(0, np.pi, 61)[:, None], np.linspace(0, 2 * np.pi, 121)
    mesh = _make_points(polar, azimuth)
    faces = _make_points((polar[1:] + polar[:-1]) / 2, (azimuth[1:] + azimuth[:-1]) / 2)
    if loss is None:
        shade = 0.86 + 0.12 * np.maximum(faces @ view, 0)[..., None]
        colors = np.concatenate([np.repeat(shade, 3, -1), np.ones_like(shade)], -1)
    else:
        colors = _color_by_loss(ax, faces, loss)
    is_near = (faces @ view > -0.1)[..., None]
    colors = np.where(is_near, colors, 0)
    style = {"rstride": 1, "cstride": 1, "shade": False, "antialiased": False, "lw": 0, "zorder": 0}
    ax.plot_surface(*np.moveaxis(mesh, -1, 0), facecolors=colors, **style)
    circles = [
        _make_points(p, np.linspace(0, 2 * np.pi, 181)) for p in np.linspace(0, np.pi, 7)[1:-1]
    ]
    circles += [
        _make_points(np.linspace(0, np.pi, 91), a) for a in np.linspace(0, 2 * np.pi, 13)[:-1]
    ]
    for circle in circles:
        circle = np.where((circle @ view >= 0)[:, None], circle, np.nan)
        ax.plot(*circle.T, color="0.6", lw=0.4, zorder=1)
    # The outline is the great circle at a right angle to the view.
    _, _, (_, across, up) = np.linalg.svd(view[None])
    turn = np.linspace(0, 2 * np.pi, 181)[:, None]
    ax.plot(*(np.cos(turn) * across + np.sin(turn) * up).T, color="0.5", lw=0.8, zorder=1)


def _make_points(polar: Any, azimuth: Any) -> np.ndarray:
    """Points on the unit sphere, shape (..., 3), from their angles in radians."""
    polar, azimuth = np.broadcast_arrays(polar, azimuth)
    flat = np.sin(polar)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.cos(polar)], -1)


def _color_by_loss(ax: Any, faces: np.ndarray, loss: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Colours of the faces by their loss, and a colour bar beside the Axes."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    values = np.asarray(loss(faces.reshape(-1, 3)), float)
    if values.shape != (faces[..., 0].size,) or not np.isfinite(values).any():
        raise ValueError(
            f"plot_sphere: loss of directions of shape (n, 3) returns shape {values.shape}, or "
            "no finite number; needed are (n,) numbers"
        )
    # The colours are pale: the trajectories are drawn on top of them.
    pale = ListedColormap(0.45 * colormaps[LOSS](np.linspace(0, 1, 256)) + 0.55)
    scale = ScalarMappable(cmap=pale)
    scale.set_array(values := np.ma.masked_invalid(values))
    scale.autoscale()
    ax.figure.colorbar(scale, ax=ax, label="loss", shrink=0.6, pad=0.02)
    return scale.to_rgba(values).reshape(*faces.shape[:2], 4)

"""Trajectories of a toy filter on the unit sphere, with Matplotlib."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spherical_optax.analysis._pictures.history import COLORS

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
    """The directions u = x / ||x|| that a filter of three weights takes, on the unit sphere.

    What is on the far side of the sphere is faded, for the view that `ax` has at the call: choose
    another with `ax.view_init` beforehand.

    Args:
      trajectories: for every label an array (steps, 3) of points x, of any radius but 0. Consecutive
        ones are joined by great circles; a circle marks the start and a star the end.
      ax: Matplotlib Axes with `projection="3d"`.
      loss: colours the sphere: takes an array (n, 3) of directions and returns (n,).

    Returns:
      The Axes.

    Raises:
      ValueError: if the Axes are not three-dimensional, `trajectories` is no dict, one of them has
        another shape, a point at 0 or one that is not finite, or `loss` returns another shape, or
        nothing finite.

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
    directions = {label: _directions(label, points) for label, points in trajectories.items()}
    # Nothing in front hides what is behind: the order of drawing is ours. In parallel projection half
    # of the sphere is near.
    ax.computed_zorder = False
    ax.set_proj_type("ortho")
    ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    ax.set_box_aspect((1, 1, 1), zoom=1.25)  # pyright: ignore
    ax.set_axis_off()
    view = -ax.get_proj()[2, :3]
    view /= np.linalg.norm(view)
    _draw_globe(ax, view, loss)
    for i, (label, u) in enumerate(directions.items()):
        color = COLORS[i % len(COLORS)]
        arc = _great_circles(u)
        far = arc @ view < 0
        # The pieces overlap by a point, or there would be gaps where the line goes around.
        both = np.convolve(far, np.ones(3))[1:-1] > 0
        for where, text, style in (
            (both, f"_{label}", {"alpha": 0.4, "lw": 1.2, "zorder": 2}),
            (~far, label, {"alpha": 1.0, "lw": 2.2, "zorder": 3}),
        ):
            piece = np.where(where[:, None], arc, np.nan)
            ax.plot(*piece.T, color=color, label=text, solid_capstyle="round", **style)
        for point, mark in zip((u[0], u[-1]), MARKS.values(), strict=True):
            style = {"alpha": 0.4, "zorder": 2} if point @ view < 0 else {"alpha": 1.0, "zorder": 4}
            ax.plot(*point[:, None], color=color, ls="", **mark, **style)
    for text, mark in MARKS.items():
        ax.plot([], [], [], color="0.4", ls="", label=text, **mark)
    # A wider one would take its width from the sphere.
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 2}
    ax.legend(**place, frameon=False, fontsize="small")
    return ax


def _directions(label: str, points: Any) -> np.ndarray:
    x = np.asarray(points, float)
    if x.ndim != 2 or x.shape[1] != 3 or not len(x):
        raise ValueError(f"plot_sphere: {label!r} has shape {x.shape}; needed is (steps, 3)")
    if not np.isfinite(x).all() or not x.any(1).all():
        raise ValueError(f"plot_sphere: {label!r} has a point that is 0 or not finite")
    x = x / np.abs(x).max(1, keepdims=True)  # squares of the smallest and largest are not floats
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _great_circles(u: np.ndarray) -> np.ndarray:
    """The points with others between them, at most 0.03 rad apart; antipodes: through the centre."""
    before, after = u[:-1], u[1:]
    chord, across = (np.linalg.norm(v, axis=1) for v in (after - before, after + before))
    angle = np.maximum(2 * np.arctan2(chord, across), 1e-6)[:, None, None]
    parts = int(np.ceil(angle.max(initial=0.03) / 0.03))
    # Where on the chord are the points that are evenly spaced on the arc?
    t = np.arange(parts)[:, None] / parts
    t = 0.5 + np.tan((t - 0.5) * angle) / (2 * np.tan(angle / 2))
    arc = (before[:, None] * (1 - t) + after[:, None] * t).reshape(-1, 3)
    arc = np.concatenate([arc, u[-1:]])
    return arc / np.maximum(np.linalg.norm(arc, axis=1, keepdims=True), 1e-9)


def _draw_globe(ax: Any, view: np.ndarray, loss: Callable[[np.ndarray], Any] | None) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    def sphere(polar: Any, azimuth: Any) -> np.ndarray:
        polar, azimuth = np.broadcast_arrays(polar, azimuth)
        flat = np.sin(polar)
        return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.cos(polar)], -1)

    polar, azimuth = np.linspace(0, np.pi, 61)[:, None], np.linspace(0, 2 * np.pi, 121)
    mesh = sphere(polar, azimuth)
    faces = sphere((polar[1:] + polar[:-1]) / 2, (azimuth[1:] + azimuth[:-1]) / 2)
    if loss is None:
        shade = 0.86 + 0.12 * np.maximum(faces @ view, 0)[..., None]
        colors = np.concatenate([np.repeat(shade, 3, -1), np.ones_like(shade)], -1)
    else:
        values = np.asarray(loss(faces.reshape(-1, 3)), float)
        if values.shape != (faces[..., 0].size,) or not np.isfinite(values).any():
            raise ValueError(
                f"plot_sphere: loss of directions of shape (n, 3) returns shape {values.shape}, or "
                "nothing finite; needed are (n,) numbers"
            )
        # Pale, for the trajectories to stand out.
        pale = ListedColormap(0.45 * colormaps["cividis"](np.linspace(0, 1, 256)) + 0.55)
        scale = ScalarMappable(cmap=pale)
        scale.set_array(values := np.ma.masked_invalid(values))
        scale.autoscale()
        colors = scale.to_rgba(values).reshape(*faces.shape[:2], 4)
        ax.figure.colorbar(scale, ax=ax, label="loss", shrink=0.6, pad=0.02)
    near = (faces @ view > -0.1)[..., None]
    colors = np.where(near, colors, 0)
    style = {"rstride": 1, "cstride": 1, "shade": False, "antialiased": False, "lw": 0, "zorder": 0}
    ax.plot_surface(*np.moveaxis(mesh, -1, 0), facecolors=colors, **style)
    circles = [sphere(p, np.linspace(0, 2 * np.pi, 181)) for p in np.linspace(0, np.pi, 7)[1:-1]]
    circles += [sphere(np.linspace(0, np.pi, 91), a) for a in np.linspace(0, 2 * np.pi, 13)[:-1]]
    for circle in circles:
        circle = np.where((circle @ view >= 0)[:, None], circle, np.nan)
        ax.plot(*circle.T, color="0.6", lw=0.4, zorder=1)
    # The outline: what is at a right angle to the view.
    _, _, (_, across, up) = np.linalg.svd(view[None])
    turn = np.linspace(0, 2 * np.pi, 181)[:, None]
    ax.plot(*(np.cos(turn) * across + np.sin(turn) * up).T, color="0.5", lw=0.8, zorder=1)

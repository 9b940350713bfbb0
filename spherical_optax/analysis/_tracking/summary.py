"""Summaries of a state of `so.track`, for loggers, TensorBoard and the terminal."""

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from spherical_optax._core.paths import list_leaves
from spherical_optax.analysis._path_order import sort_paths
from spherical_optax.analysis._tracking.wrapper import TrackState

QUANTITIES = ("radius", "angle", "effective_lr", "radial_cosine")


def summary(state: Any, *, reduce: Callable[[np.ndarray], Any] = np.median) -> dict[str, float]:
    """The last measured step as a flat dict of floats.

    Use this when you want to hand the measurements of `so.track` to a logger, or collect them for the
    `plot_` functions, which draw a list of these dicts.

    The key "step" is the call of `update` that was measured, counted from 1. It is 0 before the first,
    with the radii at `init`. The other keys are "quantity/path", such as "angle/Conv_0/kernel", for the
    quantities radius, angle (radians), effective_lr and radial_cosine. An effective learning rate that
    is not known has no key.

    Args:
      state: a `TrackState`, or any state that contains one: of a chain, `optax.MultiSteps`,
        `nnx.Optimizer.opt_state`.
      reduce: function from the array of numbers of a leaf, one per group, to one number.

    Returns:
      A new dict of Python floats.

    Raises:
      ValueError: if `state` contains no state of `so.track`, more than one, or one of several runs.

    >>> tx = so.track(optax.sgd(0.5), so.Sphere())
    >>> params = {"w": jnp.array([[2.0], [0.0]])}
    >>> _, state = tx.update({"w": jnp.array([[0.0], [4.0]])}, tx.init(params), params)
    >>> so.analysis.summary(state)["effective_lr/w"]
    0.125

    Source: the quantities are those of `so.track`.
    """
    tracked = _get_track_state(state)
    # One transfer from the device for all arrays.
    step, *trees = jax.device_get([tracked.step, *(getattr(tracked, name) for name in QUANTITIES)])
    step = np.asarray(jax.tree.leaves(step)[0])
    if step.ndim:
        raise ValueError(
            f"summary: the state is one of {step.shape} runs, of jax.vmap; take one run, "
            "jax.tree.map(lambda x: x[0], state)"
        )
    found = {"step": float(step)}
    for name, tree in zip(QUANTITIES, trees, strict=True):
        for path, values in list_leaves(tree, lambda _: False):
            known = name != "effective_lr" or not np.isnan(values).any()
            if np.size(values) and known:
                found["/".join((name, *path))] = float(reduce(np.asarray(values, float)))
    return found


def write_summary(writer: Any, state: Any, *, prefix: str = "spheres") -> None:
    """Writes the `summary` of a state to TensorBoard.

    Use this when you watch a training run in TensorBoard.

    Args:
      writer: a `tensorboardX.SummaryWriter` or any object with its `add_scalar` (such as PyTorch's), a
        clu `MetricWriter` (with `write_scalars`), or the path of a folder, which needs tensorboardX or
        clu installed.
      state: as for `summary`.
      prefix: the first part of the tags "prefix/quantity/path".

    Raises:
      ValueError: if `state` contains no state of `so.track`, or more than one.
      ImportError: for a path, if neither tensorboardX nor clu is installed.
      TypeError: if `writer` is none of these.

    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> state = so.track(optax.sgd(0.5), so.Sphere()).init({"w": jnp.array([[2.0], [0.0]])})
    >>> so.analysis.write_summary(Writer(), state)
    0 spheres/radius/w 2.0
    0 spheres/angle/w 0.0
    0 spheres/effective_lr/w 0.0
    0 spheres/radial_cosine/w 0.0

    Source: the quantities are those of `so.track`.
    """
    values = summary(state)
    step = int(values.pop("step"))
    if isinstance(writer, str | os.PathLike):
        opened = _open_writer(os.fspath(writer))
        try:
            write_summary(opened, state, prefix=prefix)
        finally:
            opened.close()
    elif hasattr(writer, "write_scalars"):
        writer.write_scalars(step, {f"{prefix}/{name}": value for name, value in values.items()})
    elif hasattr(writer, "add_scalar"):
        for name, value in values.items():
            writer.add_scalar(f"{prefix}/{name}", value, step)
    else:
        raise TypeError(
            f"write_summary: {type(writer).__name__} has neither add_scalar nor write_scalars; give a "
            "tensorboardX.SummaryWriter, a clu MetricWriter or the path of a folder"
        )


def summary_table(state: Any) -> Any:
    """The `summary` of a state as a table with a row per leaf.

    Use this when you want to look at a state in the terminal or in a notebook.

    Args:
      state: as for `summary`.

    Returns:
      A `rich.table.Table`; `rich.print` shows it.

    Raises:
      ValueError: if `state` contains no state of `so.track`, or more than one.
      ImportError: if rich is not installed.

    >>> state = so.track(optax.sgd(0.5), so.Sphere()).init({"w": jnp.ones((2, 3))})
    >>> so.analysis.summary_table(state).row_count
    1

    Source: the quantities are those of `so.track`.
    """
    table: Any = importlib.import_module("rich.table").Table
    values, low, high = (summary(state, reduce=f) for f in (np.median, np.min, np.max))
    made = table(
        title=f"On the spheres at step {int(values['step'])}: median over the groups of a parameter",
        title_justify="left",
    )
    made.add_column("parameter", no_wrap=True)
    for name in ("radius", "angle, rad", "smallest", "largest", "effective rate", "radial cosine"):
        made.add_column(name, justify="right")
    paths = [name.removeprefix("radius/") for name in values if name.startswith("radius/")]
    for path in sort_paths(paths):
        cells = [
            values[f"radius/{path}"],
            values[f"angle/{path}"],
            low[f"angle/{path}"],
            high[f"angle/{path}"],
            values.get(f"effective_lr/{path}"),
            values[f"radial_cosine/{path}"],
        ]
        made.add_row(path, *("unknown" if cell is None else f"{cell:.3g}" for cell in cells))
    return made


def _get_track_state(state: Any) -> TrackState:
    found = list(_iterate_track_states(state))
    if len(found) != 1:
        raise ValueError(
            f"summary: {len(found) or 'no'} TrackState{'s' * (len(found) > 1)} in "
            f"{type(state).__name__}; give the optimizer state of one so.track(...)"
        )
    return found[0]


def _iterate_track_states(state: Any) -> Iterator[TrackState]:
    """Yields every `TrackState` in a state, also one inside another."""

    def is_track_state(node: Any) -> bool:
        return isinstance(node, TrackState)

    for node in jax.tree.leaves(state, is_leaf=is_track_state):
        if is_track_state(node):
            yield node
            yield from _iterate_track_states(node.inner_state)


def _open_writer(folder: str) -> Any:
    for module, make in (
        ("tensorboardX", lambda m: m.SummaryWriter(folder)),
        ("clu.metric_writers", lambda m: m.SummaryWriter(folder)),
    ):
        try:
            return make(importlib.import_module(module))
        except ImportError:
            continue
    raise ImportError("write_summary: to write to a folder, pip install tensorboardX (or clu)")

"""What `so.track` has kept, for loggers, TensorBoard and the terminal."""

import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from spherical_optax._core.paths import leaves_with_paths
from spherical_optax.analysis._tracking.wrapper import TrackState

QUANTITIES = ("radius", "angle", "effective_lr", "radial_cosine")


def summary(state: Any, *, reduce: Callable[[np.ndarray], Any] = np.median) -> dict[str, float]:
    """What the last measured step did, as a flat dict of floats that any logger takes.

    Keys: "step", the call of `update` that was measured, counted from 1 (0: none yet, the radii are
    those at `init`), and "quantity/path" for the quantities radius, angle (radians), effective_lr and
    radial_cosine: "angle/Conv_0/kernel". An effective learning rate that is not known is not there.

    Args:
      state: a `TrackState`, or any state that has one in it: of a chain, `optax.MultiSteps`,
        `nnx.Optimizer.opt_state`.
      reduce: what makes one number of those of a leaf's groups; the median.

    Returns:
      A new dict; a list of them, one per step, is what the `plot_` functions draw.

    Raises:
      ValueError: if there is no state of `so.track`, more than one, or one of several runs.

    >>> tx = so.track(optax.sgd(0.5), so.Sphere())
    >>> params = {"w": jnp.array([[2.0], [0.0]])}
    >>> _, state = tx.update({"w": jnp.array([[0.0], [4.0]])}, tx.init(params), params)
    >>> so.analysis.summary(state)["effective_lr/w"]
    0.125

    Source: the quantities are those of `so.track`.
    """
    tracked = _tracked(state)
    # One transfer from the device for all of it.
    step, *trees = jax.device_get([tracked.step, *(getattr(tracked, name) for name in QUANTITIES)])
    step = np.asarray(jax.tree.leaves(step)[0])
    if step.ndim:
        raise ValueError(
            f"summary: the state is one of {step.shape} runs, of jax.vmap; take one at a time, "
            "jax.tree.map(lambda x: x[0], state)"
        )
    found = {"step": float(step)}
    for name, tree in zip(QUANTITIES, trees, strict=True):
        for path, values in leaves_with_paths(tree, lambda _: False)[0]:
            known = name != "effective_lr" or not np.isnan(values).any()
            if np.size(values) and known:
                found["/".join((name, *path))] = float(reduce(np.asarray(values, float)))
    return found


def write_summary(writer: Any, state: Any, *, prefix: str = "spheres") -> None:
    """Writes the `summary` of a state to TensorBoard.

    Args:
      writer: a `tensorboardX.SummaryWriter` or anything else with its `add_scalar` (PyTorch's), a clu
        `MetricWriter` (with `write_scalars`), or the path of a folder, for which one of the two
        has to be installed.
      state: as for `summary`.
      prefix: the tags are "prefix/quantity/path".

    Raises:
      ValueError: if there is no state of `so.track`, or more than one.
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
        opened = _open(os.fspath(writer))
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
    """The `summary` of a state as a `rich.table.Table`, a row per leaf.

    Args:
      state: as for `summary`.

    Returns:
      A `rich.table.Table`; `rich.print` shows it.

    Raises:
      ValueError: if there is no state of `so.track`, or more than one.
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
    for path in in_order(
        [name.removeprefix("radius/") for name in values if name.startswith("radius/")]
    ):
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


def in_order(paths: list[str]) -> list[str]:
    """Conv_2 before Conv_10, if they are in the order in which JAX sorts the keys of dicts.

    Other trees have an order of their own.
    """
    parts = [path.split("/") for path in paths]
    if parts != sorted(parts):
        return paths
    return sorted(paths, key=lambda path: [(s.zfill(9), s) for s in re.split(r"(\d+)", path)])


def _tracked(state: Any) -> TrackState:
    found = list(_search(state))
    if len(found) != 1:
        raise ValueError(
            f"summary: {len(found) or 'no'} TrackState{'s' * (len(found) > 1)} in "
            f"{type(state).__name__}; give the optimizer state of one so.track(...)"
        )
    return found[0]


def _search(state: Any) -> Iterator[TrackState]:
    def is_tracked(node: Any) -> bool:
        return isinstance(node, TrackState)

    for node in jax.tree.leaves(state, is_leaf=is_tracked):
        if is_tracked(node):
            yield node
            yield from _search(node.inner_state)


def _open(folder: str) -> Any:
    for module, make in (
        ("tensorboardX", lambda m: m.SummaryWriter(folder)),
        ("clu.metric_writers", lambda m: m.SummaryWriter(folder)),
    ):
        try:
            return make(importlib.import_module(module))
        except ImportError:
            continue
    raise ImportError("write_summary: to write to a folder, pip install tensorboardX (or clu)")

"""Works out b1 and eps of an optimizer from one update on a tiny copy of the parameters.

An Optax optimizer is a pair of closures and does not expose b1 or eps. We set the moments of the tiny
copy ourselves, run one update at x = 0, and solve for both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._core.array_groups import ArrayGroups
from spherical_optax._core.groups import Groups
from spherical_optax._core.moments import Moments
from spherical_optax._core.paths import leaves_with_paths, list_leaves
from spherical_optax._core.safe_math import upcast
from spherical_optax.analysis._tracking.recognise import (
    Recognised,
    agree_in_ties,
    get_leaf_moments,
    get_moment_names,
    list_arrays,
    recognise,
)

# Moments and gradients of the six coordinates of a tiny group. Coordinates 0 and 1 determine
# b = slope (sqrt(v) + eps): v = 1, where eps is negligible, and v = 1e-16, where it dominates. The other
# four check the fit.
FIRST = (1.0, 1.0, -1.0, 2.0, 1.0, 0.0)
SECOND = (1.0, 1e-16, 1e-4, 1e-8, 1e-12, 1e-6)
GRADS = (0.0, 0.0, 0.0, 0.0, 0.0, 1e-2)
WIDTH = len(FIRST)


class FittedDenominator(NamedTuple):
    """The numbers in the step m / (gain (sqrt(v) + eps)) of one leaf, up to its scale."""

    gain: Any  # 1 - b1 for an average, 1 for a sum
    eps: Any
    fits: Any = True  # whether the optimizer takes such a step


class Given(NamedTuple):
    """The numbers that the user of `track` gives; None where they are to be fitted."""

    b1: float | None = None
    eps: float | None = None

    @property
    def is_complete(self) -> bool:
        return self.b1 is not None and self.eps is not None


def recognise_optimizer(
    tx: optax.GradientTransformation, params: Any, groups: Groups, given: Given
) -> list[Recognised | None]:
    """For each leaf what its a and b are made of, None where that is not known or cannot be probed."""
    unknown: list[Recognised | None] = [None] * len(groups.leaves)

    def run_tiny():
        tiny = _make_tiny(params, groups)
        return tx.update(tiny, tx.init(tiny), tiny)[1]

    try:
        real = jax.eval_shape(tx.init, params)
        if not given.is_complete:
            program, small = jax.make_jaxpr(run_tiny, return_shape=True)()
            # Prints and callbacks are for the real tree only. A state of another structure means that
            # the optimizer treats arrays by their size.
            if program.effects or jax.tree.structure(real) != jax.tree.structure(small):
                return unknown
    except Exception:  # the optimizer may need the loss, values, or arrays of a certain size
        return unknown
    recognised = recognise(real, params, groups, trust=given.is_complete)
    if given.is_complete or not any(recognised):
        return recognised
    return _drop_misfits(tx, params, recognised, groups)


def _drop_misfits(
    tx: optax.GradientTransformation,
    params: Any,
    recognised: list[Recognised | None],
    groups: Groups,
) -> list[Recognised | None]:
    """Puts None where the very first update on the tiny tree is no m / (sqrt(v) + eps).

    Nesterov's momentum, AdaMax, `eps_root` and a clip by value are found in this way, and their rates
    are absent from the state in place of NaN.
    """

    def fit() -> list[Any]:
        state = tx.init(_make_tiny(params, groups))
        fits = fit_denominators(tx, params, state, recognised, groups, Given())
        return [None if fit is None else fit.fits for fit in fits]

    try:
        with jax.ensure_compile_time_eval():
            fits = [None if fit is None else bool(fit) for fit in jax.jit(fit)()]
    except jax.errors.ConcretizationTypeError:  # a hyper-parameter is traced: the update will tell
        return recognised
    leaves = zip(recognised, fits, strict=True)
    return agree_in_ties([None if fit is False else found for found, fit in leaves], groups)


def fit_denominators(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    recognised: list[Recognised | None],
    groups: Groups,
    given: Given,
) -> list[FittedDenominator | None]:
    """The `FittedDenominator` of each leaf, at the step and with the hyperparameters of `state`."""
    if given.b1 is not None and given.eps is not None:
        gains = {True: 1 - given.b1, False: 1.0}
        return [r and FittedDenominator(gains[r.averaged], given.eps) for r in recognised]
    tiny = _make_tiny(params, groups)
    grads, first, second = (_make_tiny(params, groups, v) for v in (GRADS, FIRST, SECOND))
    # All single numbers (counts, hyperparameters) are those of the state of the measured step; arrays
    # stay those of the tiny copy.
    with_numbers = jax.tree.map(_take_number, tx.init(tiny), state)
    updates, after = tx.update(grads, _set_moments(with_numbers, first, second), tiny)
    columns = ([x for _, x in list_leaves(updates)], *get_leaf_moments(after, tiny))

    # All leaves of one Adam have the same b1 and eps: one fit for each state keeps the program small.
    # It is that of a leaf on the spheres, where the chain may do more than elsewhere; unless the tiny
    # leaf has another second moment than the real one, because its groups are too small.
    fits: dict[int, FittedDenominator] = {}
    leaves = list(zip(recognised, groups.leaves, list_leaves(tiny), *columns, strict=True))
    for found, leaf, (_, x), q, m, v in sorted(leaves, key=lambda row: row[1] is None):
        if found is None or found.node in fits or not found.has_momentum:
            continue
        if leaf is not None and found.elementwise != (v is not None and v.shape == x.shape):
            continue
        for axis in _choose_axis(leaf, x):
            q, m, v = (_take_first_group(axis, y) for y in (q, m, v))
            fit = _fit(q, m, v if found.elementwise else None, found.averaged)
            fits[found.node] = _replace_by_given(fit, found.averaged, given)
    # Without a momentum, or in groups of one coordinate, a is the gradient: there is nothing to fit.
    alone = FittedDenominator(1.0, 0.0)
    return [fits.get(found.node, alone) if found else None for found in recognised]


def _replace_by_given(fit: FittedDenominator, averaged: bool, given: Given) -> FittedDenominator:
    """Puts the given numbers in place of the fitted ones; a fit that failed stays one."""
    if averaged and given.b1 is not None:
        fit = fit._replace(gain=jnp.asarray(1 - given.b1, fit.gain.dtype))
    return fit if given.eps is None else fit._replace(eps=given.eps)


def _fit(q: jax.Array, m: jax.Array, v: jax.Array | None, averaged: bool) -> FittedDenominator:
    """Fits the updates of a tiny group to its moments after them."""
    tolerance = 0.01 + 4 * max(float(jnp.finfo(y.dtype).eps) for y in (q, m))
    gain = 1 - m[0] if averaged else jnp.ones_like(m[0])
    gain, q, m = (upcast(y) for y in (gain, q, m))
    moved = q != 0
    b = m / jnp.where(moved, q, 1)
    if v is None:
        eps, expected = jnp.zeros_like(gain), b[0]
    else:
        # b is a line in sqrt(v), and only the ratio of its offset to its slope matters.
        root = jnp.sqrt(upcast(v)).astype(m.dtype)
        slope = (b[0] - b[1]) / (root[0] - root[1])
        eps = jnp.maximum(b[1] / jnp.where(slope != 0, slope, 1) - root[1], 0)
        expected = slope * (root + eps)
    # At a learning rate of 0 nothing moves, which is no evidence against the fit.
    fits = jnp.all(jnp.abs(q * expected - m) <= tolerance * jnp.abs(m)) | ~jnp.any(moved)
    return FittedDenominator(gain, eps, fits)


def _take_number(tiny: Any, real: Any) -> Any:
    """`real` in the precision of `tiny` if it is one number; an array stays that of the tiny copy."""
    if jnp.ndim(real):
        return tiny
    inexact = all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (tiny, real))
    return jnp.asarray(real, jnp.result_type(tiny)) if inexact else real


def _take_first_group(axis: int, x: Any) -> Any:
    if x is None:
        return None
    return x[tuple(slice(None) if k == axis else 0 for k in range(jnp.ndim(x)))]


def _make_tiny(params: Any, groups: Groups, values: tuple[float, ...] = (0.0,) * WIDTH) -> Any:
    """Copies the structure of the parameters, with one tiny group of values per index of a block."""

    def get_shape(leaf: ArrayGroups | None, x: Any) -> tuple[int, ...]:
        sizes = [1] * jnp.ndim(x)
        if leaf is not None and leaf.axes and leaf.counts[-1] != leaf.shape[leaf.axes[-1]]:
            sizes[leaf.axes[-1]] = leaf.counts[-1]
        for axis in _choose_axis(leaf, x):
            sizes[axis] = WIDTH
        return tuple(sizes)

    def fill(leaf: ArrayGroups | None, x: Any) -> jax.Array:
        found = jnp.zeros(get_shape(leaf, x), jnp.result_type(x))
        for axis in _choose_axis(leaf, x):
            row = [WIDTH if k == axis else 1 for k in range(jnp.ndim(x))]
            found = found + jnp.asarray(values, found.dtype).reshape(row)
        return upcast(found)

    leaves = zip(groups.leaves, groups.list_leaves(params), strict=True)
    return groups.unflatten([None if x is None else fill(leaf, x) for leaf, x in leaves])


def _choose_axis(leaf: ArrayGroups | None, x: Any) -> tuple[int, ...]:
    """The axis along which a tiny group extends, or () if there is none; off the spheres the first."""
    if leaf is None:
        return tuple(range(jnp.ndim(x)))[:1]
    return leaf.summed[:1] if leaf.size > 1 else ()


def _set_moments(state: Any, first: Any, second: Any) -> Any:
    """Replaces the moments in a state, by path; a second moment of a whole group becomes 1."""

    def replace(tree: Any, values: Any) -> Any:
        by_path = dict(list_arrays(values))
        leaves, treedef = leaves_with_paths(tree, lambda _: False)
        found = [
            x if x is None or path not in by_path else _fill_like(x, by_path[path])
            for path, x in leaves
        ]
        return jax.tree.unflatten(treedef, found)

    def replace_in_state(node: Any) -> Any:
        if not _has_moments(node):
            return node
        names, fields = get_moment_names(node) or Moments(), {}
        for name in node._fields:
            if name in names:
                values = second if name == names.square else first
                fields[name] = replace(getattr(node, name), values)
            else:
                fields[name] = _set_moments(getattr(node, name), first, second)
        return node._replace(**fields)

    return jax.tree.map(replace_in_state, state, is_leaf=_has_moments)


def _fill_like(x: jax.Array, values: jax.Array) -> jax.Array:
    return values.astype(x.dtype) if values.shape == x.shape else jnp.ones_like(x)


def _has_moments(node: Any) -> bool:
    return any(get_moment_names(node) or ())

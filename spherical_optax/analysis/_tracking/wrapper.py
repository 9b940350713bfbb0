"""`track`: measures what an optimizer does on the spheres, and does not change what it does."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from spherical_optax import geometry
from spherical_optax._core.arguments import is_number, require_params, require_transformation
from spherical_optax._core.boxes import box_like, open_boxes
from spherical_optax._core.compiler_hints import depend_on
from spherical_optax._core.groups import Groups
from spherical_optax._core.matching import match
from spherical_optax._core.paths import list_leaves
from spherical_optax._core.sphere import Spheres
from spherical_optax._core.trees import is_placeholder
from spherical_optax.analysis._tracking.measure import (
    Measured,
    TakenStep,
    detect_movement,
    measure_tracked_step,
)
from spherical_optax.analysis._tracking.probe import Given, recognise_optimizer
from spherical_optax.analysis._tracking.updates_from_state import get_replay


class TrackState(NamedTuple):
    """State of `track`. Group-sized fields are trees like the parameters, None off the spheres."""

    angle: Any  # between x before and after the measured step, group-sized, radians
    calls: jax.typing.ArrayLike  # number of calls of update until now, int32
    due: jax.typing.ArrayLike  # the call that will be measured next, int32
    effective_lr: Any  # eta^e of the measured step, group-sized; None where a and b are not known
    inner_state: optax.OptState
    radial_cosine: Any  # <q, u> / ||q|| of the measured update q, group-sized
    radius: Any  # ||x|| before the measured step, group-sized
    step: jax.typing.ArrayLike  # the call that was measured last, from 1; 0 before the first, int32


def track(
    tx: Any,
    spheres: Spheres,
    *,
    every: int = 1,
    reduce: Callable[[jax.Array], jax.Array] | None = None,
    b1: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps any optimizer and measures its steps on the spheres; the updates do not change.

    Use this when you want to log effective learning rates, angles and radii during a training run.

    radius = ||x||,   angle = arctan(eta^e ||c_perp||),   radial_cosine = <q, u> / ||q||
    effective_lr = eta^e = A / (1 - A <c, u>),  A = eta / (r^2 d^{-1/2} ||b||)                  [11]

    Radius, angle and radial cosine are measured from x and the update q alone, for any optimizer. The
    effective learning rate also needs the a and the b of the step x - eta a / b. They are known for
    `optax.adam`, `optax.adamw`, `optax.sgd`, the optimizers of this package but `so.muonh` and
    `so.stacked`, and every optimizer whose states declare their moments by `MOMENTS`, also in chains,
    masks, partitions, with schedules and `optax.inject_hyperparams`. The rate is None if the state holds
    anything else, or if the update is no m / (sqrt(v) + eps): Nesterov's momentum, AdaMax, `eps_root`, a
    clip by value.

    You do not repeat b1 and eps: `track` works them out from one update of the optimizer on a tiny tree.
    Every update that is measured has to lie along a / b; if one does not, its rate is NaN. A group that
    did not move, or along its radius alone, has rate 0: a filter without a gradient, for example.

    Give `b1` and `eps` for an optimizer that cannot run on the tiny tree, such as a chain with
    `optax.contrib.reduce_on_plateau`, which needs the loss. Then nothing runs on a tiny tree, the
    state may also contain states of unknown classes if they hold numbers only, and declared states may
    hold other large arrays. What is tested and what is trusted:

    - Every update still has to lie along a / b, to within 0.01 rad in float32. A wrong `eps` turns a / b
      and gives NaN. Only a group in which a single coordinate has a gradient shows no turn, and its rate
      may be wrong.
    - `b1` is trusted. It scales a and turns nothing: the rate is proportional to 1 - b1.
    - A number that is given alone replaces the fitted one; the test on the tiny tree stays.

    Read the state by name: `optax.tree.get(state, "angle")`, or `so.analysis.summary(state)`, which also
    works if a parameter has the name of a field. Wrap the whole optimizer: `track` does not see what a
    chain does behind it. Around `optax.MultiSteps`, a step that only accumulates measures an angle of 0;
    inside it (`optax.MultiSteps(so.track(tx, spheres), 4)`) such steps do not occur.

    Args:
      tx: any Optax optimizer.
      spheres: how the leaves split into groups.
      every: measure step 1, and then one step in every `every`. Measuring takes a few passes over
        parameters and moments (`python -m benchmarks.speed` measures how long).
      reduce: None stores one number per group, of keepdims shape. A function of JAX such as
        `jnp.median` (none of NumPy, which cannot be traced) reduces them to one number per leaf.
      b1: decay of the first moment, for all averages of gradients in the state: a = m / (1 - b1). None:
        `track` works it out.
      eps: the number in b = sqrt(v) + eps, for all second moments per coordinate. None: `track` works it
        out. The v is that of the state, without bias correction: where eps is as large as sqrt(v), the
        first 1 / (1 - b2) steps of Adam have another eps, and their rate may be NaN.

    Returns:
      A `GradientTransformationExtraArgs` that needs `params`. Its state is a `TrackState`: the state of
      `tx`, three counts, and four numbers per group.

    Raises:
      ValueError: if `tx` is no optimizer, `every` no positive integer, `reduce` no function, `b1` no
        number in [0, 1) or `eps` no number in [0, infinity); in `init` and `update` if `spheres` does
        not fit or `MOMENTS` of a state names no field, in `update` if `params` is missing or `state` is
        not of `track`.

    >>> tx = so.track(optax.sgd(0.5), so.Sphere())
    >>> params = {"w": jnp.array([[2.0], [0.0]])}
    >>> updates, state = tx.update({"w": jnp.array([[0.0], [4.0]])}, tx.init(params), params)
    >>> optax.tree.get(state, "effective_lr"), optax.tree.get(state, "angle")
    ({'w': Array([[0.125]], dtype=float32)}, {'w': Array([[0.785]], dtype=float32)})

    Source: Theorem 2, [11], [12] and [14].
    """
    require_transformation("track", tx, "is no optimizer; write track(optax.adam(1e-3), spheres)")
    if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
        raise ValueError(f"track: every is {every!r}, not a positive integer")
    if reduce is not None and not callable(reduce):
        raise ValueError(f"track: reduce is {reduce!r}, not a function such as jnp.median")
    if reduce is not None:
        _require_traceable(reduce)
    given = Given(
        _require_number("b1", b1, "from 0 to below 1", lambda x: 0 <= x < 1),
        _require_number("eps", eps, "of at least 0", lambda x: 0 <= x < math.inf),
    )
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    tracker = _Tracker(optax.with_extra_args_support(tx), spheres, int(every), reduce, given)
    return optax.GradientTransformationExtraArgs(tracker.init, tracker.update)


def _require_traceable(reduce: Callable[[jax.Array], jax.Array]) -> None:
    try:
        jax.eval_shape(lambda x: reduce(x), jax.ShapeDtypeStruct((2,), jnp.float32))
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"track: reduce is {reduce!r}, which JAX cannot trace; take jnp.median, not np.median"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Tracker:
    """The `init` and `update` of `track`."""

    tx: optax.GradientTransformationExtraArgs
    spheres: Spheres
    every: int
    reduce: Callable[[jax.Array], jax.Array] | None
    given: Given
    # What `recognise_optimizer` found, by the structure, shapes and dtypes of the parameters.
    found: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)

    def init(self, params: Any) -> TrackState:
        inner_state = self.tx.init(params)
        # Separate arrays: one buffer that a state holds twice cannot be donated.
        calls, step = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if is_placeholder(params):
            values, due = Measured(*(jnp.zeros([]) for _ in range(4))), jnp.ones([], jnp.int32)
        else:
            groups = match(self.spheres, params)
            radius = geometry.norm(params, groups)
            # Zeros and ones are computed from sums over the parameters: they then have the sharding of
            # the values that `update` puts in their place, also in `jax.shard_map` and under explicit
            # meshes.
            due = 1 + 0 * detect_movement(radius)
            angle, rate, cosine = (jax.tree.map(jnp.zeros_like, radius) for _ in range(3))
            rate = _drop_unknown(rate, self._recognise(open_boxes(params), groups), groups)
            found = self._reduce_groups(Measured(radius, angle, rate, cosine))
            values = Measured(*(groups.make_state(x, params, off=lambda _: None) for x in found))
        return TrackState(
            calls=calls, due=due, inner_state=inner_state, step=step, **values._asdict()
        )

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, TrackState]:
        _require_track_state(state)
        params = require_params(params)
        x = open_boxes(params)
        groups = match(self.spheres, x)
        kept = Measured(*(open_boxes(getattr(state, name)) for name in Measured._fields))
        _check_shapes(
            kept.radius, jax.eval_shape(lambda: self._reduce_groups(geometry.norm(x, groups)))
        )
        recognised = self._recognise(x, groups)
        calls = optax.safe_increment(state.calls)
        is_due: Any = calls >= jnp.asarray(state.due)
        grads, before = updates, state.inner_state
        updates, after = self.tx.update(grads, before, params, **extra_args)

        def measure(updates: Any) -> tuple[Any, ...]:
            taken = open_boxes(TakenStep(params, grads, updates, before, after))
            values = measure_tracked_step(self.tx, taken, recognised, groups, self.given)
            # If nothing moved, for example because gradients are accumulated, the next call is measured.
            wait = jnp.where(detect_movement(values.angle) > 0, self.every, 1)
            due = calls + wait.astype(jnp.int32)
            return jnp.copy(calls), due, self._reduce_groups(values)

        measured = state.step, state.due, kept
        if not isinstance(is_due, Tracer):
            if is_due:
                measured = measure(updates)
        else:
            # The measurement recomputes the updates where it can. If it read the updates themselves, XLA
            # would keep them in memory at every step. The condition also saves memory where it always
            # holds: with `every=1`, Adam on a ResNet-18 takes 45.5 MiB with it and 85.4 MiB without it
            # (JAX 0.10, CPU).
            replay = get_replay(self.tx, grads, before, params, **extra_args)
            measured = jax.lax.cond(
                is_due,
                lambda: measure(replay(after) if replay else updates),
                lambda: measured,
            )
            updates = depend_on(updates, measured[1])
        step, due, values = measured
        fields = {name: box_like(getattr(state, name), x) for name, x in values._asdict().items()}
        return updates, TrackState(calls=calls, due=due, inner_state=after, step=step, **fields)

    def _recognise(self, params: Any, groups: Groups) -> list[Any]:
        """Recognises the optimizer, once for parameters of each structure, shape and dtype."""
        leaves = groups.list_leaves(params)
        types = (x is None or (jnp.shape(x), jnp.result_type(x)) for x in leaves)
        key = (groups.treedef, *types)
        if key not in self.found:
            self.found[key] = recognise_optimizer(self.tx, params, groups, self.given)
        return self.found[key]

    def _reduce_groups(self, tree: Any) -> Any:
        return tree if self.reduce is None else jax.tree.map(self.reduce, tree)


def _require_number(
    name: str, value: Any, wanted: str, is_allowed: Callable[[float], bool]
) -> float | None:
    """The value as a float, and one error for what is no such number."""
    if value is None:
        return None
    is_known = is_number(value) and not isinstance(value, bool | Tracer) and jnp.ndim(value) == 0
    if not is_known or jnp.iscomplexobj(value) or not is_allowed(float(value)):
        raise ValueError(f"track: {name} is {value!r}, not a number {wanted}")
    return float(value)


def _require_track_state(state: Any) -> None:
    if not isinstance(state, TrackState):
        raise ValueError(
            f"track: the state is a {type(state).__name__}, not one of so.track; to go on from it, "
            "state = tracked.init(params)._replace(inner_state=state)"
        )


def _check_shapes(radii: Any, expected: Any) -> None:
    """Raises if the state was made with other spheres; `jax.lax.cond` would say that branches differ."""
    found, wanted = (
        {path: jnp.shape(x) for path, x in list_leaves(tree, lambda _: False)}
        for tree in (radii, expected)
    )
    remedy = "take the spheres that the state was made with, or make a state with init"
    if others := sorted(found.keys() ^ wanted.keys()):
        where = "in the state only" if others[0] in found else "in `spheres` only"
        raise ValueError(
            f"track: the state has {len(found)} parameters on spheres, not the {len(wanted)} that "
            f"`spheres` says: {'/'.join(others[0])!r} is {where}; {remedy}"
        )
    for path, shape in wanted.items():
        if found[path] != shape:
            raise ValueError(
                f"track: {'/'.join(path)!r} has radii of shape {found[path]} in the state, and "
                f"{shape} by `spheres`; {remedy}"
            )


def _drop_unknown(rates: Any, recognised: list[Any], groups: Groups) -> Any:
    """Puts None in place of the rates of leaves whose a and b are not known."""
    leaves = zip(groups.list_leaves(rates), recognised, strict=True)
    return groups.unflatten([None if r is None else x for x, r in leaves])

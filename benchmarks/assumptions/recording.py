"""Records the effect of every training step on every filter."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spherical_optax as so
from benchmarks.reporting.progress import show_progress
from benchmarks.training import recipes
from benchmarks.training.build import find_filter_spheres
from benchmarks.training.data import Dataset
from benchmarks.training.models import MODELS
from benchmarks.training.trainer import Trainer

SEED = 0


class Step(NamedTuple):
    """The figures of one step: vectors with one number per filter."""

    factor: Any  # 1 - A <c, u>
    angle: Any  # moved on the sphere, radians
    gradient: Any  # ||grad L(u)||, without the L2 term
    radius: Any  # before the step
    next_radius: Any


class WatchState(NamedTuple):
    inner_state: Any
    step: Step


def measure(params: Any, grads: Any, updates: Any, spheres: Any) -> Step:
    measured = so.analysis.measure_step(params, updates, spheres)
    # The update is q = -eta a / b, and A c = eta (a / b) / r. Therefore A <c, u> = -<q, x> / r^2.
    factor = jax.tree.map(
        lambda qx, r: 1 + qx / (r * r),
        so.geometry.dot(updates, params, spheres),
        measured.radius,
    )
    # grad L(u) = r grad L(x). BatchNorm's epsilon adds a radial part to grad L(x), which is removed.
    tangent = so.geometry.norm(so.geometry.project(params, grads, spheres), spheres)
    gradient = jax.tree.map(jnp.multiply, measured.radius, tangent)
    found = (factor, measured.angle, gradient, measured.radius, measured.next_radius)
    return Step(*(_concatenate_filters(tree) for tree in found))


def watch(tx: optax.GradientTransformation, spheres: Any) -> optax.GradientTransformation:
    """`tx` with the figures of the last step in its state, for an unchanged training loop."""

    def init(params):
        filters = _concatenate_filters(so.geometry.norm(params, spheres))
        # Separate arrays: JAX cannot donate one buffer that is twice in a state.
        return WatchState(tx.init(params), Step(*(jnp.zeros_like(filters) for _ in Step._fields)))

    def update(updates, state, params=None):
        grads = updates
        updates, inner_state = tx.update(grads, state.inner_state, params)
        return updates, WatchState(inner_state, measure(params, grads, updates, spheres))

    return optax.GradientTransformation(init, update)


class Diverged(ValueError):
    """The loss is not finite."""


class Recorder(Trainer):
    """A training loop that keeps the `Step` of every step."""

    def record(self, steps: int, advance: Callable[[float], None]) -> Step:
        """The figures of the first `steps` steps, as arrays (steps, filters)."""
        state = self.init(SEED)
        found = []
        for count in range(steps):
            epoch, step = divmod(count, self.steps)
            if step == 0:
                plan = self.draw_plan(SEED, epoch)
            state, loss = self._train(state, *self.train, plan, np.int32(step))
            if not math.isfinite(loss):
                raise Diverged(f"diverged in step {count + 1} (the loss is not finite)")
            # A copy, because the next step overwrites the arrays on the device.
            found.append(jax.tree.map(lambda x: np.array(x, np.float64), state.opt_state.step))
            advance(float(loss))
        return Step(*(np.stack(column) for column in zip(*found, strict=True)))


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    learning_rate: float
    weight_decay: float  # the L2 coefficient


def make_optimizers(dataset: str, model: str, spheres: Any) -> dict[str, Optimizer]:
    """The optimizers with the paper's values; SGD without momentum gets those of SGD-M."""
    sgd, adam = (recipes.get_hyperparameters(dataset, model, name) for name in ("sgd", "adam"))

    def descent(momentum: float | None) -> Optimizer:
        rate, _, decay = sgd
        tx = so.sgd(rate, spheres, momentum=momentum, weight_decay=decay)
        return Optimizer(tx, rate, decay)

    rate, b2, decay = adam
    assert b2 is not None
    return {
        "SGD": descent(None),
        "SGD-M": descent(recipes.MOMENTUM),
        "Adam": Optimizer(so.adam(rate, spheres, b2=b2, weight_decay=decay), rate, decay),
    }


def _concatenate_filters(tree: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def record(
    data: Dataset, model_name: str, steps: int
) -> tuple[dict[str, Optimizer], dict[str, Step]]:
    model = MODELS[model_name](data.source.num_classes)
    spheres = find_filter_spheres(model, data.source.shape)
    compared = make_optimizers(data.source.name, model_name, spheres)
    found = {}
    with show_progress(len(compared) * steps) as advance:
        for name, optimizer in compared.items():
            tx = watch(optimizer.tx, spheres)
            # Without a scan, on any device, because every step is recorded.
            recorder = Recorder(model, data, tx, recipes.BATCH_SIZE, scan=False)

            def show(loss: float, name: str = name) -> None:
                advance(f"{name}: loss {loss:.4f}")

            try:
                found[name] = recorder.record(steps, show)
            except Diverged as error:
                raise Diverged(f"{name} {error}") from error
    return compared, found

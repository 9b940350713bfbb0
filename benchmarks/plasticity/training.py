"""Training on task after task: all seeds and all cells of a grid in one compiled program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spherical_optax as so
from benchmarks.plasticity.methods import Cell, Method
from benchmarks.plasticity.tasks import (
    HEAD,
    SECOND,
    Task,
    add_head,
    draw_task,
    init_params,
    predict,
)


class Turn(NamedTuple):
    """What the steps do to the second hidden layer, as `so.track` measures it."""

    radius: Any
    angle: Any  # radians
    effective_lr: Any  # NaN where it is not known


class Curves(NamedTuple):
    """Arrays with one number per task in the last axis."""

    accuracy: Any  # on the images of the task, after its last step
    radius: Any  # this and the next two: means over the steps of the task
    angle: Any
    effective_lr: Any
    head_radius: Any  # after the last step of the task


class Experiment(NamedTuple):
    images: jax.Array
    spheres: Any
    tasks: int
    steps: int  # of a task

    def train(self, method: Method, cells: Sequence[Cell], seeds: Sequence[int]) -> Curves:
        """Curves of shape (cells, seeds, tasks)."""
        rates, decays = (jnp.asarray(column, float) for column in zip(*cells, strict=True))

        def train_one(rate: jax.Array, decay: jax.Array, seed: jax.Array) -> Curves:
            return self._train_one(method.make(rate, decay, self.spheres), seed)

        train_seeds = jax.vmap(train_one, (None, None, 0))
        train_all = jax.jit(jax.vmap(train_seeds, (0, 0, None)))
        curves = train_all(rates, decays, jnp.asarray(seeds))
        return jax.tree.map(lambda x: np.asarray(x, float), curves)

    def _train_one(self, tx: optax.GradientTransformation, seed: jax.Array) -> Curves:
        """One seed on all tasks. Weights, labels and batches depend on the seed alone."""
        init_key, tasks_key = jax.random.split(jax.random.key(seed))
        params = init_params(init_key, self.images)
        tracked = so.track(tx, self.spheres)

        def train_on_task(carry: Any, key: jax.Array) -> tuple[Any, Curves]:
            task = draw_task(key, self.steps)

            def step(carry: Any, batch: jax.Array) -> tuple[Any, Turn]:
                params, state = carry
                grads = jax.grad(self._compute_loss)(params, task, batch)
                updates, state = tracked.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), read_turn(state)

            carry, turns = jax.lax.scan(step, carry, task.batches)
            means = jax.tree.map(jnp.mean, turns)
            params, _ = carry
            accuracy, radius = self._measure_accuracy(params, task), self._measure_head(params)
            return carry, Curves(accuracy, *means, head_radius=radius)

        start = params, tracked.init(params)
        return jax.lax.scan(train_on_task, start, jax.random.split(tasks_key, self.tasks))[1]

    def _compute_loss(self, params: Any, task: Task, batch: jax.Array) -> jax.Array:
        logits = predict(params, self.images[batch])
        labels = task.labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _measure_accuracy(self, params: Any, task: Task) -> jax.Array:
        return jnp.mean(predict(params, self.images).argmax(-1) == task.labels)

    def _measure_head(self, params: Any) -> jax.Array:
        """The radius of the head's kernel and bias as one vector."""
        radii = so.geometry.norm(params, add_head(self.spheres))
        return jnp.squeeze(radii[HEAD]["kernel"])


def read_turn(state: Any) -> Turn:
    """The last measurement in a state of `so.track`; the bias is on the sphere of the kernel."""
    radius, angle, rate = (
        tree[SECOND]["kernel"] for tree in (state.radius, state.angle, state.effective_lr)
    )
    rate = jnp.full_like(angle, jnp.nan) if rate is None else rate
    return Turn(jnp.squeeze(radius), jnp.squeeze(angle), jnp.squeeze(rate))

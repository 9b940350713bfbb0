"""The training loop: one compiled job per optimizer, run once per seed.

Images stay in device memory; shuffling and augmentation are part of the compiled code. An
accelerator gets one call per epoch (a scan over the steps); a CPU gets one call per step, because
XLA's CPU convolutions inside a scan take about twelve times as long. Both compute the same.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.augment import normalize, random_crop_and_flip
from benchmarks.data import DataError, Dataset, Source, Split

EVALUATION_BATCH = 400


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Plan(NamedTuple):
    """One epoch's randomness, a row per step."""

    indices: jax.Array  # (steps, batch)
    keys: jax.Array  # (steps,)


@dataclass
class Run:
    """What one seed gave, epoch by epoch; accuracies in per cent, times in seconds."""

    seed: int
    train_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float | None] = field(default_factory=list)  # None: not looked at
    step_time: list[float] = field(default_factory=list)
    diverged: bool = False

    @property
    def best_epoch(self) -> int | None:
        """The first with the best validation accuracy; None if the run diverged."""
        if self.diverged or not self.validation_accuracy:
            return None
        return self.validation_accuracy.index(max(self.validation_accuracy))

    @property
    def selected_test_accuracy(self) -> float | None:
        """That of the best validation epoch."""
        return None if self.best_epoch is None else self.test_accuracy[self.best_epoch]


@partial(jax.jit, static_argnames="model")
def init_variables(model: nn.Module, key: jax.Array, image: jax.Array) -> Any:
    return model.init(key, image, train=False)


@partial(jax.jit, static_argnames=("steps", "batch_size", "n"))
def make_plan(key: jax.Array, steps: int, batch_size: int, n: int) -> Plan:
    """Every image at most once an epoch; the remainder that fills no batch waits for the next."""
    shuffle_key, step_key = jax.random.split(key)
    order = jax.random.permutation(shuffle_key, n)[: steps * batch_size]
    return Plan(order.reshape(steps, batch_size), jax.random.split(step_key, steps))


@partial(jax.jit, static_argnames=("model", "source"))
def count_correct(
    model: nn.Module, source: Source, variables: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits: Any = model.apply(variables, normalize(images, source), train=False)
    return (logits.argmax(-1) == labels).sum()


class Trainer:
    """Compiles `tx` on `model` and `data` once; `run` then trains one seed from scratch."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        tx: optax.GradientTransformation,
        batch_size: int,
        *,
        scan: bool | None = None,
    ):
        self.model, self.source, self.tx, self.batch_size = model, data.source, tx, batch_size
        self.scan = jax.default_backend() != "cpu" if scan is None else scan
        self.steps = steps_per_epoch(data, batch_size)
        self.train = jax.tree.map(jnp.asarray, data.train)
        self.validation = _batches(data.validation)
        self.test = _batches(data.test)
        self.image = jnp.zeros((1, *data.source.shape), jnp.float32)

        # Compiled ahead of time, so that no measured step contains compilation.
        state = jax.eval_shape(self.init, 0)
        plan = jax.eval_shape(self._plan, jax.random.key(0))
        train = jax.jit(self._epoch if self.scan else self._step, donate_argnums=0)
        index = () if self.scan else (np.int32(0),)
        self._train = train.lower(state, *self.train, plan, *index).compile()
        self.state_bytes_per_parameter = _num_bytes(state.opt_state) / _num_elements(state.params)

    def init(self, seed: int) -> State:
        """Where a run starts: the same for every method."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        variables = init_variables(self.model, key, self.image)
        params = variables["params"]
        return State(params, variables["batch_stats"], self.tx.init(params))

    def run(
        self,
        seed: int,
        epochs: int,
        on_epoch: Callable[[Run, State], None] = lambda run, state: None,
        resume: tuple[Run, State] | None = None,
        test: Literal["best", "every", "never"] = "best",
    ) -> Run:
        """Trains up to `epochs` epochs; `on_epoch` sees the run so far and its state.

        `test` says when to look at the test images: where validation is at its best so far, after
        every epoch, or never.
        `resume` is what `on_epoch` has seen before: from there, the run goes on as if never interrupted.
        """
        run, state = resume or (Run(seed), self.init(seed))
        data_key = jax.random.fold_in(jax.random.key(seed), 1)
        for epoch in range(len(run.train_loss), epochs):
            state, losses, step_time = self._train_epoch(state, jax.random.fold_in(data_key, epoch))
            run.train_loss.append(float(losses.mean()))
            run.step_time.append(step_time)
            if not math.isfinite(run.train_loss[-1]):
                run.diverged = True
                return run
            run.validation_accuracy.append(self._accuracy(state, self.validation))
            look = test == "every" or (test == "best" and run.best_epoch == epoch)
            run.test_accuracy.append(self._accuracy(state, self.test) if look else None)
            on_epoch(run, state)
        return run

    def _plan(self, key: jax.Array) -> Plan:
        return make_plan(key, self.steps, self.batch_size, len(self.train.labels))

    def _step(
        self, state: State, images: jax.Array, labels: jax.Array, plan: Plan, step: jax.Array
    ) -> tuple[State, jax.Array]:
        batch = plan.indices[step]
        x, y = images[batch], labels[batch]
        if self.source.padding:
            x = random_crop_and_flip(plan.keys[step], x, self.source.padding)
        x = normalize(x, self.source)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = self.model.apply(variables, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, new["batch_stats"]

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    def _epoch(
        self, state: State, images: jax.Array, labels: jax.Array, plan: Plan
    ) -> tuple[State, jax.Array]:
        def body(state, step):
            return self._step(state, images, labels, plan, step)

        return jax.lax.scan(body, state, jnp.arange(self.steps, dtype=jnp.int32))

    def _train_epoch(self, state: State, key: jax.Array) -> tuple[State, np.ndarray, float]:
        """The new state, the steps' losses and the median time of a step."""
        plan = jax.block_until_ready(self._plan(key))
        if self.scan:
            start = time.perf_counter()
            state, losses = jax.block_until_ready(self._train(state, *self.train, plan))
            return state, np.asarray(losses), (time.perf_counter() - start) / self.steps
        losses, times = [], []
        for step in range(self.steps):
            start = time.perf_counter()
            state, loss = self._train(state, *self.train, plan, np.int32(step))
            losses.append(float(loss))  # waits for the step
            times.append(time.perf_counter() - start)
        return state, np.asarray(losses, np.float32), float(np.median(times))

    def _accuracy(self, state: State, batches: list[Split]) -> float:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        correct = sum(count_correct(self.model, self.source, variables, *b) for b in batches)
        return 100 * int(correct) / sum(int((b.labels >= 0).sum()) for b in batches)


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    n = len(data.train.labels)
    if n < batch_size:
        raise DataError(
            f"{data.source.name}: {n} training images are too few for one batch of {batch_size}"
        )
    return n // batch_size


def _batches(split: Split) -> list[Split]:
    """Batches of one size, so that evaluation compiles once; padding has label -1, never right."""
    batches = []
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        images, labels = (array[start : start + EVALUATION_BATCH] for array in split)
        missing = EVALUATION_BATCH - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(labels, (0, missing), constant_values=-1)
        batches.append(Split(jnp.asarray(images), jnp.asarray(labels)))
    return batches


def _num_elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _num_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

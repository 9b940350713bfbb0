"""Training: one compiled program for all rates, decays and seeds of a method."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spherical_optax as so
from benchmarks.language.methods import Cell, Method, Spheres
from benchmarks.language.network import HIDDEN, NORMALISED, Sizes, init_params, predict
from benchmarks.language.text import Corpus, cut_windows, draw_windows

VALIDATION_BATCH = 64  # windows at once
TRACK_EVERY = 10  # steps
GROUPS = ("normalised", "others")


class Turn(NamedTuple):
    """What a step does to the matrices, as `so.track` measures it: medians over the groups."""

    radius: Any
    angle: Any  # radians
    effective_lr: Any  # NaN where it is not known


class Record(NamedTuple):
    """A run: one number for every evaluation, in order."""

    steps: list[int]  # behind the evaluation
    validation: list[float]  # loss per character, in nats
    training: list[
        float
    ]  # the mean loss of the batches since the evaluation before, as the next ones
    turns: dict[str, Turn]  # of the queries and keys by head, and of the other matrices; lists
    seconds: float  # without compilation


class Setting(NamedTuple):
    """What all runs share. Weights and batches of a run depend on the seed alone."""

    corpus: Corpus
    sizes: Sizes
    batch: int
    steps: int


class Carry(NamedTuple):
    params: Any
    state: Any  # of the tracked optimizer
    sums: Any  # of the loss and the turns, since the last evaluation


def list_stops(steps: int, evaluations: int) -> list[int]:
    """The steps behind which a run is evaluated, at even distances; the last one is the end."""
    count = min(evaluations, steps)
    return [steps * i // count for i in range(1, count + 1)]


def warm_up_and_decay(rate: Any, steps: int) -> optax.Schedule:
    """Linearly from zero to `rate` in a tenth of the steps, and linearly back to zero after the last."""
    warm = max(steps // 10, 1)
    return lambda count: (
        rate * jnp.minimum((count + 1) / warm, (steps - count) / (steps - warm + 1))
    )


def place_spheres(spheres: Spheres) -> Any:
    """The measured spheres of queries and keys, and the declared ones of the other matrices."""
    return jax.tree.map(
        lambda measured, declared: measured or declared,
        spheres.measured,
        spheres.declared,
        is_leaf=lambda x: x is None,
    )


class Trainer:
    """Trains runs of one method, one after another."""

    def __init__(self, setting: Setting, method: Method, spheres: Spheres):
        self.setting, self.method, self.spheres = setting, method, spheres
        self._windows = cut_windows(setting.corpus.validation, setting.sizes.context)
        self._begin = jax.jit(self._make_carry)
        self._advance = jax.jit(self._take_steps, donate_argnames="carry")
        self._evaluate = jax.jit(self._compute_validation_loss)
        self._compiled = False

    def train(self, cell: Cell, seed: int, evaluations: int) -> Record:
        cell = Cell(*(jnp.asarray(value, jnp.float32) for value in cell))
        if not self._compiled:  # one step, so that no run is charged with the compilation
            carry = self._advance(cell, seed, self._begin(cell, seed), 0, 1)
            jax.block_until_ready(self._evaluate(carry.params))
            self._compiled = True
        start, carry, losses, means = time.perf_counter(), self._begin(cell, seed), [], []
        stops = list_stops(self.setting.steps, evaluations)
        for first, stop in zip([0, *stops], stops, strict=False):
            carry = self._advance(cell, seed, carry, first, stop)
            means.append(jax.tree.map(lambda x, n=stop - first: float(x) / n, carry.sums))
            losses.append(float(self._evaluate(carry.params)))
        training, turns = zip(*means, strict=True)
        listed = {
            name: Turn(*map(list, zip(*(turn[name] for turn in turns), strict=True)))
            for name in GROUPS
        }
        return Record(stops, losses, list(training), listed, time.perf_counter() - start)

    def _make_optimizer(self, cell: Cell) -> optax.GradientTransformationExtraArgs:
        schedule = warm_up_and_decay(cell.learning_rate, self.setting.steps)
        tx = self.method.make(schedule, cell.weight_decay, cell.ratio, self.spheres)
        return so.track(tx, place_spheres(self.spheres), every=TRACK_EVERY)

    def _make_carry(self, cell: Cell, seed: Any) -> Carry:
        params = init_params(jax.random.key(seed), self.setting.sizes)
        return Carry(params, self._make_optimizer(cell).init(params), make_zeros())

    def _take_steps(self, cell: Cell, seed: Any, carry: Carry, first: Any, stop: Any) -> Carry:
        """The steps from `first` to before `stop`."""
        tx, (corpus, sizes, batch, _) = self._make_optimizer(cell), self.setting
        batches_key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(number: Any, carry: Carry) -> Carry:
            key = jax.random.fold_in(batches_key, number)
            windows = draw_windows(key, corpus.training, batch, sizes.context)
            loss, grads = jax.value_and_grad(compute_loss)(carry.params, windows, sizes)
            updates, state = tx.update(grads, carry.state, carry.params)
            found = loss, read_turns(state)
            sums = jax.tree.map(jnp.add, carry.sums, found)
            return Carry(optax.apply_updates(carry.params, updates), state, sums)

        return jax.lax.fori_loop(first, stop, step, carry._replace(sums=make_zeros()))

    def _compute_validation_loss(self, params: Any) -> jax.Array:
        """The mean over all windows of the validation text."""
        sizes = self.setting.sizes
        losses = jax.lax.map(
            lambda window: compute_loss(params, window[None], sizes),
            self._windows,
            batch_size=VALIDATION_BATCH,
        )
        return losses.mean()


def compute_loss(params: Any, windows: jax.Array, sizes: Sizes) -> jax.Array:
    """The mean over all places but the last of every window, in nats per character."""
    logits = predict(params, windows[:, :-1], sizes)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_zeros() -> tuple[jax.Array, dict[str, Turn]]:
    """The sums of the loss and the turns before the first step."""
    zero = jnp.zeros([])
    return zero, {name: Turn(zero, zero, zero) for name in GROUPS}


def read_turns(state: Any) -> dict[str, Turn]:
    """The last measurement in a state of `so.track`."""
    return {
        "normalised": read_turn(state, NORMALISED),
        "others": read_turn(state, [name for name in HIDDEN if name not in NORMALISED]),
    }


def read_turn(state: Any, names: Any) -> Turn:
    """Medians over all groups of these matrices in all blocks."""

    def take_median(tree: Any) -> jax.Array:
        found = [
            block[name]["kernel"]
            for key, block in tree.items()
            if key.startswith("block_")
            for name in names
        ]
        if any(x is None for x in found):
            return jnp.asarray(jnp.nan)
        return jnp.median(jnp.concatenate([x.ravel() for x in found]))

    return Turn(*(take_median(getattr(state, field)) for field in Turn._fields))

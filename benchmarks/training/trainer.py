"""The training loop: one compiled program per optimizer, for all seeds, learning rates and decays.

Images stay in device memory; shuffling and augmentation are part of the compiled code. An
accelerator gets one call per epoch (a scan over the steps); a CPU gets one call per step, because
XLA's CPU convolutions inside a scan take about twelve times as long (JAX 0.10). Both compute the same.

Several devices, of one process or of many, share every batch. Parameters, statistics and optimizer
state are on every device, and BatchNorm's statistics are computed over the whole batch. Therefore a
run gives the same, up to rounding, on any number of devices.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.training.augment import normalize, random_crop_and_flip
from benchmarks.training.data import DataError, Dataset, Source, Split
from benchmarks.training.run import Run

EVALUATION_BATCH = 400

Hyperparams = Mapping[str, float]


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Plan(NamedTuple):
    """The random choices of one epoch, a row per step."""

    indices: jax.Array  # (steps, batch)
    keys: jax.Array  # (steps,)


# Called once per seed, so that compiling takes longer than running. Without LLVM's optimisation it takes
# a sixth of the time.
@partial(
    jax.jit,
    static_argnames=("model", "shape", "sharding"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def init_variables(
    model: nn.Module,
    shape: tuple[int, ...],
    seed: int,
    sharding: NamedSharding | None = None,
) -> Any:
    key = jax.random.fold_in(jax.random.key(seed), 0)
    variables = model.init(key, jnp.zeros((1, *shape), jnp.float32), train=False)
    return variables if sharding is None else jax.lax.with_sharding_constraint(variables, sharding)


@partial(jax.jit, static_argnames=("steps", "batch_size", "n", "sharding"))
def make_plan(
    seed: int, epoch: int, steps: int, batch_size: int, n: int, sharding: NamedSharding
) -> Plan:
    """Uses every image at most once an epoch, and leaves out a remainder that fills no batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
    shuffle_key, step_key = jax.random.split(key)
    order = jax.random.permutation(shuffle_key, n)[: steps * batch_size]
    plan = Plan(order.reshape(steps, batch_size), jax.random.split(step_key, steps))
    return jax.lax.with_sharding_constraint(plan, sharding)


@partial(jax.jit, static_argnames=("model", "source"))
def count_correct(
    model: nn.Module, source: Source, variables: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits: Any = model.apply(variables, normalize(images, source), train=False)
    return (logits.argmax(-1) == labels).sum()


class Trainer:
    """Compiles `tx` on `model` and `data` once; every `run` trains one seed from scratch.

    If `optax.inject_hyperparams` made `tx`, its hyper-parameters are arguments of the compiled program,
    and every run may have its own. The JAX devices `devices` share each batch; by default, the first
    device gets whole batches.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        tx: optax.GradientTransformation,
        batch_size: int,
        *,
        scan: bool | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self.model, self.source, self.tx, self.batch_size = model, data.source, tx, batch_size
        self.scan = jax.default_backend() != "cpu" if scan is None else scan
        self.steps = count_steps(data, batch_size)
        mesh = Mesh(np.array(devices or jax.devices()[:1]), ("data",))
        if batch_size % mesh.size:
            raise DataError(
                f"a batch of {batch_size} images cannot be shared by {mesh.size} devices: "
                "choose a multiple of their number"
            )
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec("data"))
        self.train = Split(*(_place(array, self.replicated) for array in data.train))
        self.validation = _make_batches(data.validation, self.sharded)
        self.test = _make_batches(data.test, self.sharded)
        self._init_tx = jax.jit(tx.init, out_shardings=self.replicated)

    @cached_property
    def state_bytes_per_parameter(self) -> float:
        shapes = self.get_shapes()
        return _count_bytes(shapes.opt_state) / _count_elements(shapes.params)

    @cached_property
    def _train(self) -> Any:
        """Compiled ahead of time, so that no measured step contains compilation."""
        train = jax.jit(
            self.scan_epoch if self.scan else self.train_step,
            donate_argnums=0,
            in_shardings=self.replicated,
            out_shardings=self.replicated,
        )
        index = () if self.scan else (np.int32(0),)
        plan = jax.eval_shape(partial(self.draw_plan, 0, 0))
        return train.lower(self.get_shapes(), *self.train, plan, *index).compile()

    def init(self, seed: int, hyperparams: Hyperparams | None = None) -> State:
        """The state before the first step, with the same parameters for every method.

        `hyperparams` replaces the hyper-parameters in the optimizer's state.
        """
        variables = init_variables(self.model, self.source.shape, seed, self.replicated)
        params = variables["params"]
        opt_state = self._init_tx(params)
        if hyperparams is not None:
            opt_state = opt_state._replace(
                hyperparams=self._place_hyperparams(hyperparams, opt_state)
            )
        return State(params, variables["batch_stats"], opt_state)

    def _place_hyperparams(self, hyperparams: Hyperparams, opt_state: Any) -> dict[str, jax.Array]:
        if hyperparams.keys() != opt_state.hyperparams.keys():
            names = " and ".join(opt_state.hyperparams)
            raise ValueError(f"compiled for any {names}, not for any {' and '.join(hyperparams)}")
        return {
            name: _place(np.asarray(hyperparams[name], like.dtype), self.replicated)
            for name, like in opt_state.hyperparams.items()
        }

    def get_shapes(self) -> State:
        """Shapes, dtypes and shardings of a state."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.init(0)
        )

    def run(
        self,
        seed: int,
        epochs: int,
        on_epoch: Callable[[Run, State], None] = lambda run, state: None,
        resume: tuple[Run, State] | None = None,
        test: Literal["best", "every", "never"] = "best",
        hyperparams: Hyperparams | None = None,
    ) -> Run:
        """Trains up to `epochs` epochs.

        Args:
          on_epoch: called after every epoch with the run so far and its state.
          resume: arguments of an earlier call of `on_epoch`. The run goes on from there and gives the
            same as without an interruption.
          test: when to measure the test accuracy: after epochs with the best validation accuracy so far,
            after every epoch, or never.
          hyperparams: hyper-parameters of this run, if the optimizer has them in its state.
        """
        run, state = resume or (Run(seed), self.init(seed, hyperparams))
        for epoch in range(len(run.train_loss), epochs):
            state, losses, step_time = self.train_epoch(state, seed, epoch)
            run.train_loss.append(float(losses.mean()))
            run.step_time.append(step_time)
            if not math.isfinite(run.train_loss[-1]):
                run.diverged = True
                return run
            run.validation_accuracy.append(self._measure_accuracy(state, self.validation))
            look = test == "every" or (test == "best" and run.best_epoch == epoch)
            run.test_accuracy.append(self._measure_accuracy(state, self.test) if look else None)
            on_epoch(run, state)
        return run

    def compile(self) -> None:
        """Compiles the training program, unless it has been compiled. No other program takes as long."""
        _ = self._train

    def time_epochs(self, epochs: int) -> list[tuple[float, float]]:
        """Returns when each epoch began and ended, in seconds of `time.time`.

        Compiles all programs of a run first, and trains one more epoch, which is not counted because it
        touches memory for the first time.
        """
        self.compile()
        state, times = self.init(0), []
        self.draw_plan(0, 0)  # compiles
        self._measure_accuracy(state, self.validation[:1])
        for epoch in range(1 + epochs if epochs else 0):
            start = time.time()
            state, *_ = self.train_epoch(state, 0, epoch)
            times.append((start, time.time()))
        return times[1:]

    def draw_plan(self, seed: int, epoch: int) -> Plan:
        n = len(self.train.labels)
        return make_plan(seed, epoch, self.steps, self.batch_size, n, self.replicated)

    def train_step(
        self, state: State, images: jax.Array, labels: jax.Array, plan: Plan, step: jax.Array
    ) -> tuple[State, jax.Array]:
        batch = plan.indices[step]
        x, y = jax.lax.with_sharding_constraint((images[batch], labels[batch]), self.sharded)
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

    def scan_epoch(
        self, state: State, images: jax.Array, labels: jax.Array, plan: Plan
    ) -> tuple[State, jax.Array]:
        def body(state, step):
            return self.train_step(state, images, labels, plan, step)

        return jax.lax.scan(body, state, jnp.arange(self.steps, dtype=jnp.int32))

    def train_epoch(self, state: State, seed: int, epoch: int) -> tuple[State, np.ndarray, float]:
        """Returns the new state, the losses of all steps, and the median time of a step."""
        plan, train = jax.block_until_ready(self.draw_plan(seed, epoch)), self._train
        if self.scan:
            start = time.perf_counter()
            state, losses = jax.block_until_ready(train(state, *self.train, plan))
            return state, np.asarray(losses), (time.perf_counter() - start) / self.steps
        losses, times = [], []
        for step in range(self.steps):
            start = time.perf_counter()
            state, loss = train(state, *self.train, plan, np.int32(step))
            losses.append(np.asarray(loss))  # waits for the step
            times.append(time.perf_counter() - start)
        return state, np.asarray(losses, np.float32), float(np.median(times))

    def _measure_accuracy(self, state: State, batches: list[tuple[Split, int]]) -> float:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        correct, of = 0, 0
        for batch, n in batches:
            correct += count_correct(self.model, self.source, variables, *batch)
            of += n
        return 100 * int(correct) / of


def count_steps(data: Dataset, batch_size: int) -> int:
    n = len(data.train.labels)
    if n < batch_size:
        raise DataError(
            f"{data.source.name}: {n} training images are too few for one batch of {batch_size}"
        )
    return n // batch_size


def _make_batches(split: Split, sharding: NamedSharding) -> list[tuple[Split, int]]:
    """Batches for evaluation, each with its number of images.

    All have the same size, so that evaluation compiles once. The images that fill up the last batch have
    the label -1, which no prediction equals.
    """
    batches = []
    size = -(-EVALUATION_BATCH // sharding.mesh.size) * sharding.mesh.size
    for start in range(0, len(split.labels), size):
        images, labels = (array[start : start + size] for array in split)
        missing = size - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        padded = Split(images, np.pad(labels, (0, missing), constant_values=-1))
        batches.append((Split(*(_place(array, sharding) for array in padded)), len(labels)))
    return batches


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array, which every process has as a whole, on the devices of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _count_elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _count_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

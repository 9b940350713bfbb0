"""Compiled steps of Optax optimizers, which `benchmarks.speed` times."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.measuring.contenders import EVERY
from benchmarks.measuring.parameters import IMAGE
from benchmarks.training.models import MODELS


class Step:
    """One Optax optimizer, compiled, with parameters and state of its own.

    A CPU gets one call per step. An accelerator (`scan`) gets one call per ten steps, because a call
    from the host can take longer than a step there. `grads` holds gradients along a leading axis, which
    take turns. Every step of a scan has a gradient of its own: from a single gradient XLA would compute
    once, for all steps, whatever depends on it alone. `gradient` computes the gradients from the
    parameters in place of `grads`, and its time counts.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        grads: Any,
        gradient: Callable[[Any], Any] | None = None,
        scan: bool = False,
    ):
        def step(params, state, grads):
            grads = grads if gradient is None else gradient(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def steps(params, state, grads):
            (params, state), _ = jax.lax.scan(
                lambda carry, grads: (step(*carry, grads), None), (params, state), grads
            )
            return params, state

        self.scan = scan
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.state_bytes = count_bytes(self.state)
        self.seconds: list[float] = []
        count = len(jax.tree.leaves(grads)[0])
        self._grads = [grads] if scan else [_select_step(grads, i) for i in range(count)]
        self._lowered = jax.jit(steps if scan else step, donate_argnums=(0, 1)).lower(
            self.params, self.state, self._grads[0]
        )

    def compile(self) -> None:
        """Is a method of its own because several steps may compile in threads."""
        start = time.perf_counter()
        self._compiled = self._lowered.compile()
        # With a compilation cache, the time would be that of loading the program.
        cached = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        self.compile_seconds = None if cached else time.perf_counter() - start
        memory: Any = self._compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def read_program(self) -> str:
        """The text of the compiled program."""
        return self._compiled.as_text() or ""

    def run(self) -> None:
        start = time.perf_counter()
        for grads in itertools.islice(itertools.cycle(self._grads), 1 if self.scan else EVERY):
            self.params, self.state = self._compiled(self.params, self.state, grads)
            jax.block_until_ready((self.params, self.state))
        self.seconds.append((time.perf_counter() - start) / EVERY)


def compile_all(steps: Sequence[Step]) -> None:
    """In threads where an accelerator is waiting; in turn on a CPU, where the time is reported."""
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:
        list(pool.map(Step.compile, steps))


def make_gradient(model: str, batch: int) -> Callable[[Any], Any]:
    """The gradient of the loss on random images, with the model in training mode."""
    net = MODELS[model](10)
    images = jax.random.normal(jax.random.key(1), (batch, *IMAGE))
    labels = jnp.arange(batch) % 10
    stats = net.init(jax.random.key(0), images[:1], train=False)["batch_stats"]

    def loss(params: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        logits: Any = net.apply(variables, images, train=True, mutable=["batch_stats"])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.grad(loss)


def count_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _select_step(grads: Any, step: int) -> Any:
    return jax.tree.map(lambda g: g[step], grads)

"""The updates once more, from what the new state holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from spherical_optax.analysis._tracking.updates_from_state import get_replay

from ..compiling import usual_jit

pytestmark = pytest.mark.usefixtures("standard_promotion")

LABELS = {"w": "a", "b": "b"}
FROM_THE_STATE = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.3),
    "amsgrad": optax.amsgrad(0.1),
    "sgd with momentum": optax.sgd(0.1, 0.9),
    "schedule": optax.adam(optax.linear_schedule(0.0, 0.1, 5)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "clip before": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "clip behind": optax.chain(optax.adam(0.1), optax.clip(0.05)),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, LABELS),
    "ours": so.adam(0.1, weight_decay=0.1),
}
NOT_FROM_IT = {
    "the gradient": optax.sgd(0.1),
    "the gradient beside the momentum": optax.nadam(0.1),
    "the old momentum": optax.lion(0.1),
    "more digits than are stored": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "a condition": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "matrix products": optax.contrib.muon(0.1),
}


def _after_two_steps(tx):
    rng = np.random.default_rng(0)
    params, *grads = (
        {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.ones(3) * (k + 1)}
        for k in range(3)
    )
    tx = optax.with_extra_args_support(tx)
    _, state = tx.update(grads[0], tx.init(params), params)
    return tx, grads[1], state, params


@pytest.mark.parametrize("name", FROM_THE_STATE)
def test_the_updates_again(name):
    tx, grads, state, params = _after_two_steps(FROM_THE_STATE[name])
    updates, new = tx.update(grads, state, params)
    again = get_replay(tx, grads, state, params)
    assert again is not None
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-6), again(new), updates)
    # It is the given state that is read.
    assert not np.allclose(again(jax.tree.map(lambda x: 2 * x, new))["w"], updates["w"])


@pytest.mark.parametrize("name", NOT_FROM_IT)
def test_not_from_the_state(name):
    assert get_replay(*_after_two_steps(NOT_FROM_IT[name])) is None


def test_effects_happen_once(capfd):
    def update(grads, state, params):
        jax.debug.print("updated")
        return jax.tree.map(lambda m: -m, state), jax.tree.map(jnp.add, state, grads)

    talkative = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    tx = so.track(optax.chain(optax.adam(0.1), talkative), {"w": so.Sphere(), "b": None}, every=2)
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    jax.block_until_ready(usual_jit(tx.update)(params, tx.init(params), params))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("updated") == 1


@pytest.mark.parametrize("name", ["adam", "adamw", "ours"])
def test_memory(name):
    """Outside of the condition there is no array of updates, and no copy of an old one."""
    tx = so.track(FROM_THE_STATE[name], so.Sphere(), every=10)
    params = {f"w{i}": jnp.zeros((512, 512)) for i in range(10)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    arguments = jax.eval_shape(lambda: (params, tx.init(params), params))
    compiled = usual_jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    program = compiled.as_text()
    made = re.findall(
        r"= f32\[512,512\]\S* (?!parameter|get-tuple-element)", program.split("ENTRY")[1]
    )
    assert len(made) == 3 * len(params)  # new parameters and moments

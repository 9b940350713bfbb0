"""Optimizer chains of other people's training code, with an optimizer of this package in Adam's place.

Each is re-enacted from public code, with its own order of parts: what is clipped, scheduled, masked,
accumulated, averaged and restored.
"""

import functools

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import dynamic_scale, train_state

import spherical_optax as so

from ..optimizers import track_adam

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jax.random.normal(jax.random.key(0), (32, 6))
Y = jnp.sin(X[:, :1] * 3)


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, use_bias=False, dtype=self.dtype, name="dense")(x)
        x = nn.relu(nn.LayerNorm(dtype=self.dtype, name="norm")(x))
        return nn.Dense(1, dtype=jnp.float32, name="head")(x)


PARAMS = Net().init(jax.random.key(1), X)["params"]
SPHERES = {"dense": {"kernel": so.Sphere(())}, "norm": None, "head": None}
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.02, 3, 20)


def _loss(params, net=Net()):  # noqa: B008
    return jnp.mean((net.apply({"params": params}, X) - Y) ** 2)


def _is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _by_label(params):
    return {"dense": "body", "norm": "body", "head": "head"} if "dense" in params else {}


def _big_vision(make):
    """Clip, a schedule per group of parameters, and weight decay by mask, all in one chain."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        make(1.0, SPHERES),
        optax.add_decayed_weights(-1e-4, mask=_is_matrix),
        optax.scale_by_schedule(SCHEDULE),
    )


def _ppo(make):
    """PPO in JAX: clip by norm, then Adam with a learning rate that is injected and annealed."""
    injected = optax.inject_hyperparams(make, static_args="spheres")
    anneal = optax.linear_schedule(0.02, 0.0, 20)
    return optax.chain(optax.clip_by_global_norm(0.5), injected(anneal, SPHERES))


def _accumulating(make):
    """Fine-tuning: gradients of two batches are accumulated, and steps that are not finite skipped."""
    return optax.MultiSteps(
        optax.apply_if_finite(make(0.02, SPHERES), 3), every_k_schedule=2
    ).gradient_transformation()


def _two_groups(make):
    """Another rate for the head than for the body, and the norms frozen."""
    groups = {"body": make(0.02, SPHERES), "head": optax.adamw(0.01)}
    return optax.chain(
        optax.clip(1.0),
        optax.partition(groups, lambda params: {"dense": "body", "norm": "body", "head": "head"}),
    )


def _averaging(make):
    """No NaN goes in, and what comes out is averaged over steps."""
    return optax.chain(optax.zero_nans(), make(0.02, SPHERES), optax.ema(0.5, debias=False))


def _freezing(make):
    """Transfer learning: only the head and the norm are trained."""
    return optax.chain(
        optax.masked(make(0.02, SPHERES), {"dense": False, "norm": True, "head": True}),
        optax.masked(optax.set_to_zero(), {"dense": True, "norm": False, "head": False}),
    )


CHAINS = [_big_vision, _ppo, _accumulating, _two_groups, _averaging, _freezing]
OPTIMIZERS = {
    "adamsrt": so.adamsrt,
    "adamst": so.adamst,
    "adamh": so.adamh,
    "sgd_mrt": so.sgd_mrt,
    "adamp": so.adamp,
    "track": track_adam,
}


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.__name__.strip("_"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_train_state(name, chain):
    """Flax's `TrainState` in a `lax.scan`, saved as bytes in the middle and restored."""
    if (name, chain) == ("track", _ppo):
        make = lambda lr, spheres: optax.adam(lr)  # noqa: E731
        tx = so.track(chain(make), SPHERES)
    else:
        tx = chain(OPTIMIZERS[name])

    def create():
        return train_state.TrainState.create(apply_fn=Net().apply, params=PARAMS, tx=tx)

    @jax.jit
    def train(state):
        def step(state, _):
            return state.apply_gradients(grads=jax.grad(_loss)(state.params)), None

        return jax.lax.scan(step, state, length=8)[0]

    half = train(create())
    restored = flax.serialization.from_bytes(create(), flax.serialization.to_bytes(half))
    whole, again = train(half), train(restored)
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    assert _loss(whole.params) < _loss(PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dynamic_loss_scaling(name):
    """Flax's ImageNet example in float16: a step that overflows leaves parameters and state alone."""
    tx, net = OPTIMIZERS[name](0.02, SPHERES), Net(dtype=jnp.float16)
    state, params, scale = tx.init(PARAMS), PARAMS, dynamic_scale.DynamicScale(scale=2.0**20)

    @jax.jit
    def step(scale, state, params):
        scale, finite, _, grads = scale.value_and_grad(functools.partial(_loss, net=net))(params)
        updates, new_state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        keep = functools.partial(jnp.where, finite)
        params, state = jax.tree.map(keep, new, (params, state))
        return scale, state, params, finite

    steps = []
    for _ in range(12):
        scale, state, params, finite = step(scale, state, params)
        steps.append(bool(finite))
    assert not steps[0]
    assert steps[-1]
    assert _loss(params) < _loss(PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equinox_with_an_average_of_the_parameters(name):
    """`eqx.filter_jit`, `eqx.apply_updates`, and a running average of the whole model."""

    class Model(eqx.Module):
        dense: eqx.nn.Linear
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.dense = eqx.nn.Linear(6, 16, use_bias=False, key=keys[0])
            self.norm = eqx.nn.LayerNorm(16)
            self.head = eqx.nn.Linear(16, 1, key=keys[1])

        def __call__(self, x):
            return self.head(jax.nn.relu(self.norm(self.dense(x))))

    model = Model(jax.random.key(0))
    spheres = so.spheres_where(eqx.filter(model, eqx.is_inexact_array), "dense", so.Sphere(()))
    tx = OPTIMIZERS[name](0.02, spheres)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

    @eqx.filter_jit
    def step(model, average, state):
        value, grads = loss(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        average = optax.incremental_update(
            eqx.filter(model, eqx.is_inexact_array), average, step_size=0.1
        )
        return model, average, state, value

    average, values = eqx.filter(model, eqx.is_inexact_array), []
    for _ in range(8):
        model, average, state, value = step(model, average, state)
        values.append(value)
    assert values[-1] < values[0]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(average))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_critics_in_parallel(name):
    """Reinforcement learning: two critics of `nnx.vmap`, one optimizer, targets by Polyak averaging."""

    class Critic(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 16, use_bias=False, rngs=rngs)
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.head = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.dense(x))))

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return Critic(rngs)

    critics = create(nnx.Rngs(0))
    spheres = {"dense": {"kernel": so.Sphere((0,))}, "norm": None, "head": None}
    optimizer = nnx.Optimizer(critics, OPTIMIZERS[name](0.02, spheres), wrt=nnx.Param)
    target = nnx.clone(critics)

    @nnx.jit
    def step(critics, target, optimizer):
        def loss(critics):
            return jnp.mean((nnx.vmap(lambda c: c(X))(critics) - Y[None]) ** 2)

        value, grads = nnx.value_and_grad(loss)(critics)
        optimizer.update(critics, grads)
        polyak = optax.incremental_update(nnx.state(critics), nnx.state(target), 0.05)
        nnx.update(target, polyak)
        return value

    first, *_, last = [step(critics, target, optimizer) for _ in range(8)]
    assert last < first
    if name == "adamh":
        (kept,) = (
            x for x in jax.tree.leaves(nnx.state(optimizer)) if getattr(x, "shape", ()) == (2, 1, 1)
        )
        assert kept.shape == (2, 1, 1)

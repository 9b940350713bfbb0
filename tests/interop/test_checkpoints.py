"""State that lasts: saved by Orbax in the middle of a run, which then goes on bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import spherical_optax as so

from ..optimizers import SPHERES, TABLE, random_tree

P = jax.sharding.PartitionSpec
pytestmark = pytest.mark.usefixtures("standard_promotion")


def _tracked(learning_rate, spheres, **kwargs):
    return so.track(so.adamsrt(learning_rate, spheres, **kwargs), spheres)


OPTIMIZERS = TABLE | {"track": _tracked}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def _parts(name):
    """The optimizer and its compiled step."""
    tx = OPTIMIZERS[name](optax.cosine_decay_schedule(0.01, 20), SPHERES, weight_decay=0.1)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def _run(step, params, state, seeds):
    for seed in seeds:
        params, state = step(params, state, random_tree(seed))
    return params, state


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@every_optimizer
def test_orbax(name, tmp_path):
    tx, step = _parts(name)
    half = _run(step, random_tree(0), tx.init(random_tree(0)), range(1, 4))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda x: (x, tx.init(x)), random_tree(0))
        restored = checkpointer.restore(tmp_path / "half", like)
    _assert_same(restored, half)
    _assert_same(_run(step, *restored, range(4, 7)), _run(step, *half, range(4, 7)))


@every_optimizer
def test_flax_serialization(name):
    """`TrainState` by Flax's bytes, as in its examples."""
    tx, _ = _parts(name)
    make = functools.partial(TrainState.create, apply_fn=None, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = make(params=random_tree(0))
    for seed in (1, 2):
        state = step(state, random_tree(seed))
    restored = serialization.from_bytes(make(params=random_tree(9)), serialization.to_bytes(state))
    ends = [step(s, random_tree(3)) for s in (state, restored)]
    _assert_same(*[(s.step, s.params, s.opt_state) for s in ends])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(6, 5, rngs=rngs)
        self.two = nnx.Linear(5, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


@every_optimizer
def test_nnx(name, tmp_path):
    """Model and `nnx.Optimizer` together, into new ones."""

    # The same object for both, because nnx compiles a step again for every other one.
    spheres = so.spheres_where(nnx.state(Net(nnx.Rngs(0)), nnx.Param), "kernel")
    tx = OPTIMIZERS[name](0.05, spheres, weight_decay=0.1)

    def make(seed):
        model = Net(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    batches = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"), ocp.StandardCheckpointer() as checkpointer:
        pair = make(0)
        for x in batches[:2]:
            step(*pair, x)
        checkpointer.save(tmp_path / "half", nnx.state(pair))
        checkpointer.wait_until_finished()
        other = make(1)
        nnx.update(other, checkpointer.restore(tmp_path / "half", nnx.state(other)))
        for x in batches[2:]:
            step(*pair, x)
            step(*other, x)
    _assert_same(nnx.state(other), nnx.state(pair))


SHAPES = {"conv": (3, 3, 8, 16), "dense": (16, 24), "free": (8,)}
ON = {"conv": so.Sphere(), "dense": so.Sphere(()), "free": None}


@every_optimizer
def test_another_sharding(name, tmp_path):
    """Saved with one axis over eight devices, restored with another, or on one: the run goes on."""
    auto = (jax.sharding.AxisType.Auto,)
    meshes = {n: jax.make_mesh((n,), ("x",), auto, devices=jax.devices()[:n]) for n in (8, 1)}
    tx = OPTIMIZERS[name](0.01, ON, weight_decay=0.1)
    step = jax.jit(lambda g, s, x: tx.update(g, s, x))

    def placed(tree, mesh, axis):
        def place(x):
            there = [axis < x.ndim and k == axis and x.shape[k] % 8 == 0 for k in range(x.ndim)]
            spec = P(*("x" if on else None for on in there)) if x.size > 64 else P()
            return jax.NamedSharding(mesh, spec)

        return jax.tree.map(place, tree)

    def put(tree, mesh, axis):
        return jax.device_put(tree, placed(tree, mesh, axis))

    x = random_tree(0, SHAPES)
    state = tx.init(x)
    for seed in (1, 2):
        updates, state = step(random_tree(seed, SHAPES), state, x)
        x = optax.apply_updates(x, updates)
    expected, _ = step(random_tree(3, SHAPES), state, x)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", put((x, state), meshes[8], 0))
        checkpointer.wait_until_finished()
        for devices, axis in ((8, 1), (1, 0)):
            like = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                (x, state),
                placed((x, state), meshes[devices], axis),
            )
            y, restored = checkpointer.restore(tmp_path / "half", like)
            _assert_same((y, restored), (x, state))
            grads = put(random_tree(3, SHAPES), meshes[devices], axis)
            updates, _ = step(grads, restored, y)
            jax.tree.map(
                lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
                updates,
                expected,
            )

"""The README's recipes: one line for each library, on a small network with BatchNorm and dropout."""

import equinox as eqx
import jax
import optax
import pytest
from flax import linen as nn
from flax import nnx

import spherical_optax as so

IMAGES = jax.random.normal(jax.random.key(1), (16, 6, 6, 3))
KEY = jax.random.key(2)
FILTER = so.Sphere()

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x))
            x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
            return nn.Dense(5)(x.mean((1, 2)))

    model = Net()
    variables = model.init(KEY, IMAGES, train=False)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def fn(params):
        rngs, mutable = {"dropout": KEY}, ["batch_stats"]
        return model.apply({"params": params, **rest}, IMAGES, True, rngs=rngs, mutable=mutable)[0]

    spheres = so.find_spheres(fn, params, key=KEY)
    assert spheres == {
        "Conv_0": {"kernel": FILTER, "bias": None},
        "BatchNorm_0": {"scale": None, "bias": None},
        "Dense_0": {"kernel": None, "bias": None},
    }
    so.check_spheres(fn, params, spheres, key=KEY).assert_ok()


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


def test_nnx():
    model = NNXNet(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params):
        return nnx.merge(graphdef, params, rest, copy=True)(IMAGES)

    spheres = so.find_spheres(fn, params, key=KEY)
    found = {p: s for p, s in nnx.to_flat_state(spheres) if s.get_value() is not None}
    assert {path: s.get_value() for path, s in found.items()} == {("conv", "kernel"): FILTER}
    so.check_spheres(fn, params, spheres, key=KEY).assert_ok()

    # Neither statistics nor random state of the model have moved: copy=True keeps them.
    assert model.norm.mean.get_value().tolist() == [0.0] * 8
    assert model.dropout.rngs.count.get_value() == 0

    optimizer = nnx.Optimizer(model, so.adamsrt(1e-2, spheres), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(IMAGES).sum())(model))


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        conv_key, head_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=conv_key)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.1)
        self.head = eqx.nn.Linear(8, 5, key=head_key)

    def __call__(self, x, state, key):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.dropout(jax.nn.relu(x), key=key).mean((1, 2))), state


def test_equinox():
    model, state = eqx.nn.make_with_state(EquinoxNet)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    images, keys = IMAGES.transpose(0, 3, 1, 2), jax.random.split(KEY, len(IMAGES))

    def fn(params):
        apply = jax.vmap(eqx.combine(params, static), (0, None, 0), (0, None), axis_name="batch")
        return apply(images, state, keys)[0]

    spheres = so.find_spheres(fn, params, key=KEY)
    assert spheres.conv.weight == so.Sphere((-4,))
    assert [s for s in jax.tree.leaves(spheres) if s is not None] == [so.Sphere((-4,))]
    so.check_spheres(fn, params, spheres, key=KEY).assert_ok()
    tx = so.adamsrt(1e-2, spheres)
    grads = eqx.filter_grad(lambda p: fn(p).sum())(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    eqx.apply_updates(params, updates)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(x), is_training=True)
        return hk.Linear(5)(hk.dropout(hk.next_rng_key(), 0.1, jax.nn.relu(x)).mean((1, 2)))

    net = hk.transform_with_state(forward)
    params, state = net.init(KEY, IMAGES)

    def fn(params):
        return net.apply(params, state, KEY, IMAGES)[0]

    spheres = so.find_spheres(fn, params, key=KEY)
    assert {k: v for k, v in spheres.items() if any(v.values())} == {
        "conv2_d": {"w": FILTER, "b": None}
    }
    so.check_spheres(fn, params, spheres, key=KEY).assert_ok()
    tx = so.adamsrt(1e-2, spheres)
    updates, _ = tx.update(jax.grad(lambda p: fn(p).sum())(params), tx.init(params), params)
    optax.apply_updates(params, updates)

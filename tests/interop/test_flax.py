"""Flax: Linen's dicts and FrozenDicts, and nnx, where state is a tree of variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import freeze

import spherical_optax as so

from ..optimizers import TABLE

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")


@pytest.fixture
def rank_promotion():
    """Flax's layers promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Net(linen.Module):
    """Convolution, BatchNorm, classifier."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(3, (3, 3), use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=False)(x)
        return linen.Dense(2)(x.mean((1, 2)))


@functools.cache
def _linen_params():
    return Net().init(jax.random.key(0), jnp.ones((2, 5, 5, 1)))["params"]


class NnxNet(nnx.Module):
    """The same in nnx, with the normalised layers in a list."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(1, 3, (3, 3), use_bias=False, rngs=rngs),
                nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs),
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def _model():
    return NnxNet(nnx.Rngs(0))


def _batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 5, 5, 1)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 2, 8))


def _loss(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class TestLinen:
    def test_paths(self):
        spheres = so.spheres_where(_linen_params(), r"Conv_\d+/kernel")
        assert spheres == {
            "Conv_0": {"kernel": so.Sphere()},
            "BatchNorm_0": {"scale": None, "bias": None},
            "Dense_0": {"kernel": None, "bias": None},
        }

    @pytest.mark.parametrize("name", TABLE)
    def test_frozen_dicts(self, name):
        """FrozenDicts all the way give what dicts give; the spheres may be either."""
        plain = _linen_params()
        spheres = so.spheres_where(plain, "Conv")
        frozen_spheres = so.spheres_where(freeze(plain), "Conv")
        tx = TABLE[name](0.01, spheres)
        expected, _ = tx.update(plain, tx.init(plain), plain)
        tx = TABLE[name](0.01, frozen_spheres)
        frozen = freeze(plain)
        actual, _ = tx.update(frozen, tx.init(frozen), frozen)
        assert isinstance(actual, type(frozen))
        jax.tree.map(np.testing.assert_array_equal, actual.unfreeze(), expected)


class TestNnx:
    def test_paths_end_at_the_variable(self):
        params = nnx.state(_model(), nnx.Param)
        seen = []
        so.spheres_where(params, lambda path: bool(seen.append(path)) or True, so.Sphere(()))
        assert "convs/0/kernel" in seen
        assert "head/bias" in seen
        assert not any("value" in path for path in seen)

    @pytest.mark.parametrize("name", [*TABLE, "adamsrt with a callable"])
    def test_optimizer(self, name):
        """Trains, and takes the very steps that it takes on a plain dict."""
        name, _, use_callable = name.partition(" with a ")

        def where(params):
            return so.spheres_where(params, r"^convs/\d+/kernel$")

        model, batch = _model(), _batch()
        spheres = where if use_callable else where(nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, TABLE[name](0.02, spheres), wrt=nnx.Param)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        plain = TABLE[name](0.02, where)
        state = plain.init(params)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(_loss)(model, *batch)
            optimizer.update(model, grads)
            return loss, grads

        losses = []
        for _ in range(3):
            loss, grads = step(model, optimizer)
            losses.append(float(loss))
            updates, state = plain.update(nnx.to_pure_dict(grads), state, params)
            params = optax.apply_updates(params, updates)
            actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-5), actual, params)
        assert losses[-1] < losses[0]
        if TABLE[name].unit_radius:
            norms = jnp.linalg.norm(model.convs[1].kernel[...].reshape(-1, 4), axis=0)
            np.testing.assert_allclose(norms, 1.0, rtol=1e-5)

    def test_errors_name_the_path(self):
        model = _model()
        spheres = so.spheres_where(nnx.state(model, nnx.Param), "head/kernel", so.Sphere(blocks=2))
        nnx.Optimizer(model, so.adamsrt(0.01, spheres), wrt=nnx.Param)
        wrong = jax.tree.map(
            lambda s: s and so.Sphere((5,)), spheres, is_leaf=lambda leaf: leaf is None
        )
        with pytest.raises(ValueError, match="head/kernel"):
            nnx.Optimizer(model, so.adamsrt(0.01, wrong), wrt=nnx.Param)

"""What people hand to `find_spheres`, and what the warnings say then."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import spherical_optax as so

KEY = jax.random.key(7)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def batch_norm(y, eps=1e-5):
    axes = tuple(range(y.ndim - 1))
    centred = y - y.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + eps)


def make_depthwise(x):
    """A depthwise convolution and BatchNorm with the eps of Keras."""

    def fn(params):
        y = jax.lax.conv_general_dilated(
            x,
            params["depthwise"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
        return jax.nn.relu(batch_norm(y, eps=1e-3)).mean((1, 2)) @ params["head"]

    return fn


def by_path(fn, params, **kwargs):
    return {f.path: f for f in so.survey_spheres(fn, params, key=KEY, **kwargs).findings}


class TestPenalty:
    def _loss(self, l2):
        x = normal(0, 32, 8)

        def loss(params):
            y = jnp.tanh(batch_norm(x @ params["kernel"])) @ params["head"]
            squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
            return jnp.mean((y - 1) ** 2) + 0.5 * l2 * squares

        return loss, {"kernel": normal(1, 8, 16), "head": normal(2, 16, 10)}

    @pytest.mark.parametrize("l2", [1e-4, 1e-3, 1e-2])
    def test_is_named(self, l2, caplog):
        loss, params = self._loss(l2)
        assert so.find_spheres(loss, params, key=KEY) == {"kernel": None, "head": None}
        assert "L2 penalty" in caplog.text
        assert "Leave weight decay out of fn" in caplog.text
        assert by_path(loss, params)["kernel"].verdict == "L2 penalty"

    def test_without(self, caplog):
        loss, params = self._loss(0.0)
        assert so.find_spheres(loss, params, key=KEY)["kernel"] == so.Sphere()
        assert not caplog.text


@pytest.mark.parametrize("size", [1, 2, 8])
def test_images_smaller_than_the_kernel(size):
    """On 1 x 1 pixels one tap of nine has influence: no evidence for a sphere per tap."""
    x = normal(0, 16, size, size, 4)

    def fn(params):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return batch_norm(y)

    params = {"kernel": normal(1, 3, 3, 4, 8)}
    assert so.find_spheres(fn, params, key=KEY) == {"kernel": so.Sphere()}


class EquinoxNet(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key, mode):
        self.linear = eqx.nn.Linear(5, 4, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode=mode)

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_batch_norm_after_its_first_step(mode, caplog):
    """Mode "ema" divides by running statistics: it is invariant in the very first step only."""
    model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0), mode)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = normal(1, 32, 5)

    def apply(params, state):
        each = jax.vmap(eqx.combine(params, static), (0, None), (0, None), axis_name="batch")
        return each(x, state)

    _, after = apply(params, state)
    found = so.find_spheres(lambda p: apply(p, after)[0], params, key=KEY).linear.weight
    assert found == (so.Sphere((-2,)) if mode == "batch" else None)
    assert ("divides by running averages" in caplog.text) == (mode == "ema")
    checked = so.check_spheres(
        lambda p: apply(p, after)[0],
        params,
        lambda p: so.spheres_where(p, "linear/weight", so.Sphere((0,))),
        key=KEY,
    )
    assert checked.ok == (mode == "batch")


def test_batch_norm_over_devices():
    """BatchNorm with `axis_name` is measured under `jax.vmap` with this name."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(6, use_bias=False)(x)
            y = nn.BatchNorm(use_running_average=False, axis_name="devices")(y)
            return nn.Dense(3)(jnp.tanh(y))

    model, x = Net(), normal(0, 2, 8, 5)

    def apply(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    variables = jax.vmap(
        lambda x: model.init(jax.random.key(1), x), axis_name="devices", out_axes=None
    )(x)
    fn = lambda p: jax.vmap(  # noqa: E731
        lambda x: apply({**variables, "params": p}, x), axis_name="devices"
    )(x)
    spheres = so.find_spheres(fn, variables["params"], key=KEY)
    assert spheres["Dense_0"]["kernel"] == so.Sphere()
    assert spheres["Dense_1"]["kernel"] is None


class TestStacksOfVectors:
    """An axis of layers, or of copies, does not make a vector a matrix."""

    def _fn(self, params):
        y, shared = normal(0, 16, 64), params["layers"]
        for i in range(3):
            y = batch_norm(y @ shared["dense"]["kernel"][i])
            y = jax.nn.relu(y * shared["norm"]["scale"][i][None] + shared["norm"]["bias"][i][None])
        return batch_norm(y @ params["head"]["kernel"])

    def test_off(self):
        params = {
            "layers": {
                "dense": {"kernel": normal(1, 3, 64, 64)},
                "norm": {"scale": 1 + normal(2, 3, 64) ** 2, "bias": normal(3, 3, 64)},
            },
            "head": {"kernel": normal(4, 64, 5)},
        }
        found = by_path(self._fn, params)
        assert found["layers/dense/kernel"].sphere == so.Sphere((-3, -1))
        assert found["layers/norm/scale"].sphere is None
        assert found["layers/norm/bias"].sphere is None
        with_vectors = by_path(self._fn, params, vectors=True)
        assert with_vectors["layers/norm/scale"].sphere is not None

    def test_rows_of_a_matrix_stay(self):
        """An embedding has two axes too, and its rows may be on spheres."""
        tokens = jax.random.randint(jax.random.key(0), (16, 12), 0, 20)

        def fn(params):
            rows = params["embed"]["table"][tokens]
            rows = rows / jnp.sqrt(jnp.mean(rows**2, -1, keepdims=True) + 1e-8)
            return jnp.tanh(rows @ params["head"]["kernel"])

        params = {"embed": {"table": normal(1, 20, 8)}, "head": {"kernel": normal(2, 8, 5)}}
        assert by_path(fn, params)["embed/table"].sphere == so.Sphere((-2,))


class TestStopGradient:
    """Gradients that are tangential although the function is not invariant."""

    def _fn(self, renormalise):
        x = normal(0, 32, 6)

        def fn(params):
            y = x @ params["kernel"]
            mean, std = y.mean(0, keepdims=True), jnp.sqrt(y.var(0, keepdims=True) + 1e-5)
            ratio = jax.lax.stop_gradient(std if renormalise else jnp.ones_like(std))
            return jnp.tanh((y - mean) / std * ratio) @ params["head"]

        return fn, {"kernel": normal(1, 6, 24), "head": normal(2, 24, 5)}

    def test_the_warning(self, caplog):
        so.find_spheres(*self._fn(renormalise=True), key=KEY)
        assert (
            "'kernel' is on a sphere by its gradient, but fn changes with its scale" in caplog.text
        )

    def test_no_warning(self, caplog):
        assert so.find_spheres(*self._fn(renormalise=False), key=KEY)["kernel"] == so.Sphere()
        assert not caplog.text


@pytest.mark.parametrize("quiet", [1, 2, 3])
def test_a_large_eps_is_told_the_same_way(quiet):
    """With the eps of Keras, 1e-3, and some channels of small variance, both say the same."""
    loud = jnp.where(jnp.arange(48) < quiet, 0.1, 1.0)
    x = normal(0, 16, 8, 8, 48) * loud.reshape(1, 1, 1, -1)
    fn = make_depthwise(x)
    params = {"depthwise": 0.15 * normal(1, 3, 3, 1, 48), "head": normal(2, 48, 10)}
    found = by_path(fn, params)["depthwise"]
    (check,) = so.check_spheres(
        fn, params, {"depthwise": so.Sphere(), "head": None}, key=KEY
    ).checks
    assert check.verdict == "invariant but for eps"
    assert found.verdict in ("sphere", "undecided")


@pytest.mark.parametrize("seed", [0, 4])
def test_an_eps_does_not_join_filters(seed):
    """Of two filters in a block the figure of an eps averages out: that makes no block a sphere."""
    x = jax.random.normal(jax.random.key(seed), (8, 8, 8, 8))
    fn = make_depthwise(x)
    params = {"depthwise": 0.1 * normal(1 + seed, 3, 3, 1, 8), "head": normal(2 + seed, 8, 2)}
    found = by_path(fn, params)["depthwise"]
    assert found.sphere in (None, so.Sphere())


def test_a_flat_list():
    """Keras hands out its variables in a flat list: only neighbours are tied."""
    n, x = 12, normal(0, 32, 8)

    def fn(arrays):
        y = x
        for kernel, bias in zip(arrays[0::2], arrays[1::2], strict=True):
            z = y @ kernel + bias[None]
            y = jnp.tanh(z / jnp.sqrt((z**2).mean(1, keepdims=True) + 1e-6) * 3)
        return y

    arrays = [a for i in range(n) for a in (normal(i, 8, 8), 0.3 + normal(n + i, 8) ** 2)]
    found = list(by_path(fn, arrays).values())
    ties = [f.sphere.tie if f.sphere else None for f in found]
    assert all(ties[0::2])
    assert ties[0::2] == ties[1::2]
    assert len(set(ties)) == n


def test_at_most_a_handful_of_programs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(6):
                x = nn.Conv(4 + i, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            return nn.Dense(10)(x.mean((1, 2)))

    model, x = Net(), normal(0, 8, 8, 8, 3)
    variables = model.init(jax.random.key(1), x)
    params = variables["params"]

    def fn(p):
        return model.apply({**variables, "params": p}, x, mutable=["batch_stats"])[0]

    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.block_until_ready(jax.tree.map(jnp.zeros_like, params))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        spheres = so.find_spheres(fn, params, key=KEY)
        first = len(compiled)
        so.find_spheres(fn, params, key=KEY)
        second = len(compiled) - first
        so.check_spheres(fn, params, spheres, key=KEY)
        checking = len(compiled) - first - second
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first <= 5  # bits, points, gradients, sums
    assert second == 1  # the gradients of a new function
    assert checking <= 3  # gradients, outputs and the bits of another number of probes


class TestMeasureSmallTrainLarge:
    """The tree that a narrow copy gives is the declaration for the wide network."""

    def _linen(self, width):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Conv(width, (3, 3), name="conv")(x)
                x = nn.relu(nn.GroupNorm(4, name="group")(x))
                x = nn.Dense(width, name="dense")(x.mean((1, 2)))
                x = nn.relu(nn.LayerNorm(name="layer")(x))
                return nn.Dense(3, name="head")(x)

        model, x = Net(), normal(0, 8, 8, 8, 3)
        params = model.init(jax.random.key(1), x)["params"]
        return lambda p: model.apply({"params": p}, x), params

    def test_linen(self):
        (small, narrow), (large, wide) = self._linen(8), self._linen(64)
        spheres = so.find_spheres(small, narrow, key=KEY)
        assert spheres["conv"]["kernel"] == so.Sphere(blocks=4, tie="conv")
        assert spheres["dense"]["kernel"] == so.Sphere((), tie="dense")
        assert spheres == so.find_spheres(large, wide, key=KEY)
        so.check_spheres(large, wide, spheres, key=KEY).assert_ok()
        state = so.adamsrt(0.01, spheres).init(wide)
        so.adamsrt(0.01, spheres).update(wide, state, wide)

    def test_nnx(self):
        class Net(nnx.Module):
            def __init__(self, width, rngs):
                self.first = nnx.Linear(6, width, use_bias=False, rngs=rngs)
                self.norm = nnx.BatchNorm(width, rngs=rngs)
                self.head = nnx.Linear(width, 3, rngs=rngs)

            def __call__(self, x):
                return self.head(nnx.relu(self.norm(self.first(x))))

        def split(width):
            graphdef, params, rest = nnx.split(Net(width, nnx.Rngs(0)), nnx.Param, ...)
            return lambda p: nnx.merge(graphdef, p, rest, copy=True)(normal(0, 16, 6)), params

        (small, narrow), (large, wide) = split(8), split(64)
        spheres = so.find_spheres(small, narrow, key=KEY)
        so.check_spheres(large, wide, spheres, key=KEY).assert_ok()
        optimizer = nnx.Optimizer(
            Net(64, nnx.Rngs(0)), so.track(so.adamsrt(0.01, spheres), spheres), wrt=nnx.Param
        )
        assert "radius/first/kernel" in so.analysis.summary(optimizer.opt_state)

    def test_blocks_that_do_not_fit_are_refused(self):
        """GroupNorm with other groups in the narrow copy."""
        spheres = so.find_spheres(*self._linen(8), key=KEY)
        other = {
            **self._linen(8)[1],
            "conv": {"kernel": jnp.ones((3, 3, 3, 30)), "bias": jnp.ones(30)},
        }
        with pytest.raises(
            ValueError, match=r"'conv/.*4 blocks do not divide axis -1 of length 30"
        ):
            so.adamsrt(0.01, spheres).init(other)

"""Trees, leaves and callables as other programs have them."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..optimizers import TABLE, track_adam

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONV = {"conv": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}


def _kernels(params):
    return so.spheres_where(params, "kernel$")


def _step(tx, params=CONV):
    return tx.update(params, tx.init(params), params)


ALL = TABLE | {"track": track_adam}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
class TestCallables:
    def test_map_params(self, make):
        tx = make(0.01, _kernels)
        mapped = optax.tree.map_params(tx, lambda x: x + 1, tx.init(CONV))
        assert jax.tree.structure(mapped) == jax.tree.structure(tx.init(CONV))

    def test_an_empty_group(self, make):
        tx = optax.partition(
            {"all": make(0.01, _kernels), "none": make(0.1, _kernels)},
            lambda tree: jax.tree.map(lambda _: "all", tree),
        )
        assert _step(tx)[0].keys() == CONV.keys()

    @pytest.mark.parametrize("empty", [{}, (), {"a": {}, "b": None}])
    def test_nothing_to_optimise(self, make, empty):
        tx = make(0.01, _kernels)
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert updates == empty
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(empty))


def test_muonh_without_matrices():
    _step(so.muonh(0.01, lambda params: so.spheres_where(params, "bias$", so.Sphere(()))))


def test_groups_of_more_coordinates_than_int32_counts():
    params = {"embedding": jax.ShapeDtypeStruct((65536, 65536), jnp.bfloat16)}
    for make in [*ALL.values(), lambda lr, s: so.stacked(lambda t: so.adamsrt(lr, t), s)]:
        tx = make(0.01, so.Sphere(()))
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, params, state, params)
        assert updates["embedding"].shape == (65536, 65536)
    jax.eval_shape(lambda x: so.analysis.image_step(x, x, 1.0, 0.1, so.Sphere(())), params)


class TestFlatMap:
    """Haiku's immutable parameters, as old checkpoints hold them: without paths, and without None."""

    def _make(self):
        def forward(x):
            y = hk.Linear(4, with_bias=False, name="first")(x)
            y = y / jnp.sqrt(jnp.mean(y**2, 0, keepdims=True) + 1e-9)
            return hk.Linear(2, with_bias=False, name="second")(jnp.tanh(y))

        x = jax.random.normal(jax.random.key(0), (16, 3))
        net = hk.without_apply_rng(hk.transform(forward))
        params = net.init(jax.random.key(1), x)
        return lambda p: net.apply(p, x), params, hk.data_structures.to_immutable_dict(params)

    def test_found_spheres_serve(self):
        fn, params, immutable = self._make()
        found = so.find_spheres(fn, immutable, key=jax.random.key(2))
        by_name = {"first": so.Sphere(), "second": None}
        for spheres in (found, by_name, so.spheres_where(immutable, "first/w")):
            for row in TABLE.values():
                tx, plain = row(0.01, spheres), row(0.01, by_name)
                updates, state = tx.update(immutable, tx.init(immutable), immutable)
                updates, _ = tx.update(updates, state, immutable)
                expected, state = plain.update(params, plain.init(params), params)
                expected, _ = plain.update(expected, state, params)
                assert type(updates) is type(immutable)
                jax.tree.map(
                    np.testing.assert_array_equal,
                    hk.data_structures.to_mutable_dict(updates),
                    expected,
                )
        tracked = so.track(optax.adam(0.01), found)
        _, state = tracked.update(immutable, tracked.init(immutable), immutable)
        assert "effective_lr/first/w" in so.analysis.summary(state)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_numpy_arrays_of_float64(make):
    """They are float32 for JAX, without a warning at every step."""
    params = {"w": np.linspace(1.0, 2.0, 12).reshape(4, 3), "b": np.ones(3)}
    tx = make(0.01, {"w": so.Sphere(), "b": None})
    updates, _ = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_booleans_among_the_parameters(make):
    params = {"w": jnp.ones((4, 3)), "mask": jnp.array([True, False])}
    grads = {"w": jnp.ones((4, 3)), "mask": jnp.array([False, False])}
    tx = make(0.01, {"w": so.Sphere(), "mask": None})
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["mask"], jnp.zeros(2))


@pytest.mark.parametrize("name", TABLE)
def test_float32_gradients_of_bfloat16_parameters_with_decay(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), CONV)
    tx = TABLE[name](0.01, _kernels, weight_decay=0.1)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(CONV, tx.init(params), params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("make", [so.adamsrt, so.adamh, so.sgd_mrt, so.adamp])
def test_hyperparameters_in_bfloat16(make):
    """Injected, they take the dtype of the parameters, and 0.999 becomes 1."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), CONV)
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(make, static_args="spheres")(0.01, _kernels).init(params)
    tx = optax.inject_hyperparams(make, static_args="spheres", hyperparam_dtype=jnp.float32)(
        0.01, _kernels
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_layers_on_different_devices():
    """Without jit, `track` measures what an optimizer does that works there."""
    devices = jax.devices()
    params = {
        name: jax.device_put(jnp.full((4, 3), 1.0 + i), devices[i]) for i, name in enumerate("abc")
    }
    tx = so.track(optax.sgd(0.1), so.Sphere())
    state = tx.init(params)
    grads = jax.tree.map(lambda x: x.at[0].add(1.0), params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    assert [x.device for x in updates.values()] == devices[:3]
    assert set(so.analysis.summary(state)) >= {f"effective_lr/{name}" for name in "abc"}


class TestStackedSharding:
    """What is stacked keeps its sharding: arrays that are seen to be sharded stay alone."""

    def _params(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = [("x", None), (None, "x"), (None, None), (None, None), ("x", None)]
        return {
            f"layer{i}": jax.device_put(
                jnp.full((4, 6), 1.0 + i), jax.NamedSharding(mesh, jax.P(*spec))
            )
            for i, spec in enumerate(specs)
        }

    def test_alone(self):
        tx, params = so.stacked(lambda s: so.adamsrt(0.01, s), so.Sphere()), self._params()
        state = tx.init(params)
        ema = optax.tree.get(state, "ema")
        assert set(ema.alone) == {"layer0", "layer1", "layer4"}
        assert [x.shape for x in ema.stacks] == [(2, 4, 6)]
        # jit hides what is sharded; the state says it.
        eager, _ = tx.update(params, state, params)
        compiled, _ = jax.jit(tx.update)(params, state, params)
        for name, x in params.items():
            np.testing.assert_allclose(eager[name], compiled[name], rtol=1e-6)
            if name in ema.alone:
                assert eager[name].sharding.is_equivalent_to(x.sharding, 2)

    def test_map_params(self):
        tx = so.stacked(lambda s: so.adamsrt(0.01, s), so.Sphere())
        with pytest.raises(ValueError, match="holds stacks"):
            optax.tree.map_params(tx, lambda x: x, tx.init(self._params()))


def test_thousands_of_frozen_arrays():
    """The number of entries that are looked at grows as the number of arrays, not as its square."""
    params = {f"layer{i:04d}": jnp.ones((2, 3)) for i in range(4000)}
    tx = optax.masked(so.adamsrt(0.01, so.Sphere()), {k: k < "layer0004" for k in params})
    spheres = {k: so.Sphere() for k in params}
    one_by_one = optax.masked(so.adamsrt(0.01, spheres), {k: k < "layer0004" for k in params})
    for each in (tx, one_by_one):
        updates, _ = each.update(params, each.init(params), params)
        assert (updates["layer0003"] != 1).any()
        assert (updates["layer0004"] == 1).all()

"""Flax's recipes for sharded training, in which parameters carry the names of mesh axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import spherical_optax as so

from ..optimizers import TABLE, track_adam

pytestmark = pytest.mark.usefixtures("standard_promotion")
AXES = ("data", "model")
AUTO = (jax.sharding.AxisType.Auto,) * 2
MESHES = {4: (2, 2), 8: (4, 2)}
IMAGES = jax.random.normal(jax.random.key(0), (8, 12))
SPHERES = {"dense": {"kernel": so.Sphere()}, "norm": None, "head": None}

OPTIMIZERS = TABLE | {
    "track": track_adam,
    "track reduced": lambda lr, spheres: so.track(optax.adam(lr), spheres, reduce=jnp.median),
    "stacked": lambda lr, spheres: so.stacked(lambda s: so.adamsrt(lr, s), spheres),
}
# One for each kind of state.
EACH_KIND = ["adamsrt", "adamst", "adamg_star", "adamh", "muonh", "track"]


def _make_mesh(devices):
    return jax.make_mesh(MESHES[devices], AXES, axis_types=AUTO, devices=jax.devices()[:devices])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), AXES)
        x = nn.Dense(16, use_bias=False, kernel_init=init, name="dense")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize(
    ("name", "devices"), [*((name, 4) for name in OPTIMIZERS), *((name, 8) for name in EACH_KIND)]
)
def test_linen(name, devices):
    """The recipe of the guide: specs of an abstract `TrainState`, then `jit` with `out_shardings`."""
    tx, model, mesh = OPTIMIZERS[name](1e-2, SPHERES), Linen(), _make_mesh(devices)

    def create():
        params = model.init(jax.random.key(1), IMAGES)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params):
        return jnp.mean(model.apply({"params": params}, IMAGES, mutable=["batch_stats"])[0] ** 2)

    specs = nn.get_partition_spec(jax.eval_shape(create))
    shardings = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    state = jax.jit(create, out_shardings=shardings)()
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    after = step(step(state))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert loss(after.params) < loss(state.params)


@pytest.mark.parametrize("devices", MESHES)
def test_one_number_per_group_is_sharded_along_the_index_axes(devices):
    params = {"dense": {"kernel": nn.Partitioned(jnp.ones((12, 16)), AXES)}}
    specs = nn.get_partition_spec(so.adamst(1e-2, so.Sphere()).init(params))
    nu, kept = (optax.tree.get(specs, name)["dense"]["kernel"] for name in ("nu", "kept"))
    assert nu == kept == P(None, "model")
    assert optax.tree.get(specs, "ema")["dense"]["kernel"] == P(*AXES)
    with_blocks = so.adams(1e-2, so.Sphere(blocks=4)).init(params)
    assert optax.tree.get(nn.get_partition_spec(with_blocks), "nu")["dense"]["kernel"] == P(
        None, None
    )
    layer = so.adams(1e-2, so.Sphere((0,))).init(params)
    assert optax.tree.get(nn.get_partition_spec(layer), "nu")["dense"]["kernel"] == P("data", None)


class Net(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        by_both, by_model = (nnx.with_partitioning(init, a) for a in (AXES, ("model", None)))
        self.dense = nnx.Linear(12, 16, use_bias=False, kernel_init=by_both, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 4, kernel_init=by_model, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.dense(x)))


def _create_eagerly(tx):
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def _create_compiled(tx):
    @nnx.jit
    def create():
        both = _create_eagerly(tx)
        state = nnx.state(both)
        specs = nnx.get_partition_spec(state)
        nnx.update(both, jax.lax.with_sharding_constraint(state, specs))
        return both

    return create()


def _create_and_put(tx):
    """As libraries for fine-tuning do: every variable of the state goes to its devices."""
    model, optimizer = _create_eagerly(tx)
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    mesh = jax.sharding.get_mesh()
    put = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)),
        state,
        nnx.get_partition_spec(state),
    )
    nnx.update(optimizer, put)
    return model, optimizer


@nnx.jit
def _train(model, optimizer):
    value, grads = nnx.value_and_grad(lambda model: jnp.mean(model(IMAGES) ** 2))(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize(
    ("name", "create"),
    [
        *((name, _create_eagerly) for name in OPTIMIZERS),
        *((name, _create_compiled) for name in EACH_KIND),
        *((name, _create_and_put) for name in EACH_KIND),
    ],
)
def test_nnx(name, create):
    with jax.set_mesh(_make_mesh(4)):
        model, optimizer = create(OPTIMIZERS[name](1e-2, SPHERES))
        first, *_, last = [_train(model, optimizer) for _ in range(3)]
    assert last < first


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_variable_holds_none(name):
    """Training code asks every variable of a state for its dtype."""
    model = nnx.Linear(12, 16, rngs=nnx.Rngs(0))
    spheres = {"kernel": so.Sphere(), "bias": None}
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](1e-2, spheres), wrt=nnx.Param)
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert all(hasattr(x.get_value(), "dtype") or name == "muonh" for x in variables)


def test_the_tie_of_boxed_arrays_is_found():
    x = jax.random.normal(jax.random.key(0), (8, 6))

    def fn(params):
        dense = nn.meta.unbox(params)["dense"]
        y = x @ dense["kernel"] + dense["bias"][None]
        return (y - y.mean(1, keepdims=True)) / jnp.sqrt(y.var(1, keepdims=True) + 1e-6)

    kernel = jax.random.normal(jax.random.key(1), (6, 5))
    bare = {"dense": {"kernel": kernel, "bias": jnp.ones(5)}}
    boxed = {
        "dense": {
            "kernel": nn.Partitioned(kernel, AXES),
            "bias": nn.Partitioned(jnp.ones(5), ("model",)),
        }
    }
    found = [so.survey_spheres(fn, tree, key=jax.random.key(2)).findings for tree in (bare, boxed)]
    assert [f.sphere for f in found[0]] == [f.sphere for f in found[1]]
    assert [f.sphere for f in found[1]] == [so.Sphere((), tie="dense")] * 2

"""`so.track` around every optimizer of Optax that takes plain gradients."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import spherical_optax as so

from ..compiling import usual_jit

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")

SHAPES = {"conv": (3, 3, 2, 8), "dense": (8, 8), "bias": (8,)}
SPHERES = {"conv": so.Sphere(), "dense": so.Sphere((0,)), "bias": None}

# What the optimizers need besides a learning rate.
SPECIAL = {
    "galore": lambda: optax.contrib.galore(0.01, rank=2),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(),
}
# Per-example gradients, functions to evaluate, or no optimizers at all.
OTHERS = {
    "differentially_private_aggregate",
    "dpsgd",
    "hutchinson_estimator_diag_hessian",
    "lbfgs",
    "normalize",
    "optimistic_adam",  # deprecated, for the one below it
    "reduce_on_plateau",
    "schedule_free_eval_params",
    "sophia",
    "split_real_and_imaginary",
}
# Their own state has empty arrays, which Orbax does not save.
UNSAVED = {"galore"}
# The loss beside the gradient.
VALUE = {"momo", "momo_adam", "polyak_sgd"}
# Steps along a / b: Adam's with another v (yogi), and with lengths of their own.
KNOWN = {"adam", "adamw", "sgd", "yogi", "fromage", "lamb"}


def _optimizers():
    modules = {"_src.alias": optax._src.alias, "contrib": optax.contrib}
    found = {}
    for module in modules.values():
        for name, function in vars(module).items():
            alias = not name.startswith(("_", "scale_by")) and inspect.isfunction(function)
            ours = function.__module__.startswith(module.__name__) if alias else False
            if ours and name not in OTHERS:
                found[name] = SPECIAL.get(name) or (lambda f=function: f(learning_rate=0.01))
    return found


OPTIMIZERS = _optimizers()
COMPOSED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01)),
    "masked": lambda: optax.chain(
        optax.adam(0.01),
        optax.masked(optax.add_decayed_weights(0.1), {"conv": True, "dense": False, "bias": False}),
    ),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.01), "b": optax.sgd(0.1)}, {"conv": "a", "dense": "b", "bias": "b"}
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.0, 0.1, 5)
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.01), 3),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "adamsrt": lambda: so.adamsrt(0.01, SPHERES, weight_decay=0.1),
    "adamst": lambda: so.adamst(0.01, SPHERES),
    "adams": lambda: so.adams(0.01, SPHERES),
    "adamg": lambda: so.adamg(0.1, SPHERES, weight_decay=0.1),
    "adamg_star": lambda: so.adamg_star(0.1, SPHERES, weight_decay=0.1),
    "so.adam": lambda: so.adam(0.01, weight_decay=0.1),
    "sgd_mrt": lambda: so.sgd_mrt(0.1, SPHERES, weight_decay=0.1),
    "so.sgd": lambda: so.sgd(0.1, momentum=0.9, weight_decay=0.1),
}
ALL = {**OPTIMIZERS, **COMPOSED}
STEPS = 7


def test_the_table_is_complete():
    assert len(OPTIMIZERS) > 40
    assert KNOWN | VALUE | set(SPECIAL) <= set(OPTIMIZERS)


@pytest.fixture
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def _normal(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def _step(tx, name):
    extra = {"value": jnp.float32(1.0)} if name in VALUE else {}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def _run(step, tx, steps=STEPS):
    params, history = _normal(0), []
    # Some of Optax's states hold the parameters themselves, which could not be donated twice.
    state = jax.tree.map(jnp.copy, tx.init(params))
    for k in range(steps):
        params, state, updates = step(params, state, _normal(k + 1))
        history.append(jax.device_get((updates, params)))
    return params, state, history


# One for each kind of state that `track` treats in its own way. With `track` and without are two
# programs here, with all optimisations. The test below has all optimizers, and both in one program.
KINDS = (
    "adam",
    "noisy_sgd",  # a key
    "lion",  # moments, but not a / b
    "schedule_free",  # the parameters of another step
    "chain",
    "masked",
    "partition",
    "inject",
    "multi_steps",
    "apply_if_finite",
    "adamst",
    "adamg",
)


@pytest.mark.parametrize(
    ("name", "every"), [("adam", 1), ("adamsrt", 1), *((name, 3) for name in KINDS)]
)
def test_changes_nothing(name, every):
    """Updates, parameters and inner state bit for bit, in one compilation, with donated buffers."""
    plain, tracked = ALL[name](), so.track(ALL[name](), SPHERES, every=every)
    _, expected_state, expected = _run(usual_jit(_step(plain, name), donate_argnums=(0, 1)), plain)
    step = usual_jit(_step(tracked, name), donate_argnums=(0, 1))
    _, state, actual = _run(step, tracked)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(_equal, state.inner_state, expected_state)
    assert step._cache_size() == 1


def _equal(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer(name, tmp_path):
    """Updates and state are untouched, the measurements right; a checkpoint and a scan go on."""
    plain, tx = ALL[name](), so.track(ALL[name](), SPHERES)
    step, expect = _step(tx, name), _step(plain, name)
    both = jax.jit(lambda *now: (step(*now), expect(now[0], now[1].inner_state, now[2])))

    params, state = _normal(0), tx.init(_normal(0))
    for k in range(4):
        saved, before = state, params
        (params, state, updates), expected = both(params, state, _normal(k + 1))
        jax.tree.map(_equal, (params, state.inner_state, updates), expected)
    _measured_and_no_rate_invented(name, before, updates, state)
    if name not in UNSAVED:
        restored = _saved_and_restored(saved, tmp_path / "state")
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        now, _ = both(before, restored, _normal(4))
        jax.tree.map(_equal, now, (params, state, updates))
    _the_same_in_a_scan_over_shards(name, tx, state)


def _measured_and_no_rate_invented(name, before, updates, state):
    """Angles and radii of all; the effective learning rate only where a and b are known."""
    measured = so.analysis.measure_step(before, updates, SPHERES)
    for field in ("angle", "radius", "radial_cosine"):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, 1e-3, 2e-6),
            optax.tree.get(state, field),
            getattr(measured, field),
        )
    if name in OPTIMIZERS:
        rates = jax.tree.leaves(optax.tree.get(state, "effective_lr"))
        assert len(rates) == (2 if name in KNOWN else len(rates))
        for rate in rates:
            assert bool(jnp.all(jnp.isnan(rate) != (name in KNOWN)))


def _the_same_in_a_scan_over_shards(name, tx, expected):
    """Four steps in a scan, over eight devices, measure what single steps on one have measured."""

    def body(carry, grads):
        params, state, _ = _step(tx, name)(*carry, grads)
        return (params, state), optax.tree.get(state, "angle")["conv"]

    def scan(params, grads):
        return jax.lax.scan(body, (params, tx.init(params)), grads)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    over = {"conv": spec(None, None, None, "x"), "dense": spec(None, "x"), "bias": spec("x")}
    over = {k: jax.sharding.NamedSharding(mesh, s) for k, s in over.items()}
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *(_normal(k + 1) for k in range(4)))
    (_, scanned), angles = jax.jit(scan)(jax.device_put(_normal(0), over), stacked)
    assert angles.shape == (4, 1, 1, 1, 8)
    for field in ("angle", "radius", "radial_cosine"):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, 2e-2, 1e-5),
            getattr(scanned, field),
            getattr(expected, field),
        )


def _saved_and_restored(state, path):
    keyless = jax.tree.map(_keyless, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, keyless)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, keyless)
        return jax.tree.map(_with_key, checkpointer.restore(path, like), state)


def _keyless(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _with_key(x, like):
    typed = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(x) if typed else x

"""States that are put back: made with other spheres, or as a dict of arrays."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from ..optimizers import SPHERES, TABLE, random_tree, track_adam

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
FILTERS, LAYER, OFF = {"kernel": so.Sphere()}, {"kernel": so.Sphere(())}, {"kernel": None}
OTHERS = {
    "filters, then layer": (FILTERS, LAYER),
    "layer, then filters": (LAYER, FILTERS),
    "off, then filters": (OFF, FILTERS),
    "filters, then off": (FILTERS, OFF),
}
PER_GROUP = {
    "adams": so.adams,
    "adamst": so.adamst,
    "adamsrt": so.adamsrt,
    "adamg": so.adamg,
    "adamg_star": so.adamg_star,
    "adamh": so.adamh,
    "hyperball": TABLE["hyperball"],
    "track": track_adam,
    "track inside": lambda lr, spheres: optax.chain(so.track(so.adamsrt(lr, spheres), spheres)),
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("make", PER_GROUP.values(), ids=PER_GROUP)
def test_a_state_of_other_spheres(make, others):
    """Its arrays would broadcast, and the steps would be wrong without a word."""
    before, now = (make(0.01, spheres) for spheres in others)
    _, state = before.update(PARAMS, before.init(PARAMS), PARAMS)
    state = flax.serialization.from_bytes(now.init(PARAMS), flax.serialization.to_bytes(state))
    with pytest.raises(ValueError, match=r"'kernel'.*init") as error:
        now.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="'kernel'"):
        jax.eval_shape(now.update, PARAMS, state, PARAMS)
    assert "spheres" in str(error.value)


@pytest.mark.parametrize("others", list(OTHERS.values())[:2], ids=list(OTHERS)[:2])
def test_a_state_of_other_spheres_in_stacks(others):
    params = {f"layer{i}": PARAMS["kernel"] + i for i in range(3)}
    before, now = (
        so.stacked(lambda s: so.adamsrt(0.01, s), spheres["kernel"]) for spheres in others
    )
    _, state = before.update(params, before.init(params), params)
    with pytest.raises(ValueError, match="made with other spheres"):
        now.update(params, state, params)


def test_a_state_of_another_number_of_stacked_arrays():
    tx = so.stacked(lambda s: so.adamsrt(0.01, s), so.Sphere())
    few, many = ({f"layer{i}": PARAMS["kernel"] for i in range(n)} for n in (3, 5))
    with pytest.raises(ValueError, match=r"stacks of \[3\] arrays, and the spheres give \[5\]"):
        tx.update(many, tx.init(few), many)


def test_muonh_with_other_matrices():
    params = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((4, 2))}
    on, off = (
        {"a": {"kernel": sphere, "bias": None}, "b": so.Sphere()} for sphere in (so.Sphere(), None)
    )
    for before, now in ((on, off), (off, on)):
        tx = so.muonh(0.01, now)
        with pytest.raises(
            ValueError, match=r"muonh: 'a/kernel' is one of Muon's matrices in the .* only"
        ):
            tx.update(params, so.muonh(0.01, before).init(params), params)


def _list_state_classes(node):
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield type(node)
    for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node):
        if child is not node:
            yield from _list_state_classes(child)


WRAPPED = {
    "track": lambda: so.track(so.adamsrt(0.01, SPHERES), SPHERES),
    "stacked": lambda: so.stacked(lambda s: so.adamsrt(0.01, s), SPHERES),
    "quotient": lambda: so.quotient(so.ema(0.9), so.rms(0.99)),
    "trace": lambda: so.trace(0.9, SPHERES, transport=True),
    "retract": lambda: so.retract(SPHERES, "initial"),
}
STATES = {name: lambda row=row: row(0.01, SPHERES) for name, row in TABLE.items()} | WRAPPED


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_fields_are_in_alphabetical_order(make):
    """Training code keeps states as dicts, which are sorted, and puts the leaves back in order."""
    state = make().init(random_tree(0))
    own = [c for c in _list_state_classes(state) if c.__module__.startswith("spherical_optax")]
    assert all(list(c._fields) == sorted(c._fields) for c in own)


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_leaf_by_leaf_through_a_dict(make):
    tx, params = make(), random_tree(0)
    _, state = tx.update(random_tree(1), tx.init(params), params)
    data = flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state))
    leaves = jax.tree.leaves(flax.serialization.msgpack_restore(data))
    back = jax.tree.unflatten(jax.tree.structure(state), leaves)
    jax.tree.map(np.testing.assert_array_equal, state, back)


SAME = {"kernel": so.Sphere(), "bias": None}
OLD = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"bias": jnp.ones(5)}, r"shape \(4,\) for the parameter 'bias' of shape \(5,\)"),
        (
            {"kernel": jnp.ones((9, 4))},
            r"shape \(8, 4\) for the parameter 'kernel' of shape \(9, 4\)",
        ),
        ({"scale": jnp.ones(4)}, r"no entry for the parameter 'scale' of shape \(4,\)"),
    ],
)
@pytest.mark.parametrize(
    "make", [so.adam, so.adams, so.adamst, so.adamsrt, so.adamp, so.adamg, so.sgd_mrt, so.adamh]
)
def test_a_state_of_other_parameters(make, new, message):
    params, spheres = OLD | new, SAME | dict.fromkeys(new.keys() - SAME.keys())
    state = make(0.1, SAME).init(OLD)
    with pytest.raises(
        ValueError, match=rf"of the state has {message}.*was made with other spheres"
    ):
        make(0.1, spheres).update(params, state, params)


@pytest.mark.parametrize(
    ("make", "other", "message"),
    [
        (so.adamsrt, so.adamst, "made by another optimizer"),
        (so.adamst, so.adamsrt, "kept of the state has no entry for the parameter 'bias'"),
        (
            so.adamsrt,
            lambda lr, _: optax.adam(lr),
            "ScaleByAdamState, not a QuotientState: it was made",
        ),
    ],
)
def test_a_state_of_another_optimizer(make, other, message):
    state = other(0.1, SAME).init(OLD)
    with pytest.raises(ValueError, match=message):
        make(0.1, SAME).update(OLD, state, OLD)


@pytest.mark.parametrize(
    "tx",
    [
        so.ema(0.9, SAME, transport=True),
        so.trace(0.9),
        so.rms(0.9, spheres=SAME),
        so.quotient(so.ema(0.9), so.rms(0.9)),
        so.retract(SAME, "initial"),
        so.normalize(SAME, decay=0.9),
        so.decouple(optax.sgd(0.1), optax.sgd(0.1), (SAME,)),
    ],
    ids=["ema", "trace", "rms", "quotient", "retract", "normalize", "decouple"],
)
def test_a_state_as_a_dictionary(tx):
    """As a file of msgpack gives it back; flax.serialization.from_state_dict makes a state of it."""
    state = tx.init(OLD)
    plain = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    if not isinstance(state, tuple) or hasattr(state, "_fields"):
        with pytest.raises(ValueError, match=r"the state is a dict, not a .*from_state_dict"):
            tx.update(OLD, plain, OLD)
    restored = flax.serialization.from_state_dict(tx.init(OLD), plain)
    expected, found = (tx.update(OLD, s, OLD)[0] for s in (state, restored))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)

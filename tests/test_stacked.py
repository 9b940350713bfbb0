"""Stacks of small arrays: the same steps, fewer operations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

from .compiling import usual_jit
from .optimizers import TABLE, random_tree

SHAPES = {
    **{f"conv{i}": {"kernel": (3, 3, 2, 4), "bias": (4,)} for i in range(3)},
    **{f"layer{i}": (4, 4) for i in range(2)},
    **{f"heads{i}": (6, 2, 3) for i in range(2)},
    **{f"blocks{i}": (3, 6) for i in range(2)},
    "other": (4, 4),  # of another sphere
    "norm": {"kernel": (5, 4), "bias": (4,)},
    "norm1": {"kernel": (5, 4), "bias": (4,)},
    "large": (30, 20),
    "larger": (30, 20),
    "scalars": {"a": (), "b": ()},
}


def _sphere(path):
    if path.startswith("norm"):
        return so.Sphere((), tie=path.split("/")[0])
    kinds = {"kernel": so.Sphere(), "layer": so.Sphere(()), "heads": so.Sphere((1,))}
    kinds |= {"blocks": so.Sphere(blocks=2), "other": so.Sphere(), "large": so.Sphere((0,))}
    return next((sphere for name, sphere in kinds.items() if name in path), None)


def _spheres(params):
    return jax.tree.map_with_path(
        lambda path, _: _sphere(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )


GUESSING = ("adamp_guess", "sgdp_guess")


@pytest.mark.parametrize("name", [name for name in TABLE if name not in GUESSING])
def test_the_same_steps(name):
    params = x = y = random_tree(0, SHAPES)

    def make(spheres):
        rate = optax.join_schedules([lambda _: 0.1, lambda _: 0.05], [2])
        return TABLE[name](rate, spheres, weight_decay=0.1)

    plain = make(_spheres(params))
    tx = so.stacked(make, _spheres, below=200)
    one, other = plain.init(x), tx.init(y)
    shapes = {leaf.shape for leaf in jax.tree.leaves(other)}
    assert (3, 3, 3, 2, 4) in shapes or not TABLE[name].has_mu
    assert (2, 30, 20) not in shapes
    expect, update = jax.jit(plain.update), jax.jit(tx.update)
    for seed in (1, 2, 3):
        p, one = expect(random_tree(seed, SHAPES), one, x)
        q, other = update(random_tree(seed, SHAPES), other, y)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 2e-6), p, q)
        x, y = optax.apply_updates(x, p), optax.apply_updates(y, q)


def test_fewer_operations():
    """A step on 90 arrays makes as many operations per array as it adds updates."""
    params = {f"conv{i}": {"kernel": (3, 3, 4, 4), "bias": (4,)} for i in range(45)}
    params = random_tree(0, params)
    spheres = so.spheres_where(params, "kernel")

    def operations(tx):
        step = usual_jit(lambda g, s, x: optax.apply_updates(x, tx.update(g, s, x)[0]))
        program = step.lower(params, tx.init(params), params).compile().as_text()
        return program[program.index("ENTRY") :].count(" fusion(")

    count = operations(so.stacked(lambda s: so.adamsrt(0.1, s), spheres))
    assert count < 2 * 90
    assert count < 0.5 * operations(so.adamsrt(0.1, spheres))


def test_nothing_to_stack_and_holes():
    """A None among parameters, and trees without two equal shapes."""
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4), "hole": None, "c": jnp.ones((3, 2))}
    tx = so.stacked(lambda s: so.adamsrt(0.1, s), so.Sphere())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["hole"] is None
    np.testing.assert_array_equal(updates["a"], updates["c"])
    alone = {"a": params["a"]}
    expected, _ = so.adamsrt(0.1, so.Sphere()).update(
        alone, so.adamsrt(0.1, so.Sphere()).init(alone), alone
    )
    actual, _ = tx.update(alone, tx.init(alone), alone)
    np.testing.assert_array_equal(actual["a"], expected["a"])


def test_errors_name_the_path():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    for spheres, message in (
        ({"a": None}, "no entry for the parameter 'b'"),
        ({"a": None, "b": so.Sphere((2,))}, "does not fit the parameter 'b' of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            so.stacked(lambda s: so.adamsrt(0.1, s), spheres).init(params)


def test_a_missing_update_in_a_stack():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "c": jnp.ones(4)}
    tx = so.stacked(lambda s: so.adamsrt(0.1, s), {"a": so.Sphere(), "b": so.Sphere(), "c": None})
    state = tx.init(params)
    with pytest.raises(ValueError, match="a has no update, but lies in a stack"):
        tx.update(params | {"a": None}, state, params)
    assert tx.update(params | {"c": None}, state, params)[0]["c"] is None


def test_names_with_slashes():
    params = {"a/b": jnp.ones(3), "a": {"b": 2 * jnp.ones(4)}, "a~1b": jnp.ones(5)}
    tx = so.stacked(lambda s: so.adam(0.1, s), None)
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(
        lambda u, x: np.testing.assert_allclose(u, -0.1 * jnp.ones_like(x), 1e-4), updates, params
    )

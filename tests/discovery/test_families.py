"""Every family of the zoo: found, confirmed, a wrong declaration caught, and trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from spherical_optax._core.paths import leaves_with_paths

from .zoo import FAMILIES

KEY = jax.random.key(0)


@functools.cache
def _made(name):
    return FAMILIES[name]()


@pytest.fixture(params=FAMILIES)
def family(request):
    return _made(request.param)


def by_path(tree):
    return {"/".join(path): x for path, x in leaves_with_paths(tree, lambda x: x is None)[0]}


def like(params, spheres):
    leaves, treedef = leaves_with_paths(params, lambda x: x is None)
    return jax.tree.unflatten(treedef, [spheres.get("/".join(path)) for path, _ in leaves])


def test_found(family):
    survey = so.survey_spheres(family.fn, family.params, key=KEY)
    found = {path: s for path, s in by_path(survey.spheres).items() if s is not None}
    assert found == family.spheres, f"\n{survey}"
    assert {f.path for f in survey.findings if f.sphere is not None} == found.keys()
    assert "undecided" not in {f.verdict for f in survey.findings}, f"\n{survey}"


def test_confirmed(family):
    report = so.check_spheres(
        family.fn, family.params, like(family.params, family.spheres), key=KEY
    )
    assert report.ok, f"\n{report}"
    report.assert_ok()
    assert {check.path: check.sphere for check in report.checks} == family.spheres


def _wrong(family):
    """Finer than what is invariant, a tie cut, or a matrix that is on no sphere."""
    wrong = {}
    for path in by_path(family.params):
        sphere = family.spheres.get(path)
        if not path.endswith(("kernel", "embedding", "position")):
            continue
        if sphere is None:
            wrong[path] = so.Sphere(())
        elif sphere.index_axes == ():
            wrong[path] = so.Sphere((-1,))
        elif sphere.tie is not None:
            wrong[path] = so.Sphere(sphere.index_axes, sphere.blocks)  # without its bias
    return wrong


def test_wrong_declarations_are_caught(family):
    wrong = _wrong(family)
    assert wrong
    report = so.check_spheres(family.fn, family.params, like(family.params, wrong), key=KEY)
    assert {check.path for check in report.checks if not check.ok} == wrong.keys(), f"\n{report}"
    assert not report.ok
    with pytest.raises(AssertionError, match="not invariant under these spheres") as error:
        report.assert_ok()
    assert all(path in str(error.value) for path in wrong)


def test_trained(family):
    tx = so.adamsrt(0.01, like(family.params, family.spheres))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(family.fn(p) - 1)))(
                params
            )
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=20)

    (params, _), losses = train(family.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert losses[-1] < losses[0]

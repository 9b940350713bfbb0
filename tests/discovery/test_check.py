"""check_spheres: verdicts, the report, and what it says about bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

from .test_find import KEY, X, batchnorm, layernorm, normal, two_layers

FILTER = so.Sphere()


def verdicts(report):
    return {check.path: check.verdict for check in report.checks}


def test_the_definition_and_the_cosine():
    fn, params = two_layers()
    spheres = {"first": FILTER, "second": None, "scale": None, "head": FILTER}
    report = so.check_spheres(fn, params, spheres, key=KEY)
    assert verdicts(report) == {"first/kernel": "invariant", "head/kernel": "NOT INVARIANT"}
    right, wrong = report.checks
    assert right.ok
    assert right.change < 1e-2
    assert right.cosine < 1e-3
    assert not wrong.ok
    assert wrong.change > 0.5
    assert wrong.cosine > 0.1
    assert wrong.shape == (8, 3)
    assert wrong.sphere == FILTER


def test_coarser_than_need_be_is_invariant_too():
    fn, params = two_layers()
    for sphere in (so.Sphere(()), so.Sphere(blocks=4), so.Sphere(blocks=1)):
        spheres = {"first": sphere, "second": None, "scale": None, "head": None}
        so.check_spheres(fn, params, spheres, key=KEY).assert_ok()


def test_change_is_the_largest_over_outputs():
    fn, params = two_layers()
    spheres = {"first": FILTER, "second": FILTER, "scale": None, "head": None}

    def leaky(p):
        return 1e3 * fn(p), 1e-3 * p["second"]["kernel"][0]

    report = so.check_spheres(leaky, params, spheres, key=KEY)
    assert verdicts(report) == {"first/kernel": "invariant", "second/kernel": "NOT INVARIANT"}


def test_eps_is_told_apart():
    """At a tenth of the radius the variance is no larger than the eps."""
    params = {"w": normal(2, 12, 64)}

    def fn(params):
        return jax.nn.relu(batchnorm(X @ params["w"], eps=0.03))

    report = so.check_spheres(fn, params, FILTER, key=KEY)
    assert verdicts(report) == {"w": "invariant but for eps"}
    assert report.ok
    assert report.checks[0].change > 0.03


def test_a_drowned_shortcut_is_not_an_eps():
    params = {"a": {"in": normal(2, 12, 16)}, "b": {"branch": 30.0 * normal(3, 16, 16)}}

    def fn(params):
        x = X @ params["a"]["in"]
        return layernorm(x + jax.nn.relu(layernorm(x)) @ params["b"]["branch"])

    report = so.check_spheres(fn, params, so.Sphere(()), key=KEY)
    assert set(verdicts(report).values()) == {"NOT INVARIANT"}


def test_little_influence_is_no_excuse():
    """A branch that changes the outputs by 1e-3 only."""
    fn, params = two_layers()
    params["little"] = {"kernel": normal(5, 12, 3)}

    def both(p):
        return fn(p) + 1e-3 * X @ p["little"]["kernel"]

    spheres = {"first": None, "second": None, "scale": None, "head": None, "little": FILTER}
    report = so.check_spheres(both, params, spheres, key=KEY)
    assert verdicts(report) == {"little/kernel": "NOT INVARIANT"}
    assert report.checks[0].change < 0.03


def test_no_influence():
    fn, params = two_layers()
    params["unused"] = normal(5, 3, 3)
    spheres = {"first": None, "second": None, "scale": None, "head": None, "unused": FILTER}
    report = so.check_spheres(fn, params, spheres, key=KEY)
    assert verdicts(report) == {"unused": "no influence"}
    assert report.ok


def test_a_gradient_that_is_stopped():
    """The value is invariant; its gradient, as JAX computes it, is not tangential."""
    params = {"w": normal(2, 12, 16)}

    def fn(params):
        y = X @ params["w"]
        return y / jax.lax.stop_gradient(jnp.linalg.norm(y, axis=0, keepdims=True))

    report = so.check_spheres(fn, params, FILTER, key=KEY)
    assert verdicts(report) == {"w": "GRADIENT NOT TANGENTIAL"}
    assert report.checks[0].change < 1e-5
    assert not report.ok
    assert so.survey_spheres(fn, params, key=KEY).spheres == {"w": None}


def test_a_tangential_gradient_of_what_is_not_invariant():
    """As in batch renormalisation, where running statistics take the place of those of the batch."""
    params = {"w": normal(2, 12, 16)}

    def fn(params):
        y = X @ params["w"]
        size = jnp.sqrt(jnp.mean(jnp.square(y), 0, keepdims=True))
        return jnp.tanh(y / size * jax.lax.stop_gradient(size))

    report = so.check_spheres(fn, params, so.find_spheres(fn, params, key=KEY), key=KEY)
    assert verdicts(report) == {"w": "NOT INVARIANT (but gradient tangential)"}
    assert not report.ok


def test_not_finite():
    def fn(params):
        return jnp.log(params["w"] - 1e9)

    report = so.check_spheres(fn, {"w": normal(2, 12, 16)}, FILTER, key=KEY)
    assert verdicts(report) == {"w": "NOT FINITE"}
    assert not report.ok


def test_ties_are_scaled_together():
    params = {"kernel": normal(2, 12, 16), "bias": jnp.zeros((1, 16))}

    def fn(params):
        return jax.nn.relu(layernorm(X @ params["kernel"] + params["bias"]))

    tied = {"kernel": so.Sphere((), tie="d"), "bias": so.Sphere((), tie="d")}
    so.check_spheres(fn, params, tied, key=KEY).assert_ok()
    untied = {"kernel": so.Sphere(()), "bias": so.Sphere(())}
    assert set(verdicts(so.check_spheres(fn, params, untied, key=KEY)).values()) == {
        "NOT INVARIANT"
    }
    # The zero-initialised bias is no excuse.
    assert not so.check_spheres(fn, params, {"kernel": so.Sphere(()), "bias": None}, key=KEY).ok


def test_prints_as_a_table():
    fn, params = two_layers()
    spheres = so.spheres_where(params, "kernel")
    report = so.check_spheres(fn, params, spheres, key=KEY)
    lines = str(report).splitlines()
    assert lines[0].startswith("parameter      shape     sphere  ")
    assert lines[0].endswith("change of fn  radial cosine  verdict")
    assert lines[2].startswith("first/kernel   (12, 16)  Sphere((-1,))  ")
    assert lines[2].endswith("  invariant")
    with pytest.raises(AssertionError) as error:
        report.assert_ok()
    assert "head/kernel" in str(error.value)
    assert "first/kernel" not in str(error.value)


def test_nothing_to_check():
    fn, params = two_layers()
    report = so.check_spheres(fn, params, None, key=KEY)
    assert report.ok
    assert report.checks == ()
    assert str(report) == "no parameter is on a sphere"


def test_callable_spheres():
    fn, params = two_layers()
    report = so.check_spheres(fn, params, lambda p: so.spheres_where(p, "first"), key=KEY)
    assert verdicts(report) == {"first/kernel": "invariant"}


def test_bad_input():
    fn, params = two_layers()
    cases = [
        ((fn, params, so.Sphere((3,))), "axis 3 is out of range"),
        ((fn, params, {"first": FILTER}), "no entry for the parameter 'head/kernel'"),
        ((fn, params, so.Sphere), "the class Sphere"),
        ((fn, params, "w"), "the whole tree is 'w', neither a Sphere nor None"),
        ((3, params, FILTER), "check_spheres: fn is a int, not a function"),
        ((lambda p: None, params, None), "check_spheres: .* returns no real array"),
        ((fn, {}, None), "check_spheres: there are no real arrays"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            so.check_spheres(*args, key=KEY)
    with pytest.raises(ValueError, match="key is 'seed', not"):
        so.check_spheres(fn, params, None, key="seed")


def test_factors_reach_from_a_tenth_to_ten():
    """The change of the identity is that of the factors."""
    params = {"w": jnp.ones((2, 4000))}
    report = so.check_spheres(lambda p: p["w"], params, FILTER, key=KEY)
    # Root mean square of f - 1 for f = 10^U(-1, 1).
    expected = np.sqrt((10**2 - 10**-2) / (4 * np.log(10)) - 2 * (10 - 0.1) / (2 * np.log(10)) + 1)
    np.testing.assert_allclose(report.checks[0].change, expected, rtol=0.05)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu, jnp.tanh, jax.nn.relu])
def test_a_nonlinearity_is_not_an_eps(activation, scale):
    """In front of LayerNorm: its effect falls with the radius, too, but not with its square."""
    x = normal(0, 64, 16)

    def fn(p):
        y = activation(x @ p["kernel"])
        y = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
        return y @ p["head"]

    params = {"kernel": scale * normal(1, 16, 32), "head": normal(2, 32, 8)}
    spheres = {"kernel": so.Sphere(()), "head": None}
    report = so.check_spheres(fn, params, spheres, key=KEY)
    expected = "invariant" if activation is jax.nn.relu else "NOT INVARIANT"
    assert report.checks[0].verdict == expected, str(report)


@pytest.mark.parametrize("share", [1e-2, 3e-2])
def test_a_small_shortcut_is_not_an_eps(share):
    x = normal(0, 64, 8)

    def fn(p):
        y = x @ p["kernel"] + share * x
        y = (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + 1e-5)
        return jax.nn.relu(y) @ p["head"]

    params = {"kernel": 0.3 * normal(1, 8, 8), "head": normal(2, 8, 5)}
    spheres = {"kernel": FILTER, "head": None}
    report = so.check_spheres(fn, params, spheres, key=KEY)
    assert report.checks[0].verdict.startswith("NOT INVARIANT"), str(report)

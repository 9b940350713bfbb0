"""What `find_spheres` finds in published architectures, and what their methods constrain besides."""

import jax
import pytest

import spherical_optax as so

from .anatomy import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_symmetries(name):
    with jax.numpy_rank_promotion("allow"):  # the networks are written as others write them
        _check(*NETWORKS[name]())


def _check(fn, params, expected):
    survey = so.survey_spheres(fn, params, key=jax.random.key(3))
    assert _without_ties(survey.spheres) == _without_ties(expected), str(survey)
    if any(jax.tree.leaves(survey.spheres)):
        report = so.check_spheres(fn, params, survey.spheres, key=jax.random.key(4))
        assert report.ok, str(report)


def _without_ties(spheres):
    """The names of ties are free; tied or not is what counts."""
    return jax.tree.map(
        lambda s: (s.index_axes, s.blocks, s.tie is not None),
        spheres,
        is_leaf=lambda s: isinstance(s, so.Sphere),
    )

"""The shapes in the annotations are those that the functions really get."""

import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import spherical_optax as so
from spherical_optax._core import groups
from spherical_optax._transforms import first_moment, second_moment
from tests.optimizers import SPHERES, TABLE, random_tree

# The machine with the GPU collects the tests and does not have it.
beartype = pytest.importorskip("beartype")


def _annotated(owner):
    """The functions of a module or class that say something of shapes."""
    for name, function in vars(owner).items():
        ours = inspect.isfunction(function) and function.__module__ == owner.__module__
        if ours and any("jaxtyping" in repr(a) for a in function.__annotations__.values()):
            yield name, function


class _Module:
    def __init__(self, module):
        self.__dict__ = module.__dict__
        self.__module__ = module.__name__


@pytest.fixture
def checked(monkeypatch):
    """Checks the annotations at run time, and lists the functions that ran."""
    ran = set()
    for module in (first_moment, second_moment, groups):
        owners = [module, *(c for c in vars(module).values() if inspect.isclass(c))]
        for owner in owners:
            view = _Module(module) if owner is module else owner
            if view.__module__ != module.__name__:
                continue
            for name, function in list(_annotated(view)):
                check = jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)

                def run(*args, _check=check, _name=name, **kwargs):
                    ran.add(_name)
                    return _check(*args, **kwargs)

                monkeypatch.setattr(owner, name, run)
    return ran


def test_annotations_hold_for_every_optimizer(checked):
    params, grads = random_tree(0), random_tree(1)
    for row in TABLE.values():
        tx = row(0.01, SPHERES)
        jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert {"first_moment", "second_moment", "_restore_length", "_radial_part"} <= checked


def test_a_wrong_shape_is_noticed(checked):
    m, per_column, per_row = jnp.ones((4, 3)), jnp.ones((1, 3)), jnp.ones((4, 1))
    first_moment.first_moment(m, m, m, per_column, per_column, decay=0.9, gain=0.1)
    with pytest.raises(jaxtyping.TypeCheckError):
        first_moment.first_moment(m, m, jnp.ones(3), per_column, per_column, decay=0.9, gain=0.1)
    with pytest.raises(jaxtyping.TypeCheckError):
        second_moment.second_moment(per_column, jnp.ones((1, 2)), per_row, decay=0.9)
    assert so.geometry.norm(m, so.Sphere()).shape == (1, 3)

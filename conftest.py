"""What the doctests take for granted."""

import jax
import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, so=so)
    with jnp.printoptions(precision=3, suppress=True):  # what no rounding changes
        yield

"""Discovery compiles far more than it computes: here without most of XLA's optimisations."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _flax_promotes(standard_promotion):
    """Flax and Haiku mix dtypes."""

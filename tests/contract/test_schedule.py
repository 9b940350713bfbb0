"""XLA on a CPU computes the sums over one array one after the other, while it is in cache."""

import re

import jax
import pytest

import spherical_optax as so
from spherical_optax._core import projection
from spherical_optax._transforms import first_moment, second_moment

from .test_memory import _step


def _count_neighbours(make):
    """Pairs of successive sums over one kernel: how many are neighbours in the schedule, and not."""
    program = _step(make, weight_decay=0.0).compile()
    kernels, last, near, far, place = set(), {}, 0, 0, 0
    lines = program.as_text().partition("\nENTRY")[2].splitlines()
    for line in lines:
        found = re.match(r"\s+(?:ROOT )?(%?[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)", line)
        if not found or found[3] in ("get-tuple-element", "tuple", "bitcast"):
            continue
        name, shape, operation, operands = found.groups()
        if operation == "parameter":
            kernels |= {name} if re.match(r"f32\[\d+,\d+,\d+,\d+\]", shape) else set()
            continue
        place += 1
        if not shape.startswith("f32[1,1,1,"):  # a number for each filter
            continue
        for operand in set(re.findall(r"%?[\w.\-]+", operands)) & kernels:
            if operand in last:
                near, far = (near + 1, far) if place - last[operand] <= 2 else (near, far + 1)
            last[operand] = place
    return near, far


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="a schedule of JAX 0.10")
@pytest.mark.parametrize("make", [so.adamsrt, so.adamst, so.sgd_mrt])
def test_sums_of_one_array_follow_one_another(make, monkeypatch):
    """And without the hint they do not: when they do, it can go."""
    near, far = _count_neighbours(make)
    assert near >= 19
    assert far <= 2
    for module in (projection, first_moment, second_moment):
        monkeypatch.setattr(module, "OTHER_ZERO", 0.0)
    assert _count_neighbours(make)[1] > 2

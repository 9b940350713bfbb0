"""Processor time of tracing and of compiling a step, against the number of parameter arrays."""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp

import spherical_optax as so
from benchmarks.scale.optimizers import OPTIMIZERS, make_step

SHAPE = (64, 32)  # of every array, each of which is on spheres
WARM_UP = 3  # arrays of a first step, which pays for what is only done once


def measure_growth(optimizer: str, arrays: int, compiles: bool) -> dict[str, Any]:
    """Seconds of `init`, of tracing and lowering a step, and of compiling it on one device."""
    _measure(optimizer, WARM_UP, compiles)
    return _measure(optimizer, arrays, compiles)


def _measure(optimizer: str, arrays: int, compiles: bool) -> dict[str, Any]:
    params = {f"layer{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(arrays)}
    spheres = [dict.fromkeys(params, sphere) for sphere in (so.Sphere(), so.Sphere(()))]
    tx = OPTIMIZERS[optimizer](*spheres)
    marks = [time.process_time()]
    state = jax.eval_shape(tx.init, params)
    marks.append(time.process_time())
    lowered = jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(params, state, params)
    marks.append(time.process_time())
    if compiles:
        lowered.compile()
        marks.append(time.process_time())
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    names = ("init_seconds", "trace_seconds", "compile_seconds")
    return dict(zip(names, [*seconds, None], strict=False))

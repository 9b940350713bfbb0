"""The recorded trajectories in `data`, and the gradients of the problems that they solve.

The data are a part of the public golden set, array for array: of the runs of 40 steps every step up to
12 and then every fourth.
"""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np

import spherical_optax as so

DATA = pathlib.Path(__file__).parent / "data"
CATALOGUE = json.loads((DATA / "cases.json").read_text())
CASES = {case["id"]: case for case in CATALOGUE["cases"]}
_INDEX_AXES = {"filter": (-1,), "layer": ()}


def ids(*optimizers):
    """Ids of the recorded runs of these optimizers; an empty answer is a broken test, not a pass."""
    found = [case["id"] for case in CATALOGUE["cases"] if case["optimizer"] in optimizers]
    assert found, optimizers
    return found


@functools.cache
def arrays(file):
    with np.load(DATA / f"{file}.npz") as stored:
        return dict(stored)


def trajectory(case):
    """Leaf -> (kept steps, *shape)."""
    return {leaf: arrays("trajectories")[f"{case['id']}__{leaf}"] for leaf in case["grouping"]}


def start(problem):
    """Leaf -> starting value."""
    return {
        leaf: arrays("problems")[f"{problem}__{leaf}__x0"]
        for leaf in CATALOGUE["problems"][problem]["shapes"]
    }


def spheres(grouping):
    """Leaf -> so.Sphere or None."""
    return {
        leaf: so.Sphere(index_axes=_INDEX_AXES[kind]) if kind in _INDEX_AXES else None
        for leaf, kind in grouping.items()
    }


def reference_specs(grouping):
    """The same for the numpy reference."""
    return {
        leaf: (_INDEX_AXES[kind], None, None) if kind in _INDEX_AXES else None
        for leaf, kind in grouping.items()
    }


def _rayleigh(matrices, kernel, xp):
    """Gradient of sum_i u_i^T A_i u_i, u_i the direction of filter i (or of the whole kernel)."""
    count = matrices.shape[0]
    rows = kernel.reshape(-1, count).T if count > 1 else kernel.reshape(1, -1)
    radius = xp.sqrt(xp.sum(rows**2, axis=1, keepdims=True))
    u = rows / radius
    au = xp.einsum("gij,gj->gi", matrices, u)
    grads = 2 / radius * (au - xp.sum(u * au, axis=1, keepdims=True) * u)
    return (grads.T if count > 1 else grads).reshape(kernel.shape)


def _tangent(g, x, step, xp):
    """Without the part along x: per filter, of the whole array, and with it, by turns."""
    if x.ndim < 2:
        return g
    radial = []
    for axes in (tuple(range(x.ndim - 1)), None):
        inner, square = (xp.sum(y * x, axis=axes, keepdims=True) for y in (g, x))
        radial.append(inner / square * x)
    turn = (step + 1) % 3
    return g - xp.where(turn == 1, radial[0], xp.where(turn == 2, radial[1], 0.0))


def gradient(problem, xp=jnp):
    """(step, params) -> gradients of the problem, in jax.numpy or numpy."""
    kind = CATALOGUE["problems"][problem]["kind"]
    stored = arrays("problems")

    def stream(step, params):
        return {leaf: xp.asarray(stored[f"{problem}__{leaf}__g"])[step] for leaf in params}

    def rayleigh(step, params):
        del step
        return {
            leaf: _rayleigh(xp.asarray(stored[f"{problem}__{leaf}__A"]), x, xp)
            for leaf, x in params.items()
        }

    def tangent(step, params):
        grads = stream(step, params)
        return {leaf: _tangent(g, params[leaf], step, xp) for leaf, g in grads.items()}

    return {"stream": stream, "tangent": tangent, "rayleigh": rayleigh}[kind]

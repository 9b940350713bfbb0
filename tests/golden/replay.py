"""Runs an Optax optimizer along a stream of gradients inside one compiled scan."""

import functools

import jax
import jax.numpy as jnp
import optax

from ..compiling import usual_jit
from . import recorded


def scan(tx, params, gradient, steps):
    """Leaf -> (steps + 1, *shape); `gradient` takes (step, params)."""

    def step(carry, k):
        params, state = carry
        updates, state = tx.update(gradient(k, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, path = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), params, path)


@functools.cache
def _compiled(factory, problem, grouping, leaves, jit, options):
    spheres = recorded.spheres(dict(grouping))
    gradient = recorded.gradient(problem)

    @functools.partial(jit, static_argnames="steps")
    def run(params, hyper, steps):
        tx = factory({leaf: spheres[leaf] for leaf in leaves}, **hyper, **dict(options))
        return scan(tx, params, gradient, steps)

    return run


def case(factory, case, leaves=None, jit=usual_jit, **changes):
    """Replays a recorded case.

    The hyper-parameters are arguments of the compiled function: one compilation serves all cases of
    an optimizer, and no optimizer may look at their values. Switches are not.

    Args:
      factory: (spheres, **hyper) -> GradientTransformation; the same object for the same optimizer.
      case: entry of the catalogue.
      leaves: the leaves to replay; all of them by default.
      jit: what compiles the replay.
      **changes: hyper-parameters to replace.
    """
    leaves = tuple(leaves or case["grouping"])
    hyper = {**case["hyper"], **changes}
    options = tuple((name, hyper.pop(name)) for name in ("nesterov",) if name in hyper)
    if "betas" in hyper:
        hyper["b1"], hyper["b2"] = hyper.pop("betas")
    start = recorded.start(case["problem"])
    run = _compiled(factory, case["problem"], tuple(case["grouping"].items()), leaves, jit, options)
    steps = case["kept_steps"][-1]
    path = run({leaf: jnp.asarray(start[leaf]) for leaf in leaves}, hyper, steps)
    return {leaf: xs[jnp.asarray(case["kept_steps"])] for leaf, xs in path.items()}

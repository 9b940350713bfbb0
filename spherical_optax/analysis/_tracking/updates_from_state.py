"""An optimizer's updates once more, from the state that it has left: the rest of its own program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import eval_jaxpr
from jax.extend.core import Literal, jaxprs_in_params

# To run twice; what they make is in memory anyway.
_COSTLY = {"dot_general", "scan", "while", "cond"}


def replay(
    tx: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> Callable[[Any], Any] | None:
    """A function from the new state to the updates: of Adam, all that follows its two moments.

    The program of `tx.update` is cut where it makes what the new state holds. What is left needs neither
    the gradients nor the arrays of the old state: the ones might not be in memory otherwise, the others
    are overwritten. None where the updates cannot be had so.
    """

    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, **extra_args)

    try:
        closed, (updates, _) = jax.make_jaxpr(update, return_shape=True)(grads, state, params)
    except Exception:  # the state may have numbers of Python, which decide what is traced
        return None
    program, (leaves, structure) = closed.jaxpr, jax.tree.flatten(updates)
    wanted, stored = program.outvars[: len(leaves)], program.outvars[len(leaves) :]

    at_hand = dict(zip(program.constvars, closed.consts, strict=True))
    passed = list(zip(program.invars, jax.tree.leaves((grads, state, params)), strict=True))
    first = len(passed) - len(jax.tree.leaves(params))
    at_hand.update((var, x) for i, (var, x) in enumerate(passed) if i >= first or jnp.ndim(x) == 0)
    known = {*at_hand, *_variables(stored)}

    needed, rest = set(_variables(wanted)), []
    for step in reversed(program.eqns):
        if needed & set(step.outvars) - known:
            rest.insert(0, step)
            needed.update(_variables(step.invars))
    made = {var for step in rest for var in step.outvars}
    if not needed <= known | made or any(s.effects for s in rest) or _COSTLY & set(_names(rest)):
        return None

    cuts = [var for var in (*at_hand, *_variables(stored)) if var in needed]
    tail = program.replace(constvars=[], invars=cuts, outvars=wanted, eqns=rest)

    def run(new: Any) -> Any:
        kept = zip(stored, jax.tree.leaves(new), strict=True)
        values = at_hand | {var: x for var, x in kept if not isinstance(var, Literal)}
        found = eval_jaxpr(tail, (), *(values[var] for var in cuts))
        return jax.tree.unflatten(structure, found)

    return run


def _variables(atoms: Any) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _names(eqns: Any) -> Iterator[str]:
    for eqn in eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from _names(inner.eqns)

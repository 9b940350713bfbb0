"""Recomputes an optimizer's updates from its new state, by the end of the optimizer's own program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax
from jax.core import eval_jaxpr

# Operations that are too expensive to run twice. Their results are in memory in any case.
COSTLY = {"dot_general", "scan", "while", "cond"}


def get_replay(
    tx: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> Callable[[Any], Any] | None:
    """A function that recomputes the updates of `tx` from its new state, None if there is none.

    We trace `tx.update`, cut the jaxpr where it writes the new state, and keep the tail, for Adam the
    division of the two moments. The tail uses neither gradients nor old arrays, so XLA need not keep
    those alive: with it, a step of `track(optax.adam(1e-3), spheres, every=10)` on the parameters of a
    ResNet-18 takes 45.5 MiB of temporary memory, without it 112.2 MiB (JAX 0.10, CPU).

    Returns None if the updates need more than the new state (SGD without momentum, Lion), have effects,
    or are expensive to compute twice.
    """

    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, **extra_args)

    try:
        closed, (updates, _) = jax.make_jaxpr(update, return_shape=True)(grads, state, params)
    except Exception:  # a state may hold Python numbers that decide what is traced
        return None
    program, (leaves, structure) = closed.jaxpr, jax.tree.flatten(updates)
    wanted, stored = program.outvars[: len(leaves)], program.outvars[len(leaves) :]

    at_hand = dict(zip(program.constvars, closed.consts, strict=True))
    passed = list(zip(program.invars, jax.tree.leaves((grads, state, params)), strict=True))
    first = len(passed) - len(jax.tree.leaves(params))
    at_hand.update((var, x) for i, (var, x) in enumerate(passed) if i >= first or jnp.ndim(x) == 0)
    known = {*at_hand, *_list_variables(stored)}

    tail, needed = _find_tail(program, wanted, known)
    made = {var for step in tail for var in step.outvars}
    has_effects = any(step.effects for step in tail)
    if not needed <= known | made or has_effects or COSTLY & set(_iterate_names(tail)):
        return None

    cuts = [var for var in (*at_hand, *_list_variables(stored)) if var in needed]
    program = program.replace(constvars=[], invars=cuts, outvars=wanted, eqns=tail)

    def replay(new_state: Any) -> Any:
        pairs = zip(stored, jax.tree.leaves(new_state), strict=True)
        values = at_hand | {var: x for var, x in pairs if not isinstance(var, jex.Literal)}
        found = eval_jaxpr(program, (), *(values[var] for var in cuts))
        return jax.tree.unflatten(structure, found)

    return replay


def _find_tail(program: Any, wanted: Any, known: set[Any]) -> tuple[list[Any], set[Any]]:
    """The steps of the program that compute `wanted` from `known`, and all variables that they read."""
    needed, tail = set(_list_variables(wanted)), []
    for step in reversed(program.eqns):
        if needed & set(step.outvars) - known:
            tail.insert(0, step)
            needed.update(_list_variables(step.invars))
    return tail, needed


def _list_variables(atoms: Any) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _iterate_names(steps: Any) -> Iterator[str]:
    """Yields the names of the primitives, also of those inside other primitives."""
    for step in steps:
        yield step.primitive.name
        for inner in jex.jaxprs_in_params(step.params):
            yield from _iterate_names(inner.eqns)

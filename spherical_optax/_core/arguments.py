"""Arguments that callers give, and one clear error for what does not fit."""

import reprlib
from typing import Any

import optax


def require_transformation(
    caller: str,
    tx: Any,
    wrong: str = "is no optax.GradientTransformation, such as optax.scale_by_adam() or so.ema(0.9)",
) -> Any:
    """The transformation, and one error for what is none."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"{caller}: {reprlib.repr(tx)} {wrong}")
    return tx


def reject_schedule(
    caller: str, value: Any, instead: str = "give its value at the step, schedule(count)"
) -> Any:
    """The value; a schedule has none of its own."""
    if callable(value):
        raise ValueError(f"{caller}: {value!r} is a schedule; {instead}")
    return value


def require_constant_decay(caller: str, value: Any) -> Any:
    """The rate of decay; no transformation of Optax takes a schedule for it either."""
    return reject_schedule(
        caller,
        value,
        "for one of a rate of decay, "
        "optax.inject_hyperparams(so.adamp, static_args='spheres')(1e-3, spheres, b1=schedule)",
    )


def is_constant_zero(value: Any) -> bool:
    """A zero that is known already, so that what it is a factor of can be left out."""
    return type(value) in (int, float) and value == 0


def weight_decay_at(weight_decay: optax.ScalarOrSchedule, count: Any) -> Any:
    """The L2 coefficient of this step; None for a constant zero, which needs no parameters."""
    if is_constant_zero(weight_decay):
        return None
    return weight_decay(count) if callable(weight_decay) else weight_decay


def require_params(params: Any) -> Any:
    if params is None:
        raise ValueError(
            "this transformation moves with the parameters: call update(updates, state, params)"
        )
    return params

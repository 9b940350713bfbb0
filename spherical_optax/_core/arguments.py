"""Checks of arguments: each has one clear error."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax._core.safe_math import is_low_precision

# Why a state does not fit, and what helps.
OTHER_SPHERES = (
    "the state was made with other spheres or parameters. Take the spheres that it was made with, or a "
    "new state from init"
)


def require_transformation(
    caller: str,
    tx: Any,
    wrong: str = "is no optax.GradientTransformation, such as optax.scale_by_adam() or so.ema(0.9)",
) -> Any:
    """Returns `tx`, and raises a ValueError if it is no Optax transformation."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"{caller}: {reprlib.repr(tx)} {wrong}")
    return tx


def require_state(state: Any, kind: Any) -> Any:
    """Returns `state`, and raises a ValueError if it has not the fields of this kind of state."""
    if not all(hasattr(state, name) for name in kind._fields):
        raise ValueError(
            f"the state is a {type(state).__name__}, not a {kind.__name__}: it was made by another "
            "optimizer, or is the dictionary of a file. Take a state from init; "
            "flax.serialization.from_state_dict(tx.init(params), state) makes one of a dictionary"
        )
    return state


def require_parts(caller: str, state: Any, count: int) -> Any:
    """Returns the state of a chain, and raises a ValueError if it has not so many parts."""
    if not isinstance(state, tuple) or len(state) != count:
        parts = len(state) if isinstance(state, tuple) else 0
        raise ValueError(
            f"{caller}: the state has {parts} parts, not {count}: it was made by another optimizer. "
            "Take a state from init"
        )
    return state


def require_rate(learning_rate: Any) -> Any:
    """Returns a learning rate, and raises a ValueError if it is neither a number nor a schedule."""
    if not (callable(learning_rate) or is_number(learning_rate)):
        raise ValueError(
            f"learning_rate is {reprlib.repr(learning_rate)}, neither a number nor a schedule; it is "
            "the first argument, and spheres the second"
        )
    return learning_rate


def is_number(value: Any) -> bool:
    """Whether this is a number or an array, which may be traced."""
    return isinstance(value, int | float | np.number | np.ndarray | jax.Array)


def reject_schedule(
    caller: str, value: Any, instead: str = "give its value at the step, schedule(count)"
) -> Any:
    """Returns `value`, and raises a ValueError if it is a schedule: a schedule has a value per step."""
    if callable(value):
        raise ValueError(f"{caller}: {value!r} is a schedule; {instead}")
    return value


def reject_number(caller: str, spheres: Any, instead: str) -> None:
    """Raises a ValueError if the ignored `spheres` is a number: Optax has another argument there."""
    if isinstance(spheres, int | float):
        raise ValueError(
            f"{caller}: spheres is {spheres!r}; its place is the second, and {instead}"
        )


def require_number(caller: str, name: str, value: Any) -> Any:
    """Returns the number, and raises a ValueError if it is none; it may be traced."""
    reject_schedule(
        caller,
        value,
        f"{name} has to be a number. For a schedule, wrap the optimizer, as in "
        "optax.inject_hyperparams(so.adamsrt, static_args='spheres')(1e-3, spheres, b2=schedule)",
    )
    if not is_number(value):
        raise ValueError(f"{caller}: {name} is {reprlib.repr(value)}, not a number")
    return value


def require_decay(caller: str, value: Any) -> Any:
    """Returns a rate of decay, and raises a ValueError if it is no number or of low precision.

    In bfloat16 0.999 is 1, and the step would be NaN.
    """
    require_number(caller, "the rate of decay", value)
    if is_low_precision(value):
        raise ValueError(
            f"{caller}: the rate of decay is {jnp.result_type(value)}, in which 0.9 and 0.999 are other "
            "numbers (0.898 and 1 in bfloat16). optax.inject_hyperparams takes the dtype of the "
            "parameters: give it hyperparam_dtype=jnp.float32"
        )
    return value


def is_constant_zero(value: Any) -> bool:
    """Whether `value` is a Python zero, which is known while tracing: its terms can then be left out."""
    return type(value) in (int, float) and value == 0


def get_weight_decay(weight_decay: optax.ScalarOrSchedule, count: Any) -> Any:
    """Returns the coefficient of this step, or None for a constant zero, which needs no parameters."""
    if is_constant_zero(weight_decay):
        return None
    return weight_decay(count) if callable(weight_decay) else weight_decay


def require_params(params: Any) -> Any:
    if params is None:
        raise ValueError(
            "this transformation needs the parameters: call update(updates, state, params)"
        )
    return params

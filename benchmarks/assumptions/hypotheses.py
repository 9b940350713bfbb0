"""The paper's hypotheses as conditions on quantities of the recorded steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.assumptions.recording import Optimizer, Step

FIRST_STEPS = 10  # the worst value is also reported without these steps
# The paper's "order of magnitude" of the term that Theorem 4 neglects (section 3.2). The text does not
# say what the term is relative to; here the figure bounds its share of r'^4.
PUBLISHED = 1e-4
OPTIMIZERS = ("SGD", "SGD-M", "Adam")
Array = np.ndarray


# --- Theorem 4 --------------------------------------------------------------------------------
#
# With a tangential gradient, G = ||grad L(u)||, SGD with L2 has exactly
#   r'^2 = (1 - eta lambda)^2 r^2 + (eta G)^2 / r^2,   and hence, with beta = (1 - eta lambda)^4,
#   r'^4 = beta r^4 + 2 beta^{1/2} (eta G)^2  +  (eta G)^4 / r^4.
# Theorem 4 neglects the last term: the square of (eta G)^2 / r^2, in which it expands r'^4.


def predict_by_theorem_4(
    fourth_power: Any, gradient: Any, learning_rate: float, weight_decay: float
) -> Any:
    """r'^4 from r^4, by Theorem 4."""
    root = (1 - learning_rate * weight_decay) ** 2  # beta^{1/2}
    return root**2 * fourth_power + 2 * root * (learning_rate * gradient) ** 2


def compute_neglected(radius: Any, gradient: Any, learning_rate: float) -> Any:
    return (learning_rate * gradient / radius) ** 4


def predict_radius(step: Step, learning_rate: float, weight_decay: float) -> Array:
    """The radius after all steps, from the first radius and the gradients: neglected terms add up."""
    fourth_power = step.radius[0] ** 4
    for gradient in step.gradient:
        fourth_power = predict_by_theorem_4(fourth_power, gradient, learning_rate, weight_decay)
    return fourth_power**0.25


# --- the quantities ---------------------------------------------------------------------------


class Quantity(NamedTuple):
    label: str
    meaning: str
    values: Callable[[Step, float], Array]  # takes the step and the learning rate
    holds: Callable[[Array], Array]
    condition: str
    worst: Callable[[Array], Any]
    digits: str
    only: tuple[str, ...] = OPTIMIZERS


QUANTITIES = {
    "factor": Quantity(
        "1-A<c,u>",
        "1 - A <c, u> of Theorem 2, as 1 + <q, x> / r^2 of the update q",
        lambda step, eta: step.factor,
        lambda x: x > 0,
        "> 0",
        np.min,
        ".5f",
    ),
    "angle": Quantity(
        "angle rad",
        "angle moved on the sphere; its tangent is eta^e ||c_perp||",
        lambda step, eta: step.angle,
        lambda x: x < np.pi,
        "< pi",
        np.max,
        ".5f",
    ),
    "neglected": Quantity(
        "neglected",
        "what Theorem 4 neglects of r'^4, (eta ||grad L(u)||)^4 / r^4, as a part of the measured r'^4: "
        "sin(angle)^4; the published order of magnitude of 1e-4 is taken as a bound of it",
        lambda step, eta: compute_neglected(step.radius, step.gradient, eta) / step.next_radius**4,
        lambda x: x <= PUBLISHED,
        f"<= {PUBLISHED:g}",
        np.max,
        ".1e",
        ("SGD",),
    ),
    "expansion_variable": Quantity(
        "expansion",
        "(eta ||grad L(u)||)^2 / r^2, the variable of the expansion at order 2, as a part of r^2",
        lambda step, eta: (eta * step.gradient / step.radius**2) ** 2,
        lambda x: x < 1,
        "< 1",
        np.max,
        ".1e",
        ("SGD",),
    ),
}
QUANTILES = {
    "min": 0.0,
    "0.1 %": 0.001,
    "median": 0.5,
    "99 %": 0.99,
    "99.9 %": 0.999,
    "max": 1.0,
}


def summarize(quantity: Quantity, values: Array) -> dict[str, Any]:
    """Statistics of `values`, (steps, filters), over all filters and steps."""
    later = values[FIRST_STEPS:]
    return {
        **{name: float(np.quantile(values, q)) for name, q in QUANTILES.items()},
        "worst_after_the_first_steps": float(quantity.worst(later)) if later.size else None,
        "values": values.size,
        "condition": quantity.condition,
        "violations": int((~quantity.holds(values)).sum()),
    }


def compute_values(
    steps: Mapping[str, Step], rates: Mapping[str, float]
) -> dict[str, dict[str, Array]]:
    """The values of each quantity, by optimizer."""
    return {
        key: {name: quantity.values(steps[name], rates[name]) for name in quantity.only}
        for key, quantity in QUANTITIES.items()
    }


def summarize_all(
    values: Mapping[str, Mapping[str, Array]],
) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        key: {name: summarize(QUANTITIES[key], found) for name, found in by_name.items()}
        for key, by_name in values.items()
    }


def measure_drift(step: Step, optimizer: Optimizer) -> dict[str, float]:
    """The relative error of Theorem 4's radius after all steps."""
    predicted = predict_radius(step, optimizer.learning_rate, optimizer.weight_decay)
    off = np.abs(predicted / step.next_radius[-1] - 1)
    return {"median": float(np.median(off)), "max": float(off.max())}


def write_verdict(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A sentence per hypothesis, which says whether the hypothesis held."""
    factor, angle = rows["factor"], rows["angle"]
    smallest = min(row["min"] for row in factor.values())
    largest = max(row["max"] for row in angle.values())
    negative, long = (sum(row["violations"] for row in q.values()) for q in (factor, angle))
    term = rows["neglected"]["SGD"]
    share = 100 * term["violations"] / term["values"]
    return {
        "factor": f"positive at every step, at least {smallest:.3g}"
        if not negative
        else f"NOT always positive: {negative} values are not, the smallest is {smallest:.3g}",
        "angle": f"every step is shorter than π, at most {largest:.2g} rad"
        if not long
        else f"NOT always shorter than π: {long} steps are not",
        "neglected": f"within the published order of {PUBLISHED:.0e}, at most {term['max']:.1e}"
        if not term["violations"]
        else f"NOT always within the published order of {PUBLISHED:.0e}: {share:.2g} % lie above, "
        f"up to {term['max']:.1e}",
        "expansion_variable": f"{rows['expansion_variable']['SGD']['median']:.1e} in the median, "
        f"at most {rows['expansion_variable']['SGD']['max']:.1e}",
    }

"""The cases that `benchmarks.precision` computes, and how each row of its table is judged."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import spherical_optax as so
from benchmarks.measuring.precision_inputs import (
    STEPS,
    Values,
    make_inputs,
    name_arrays,
    put_on_device,
)
from benchmarks.measuring.precision_networks import (
    B2,
    DECAY,
    measure_discovery,
    measure_losses,
)
from benchmarks.training.methods import OPTIMIZERS, make_optimizer

RATE = 1e-2
SPHERES = {
    "conv1": so.Sphere(),
    "conv2": so.Sphere(),
    "dense": {name: so.Sphere((), tie="dense") for name in ("kernel", "bias")},
    "head": so.Sphere((1,)),
    "scale": None,
}


class Row(NamedTuple):
    """How one row of the table is judged.

    Args:
      floors: for each dtype, the deviation that passes whatever the CPU's deviation is. A dtype without
        a floor is not measured.
      coarse: the floor of float32 on devices that round the factors of products to TF32.
      natural: deviations are relative to the reference, but to numbers of this size if it is smaller.
      zero: whether the reference is zero.
      like: the name of another row with the same reference.
    """

    floors: Mapping[str, float]
    coarse: float | None = None
    natural: float = 0.0
    zero: bool = False
    like: str = ""


class Case(NamedTuple):
    """A program, which is run for each dtype that its rows have floors for."""

    compute: Callable[[str], Values]
    rows: Mapping[str, Row]
    products: str | None = "highest"  # precision of matrix products; None: the device's default
    reference: str = "float64"  # the dtype of the reference


# By its documentation, CUDA's powf may be wrong by 4 units in the last place, which is 2.4e-5 of 1 -
# b2^t at the first step. On a CPU an error of that size changed Adam's displacement by 7e-6; without
# the error the deviation was 8e-7. bfloat16 has 8 binary digits: one rounding changes a number by up
# to 2^-9, four roundings by 2^-7.
STEPPED = Row({"float32": 1e-5, "bfloat16": 2**-7})
# 16 units in the last place, for sums of 1584 products, roots and sines.
GEOMETRY = Row({"float32": 2e-6, "bfloat16": 2**-7})
# TF32 has 11 binary digits. Rounding factors to it on a CPU changed MuonH's displacement by 1.2e-3.
MUON = STEPPED._replace(coarse=5e-3, like="muonh")
# The package's own bounds for figures that are zero but for rounding; and 0.01, for the least figure off
# the spheres. Another device may draw other probes. In ten tries with other probes on a CPU, the largest
# figure changed by a factor of two and the least by one of eight, but no verdict changed.
FIGURES = Row({"float32": 2e-4, "bfloat16": 5e-2}, natural=1.0, zero=True)
CHANGES = Row({"float32": 1e-3, "bfloat16": 0.15}, natural=1.0, zero=True)
CLOSE = Row({"float32": 1.0, "bfloat16": 5.0}, natural=1.0, zero=True)
VERDICTS = Row({"float32": 0.0, "bfloat16": 0.0})
# The losses are not smooth: if rounding switches one ReLU, a gradient over 65,536 random pixels
# changes by about 4e-3. Changes of the losses: 1.5e-6 from errors of 1e-7 in the first parameters and
# 2.1e-5 from errors of 1e-5, 8e-5 from factors in TF32, 2e-4 from activations in bfloat16, and 5.4e-5
# from 1.01 times this learning rate.
LOSSES = Row({"float32": 3e-5})
FEW_LOSSES = Row({"float32": 3e-5, "bfloat16": 5e-4}, like="training")
DEFAULT_LOSSES = FEW_LOSSES._replace(coarse=4e-4)


# --- optimizers -------------------------------------------------------------------------------

Make = Callable[[], optax.GradientTransformation]


def list_optimizers() -> dict[str, Make]:
    def stacked() -> optax.GradientTransformation:
        return so.stacked(lambda s: so.adamsrt(RATE, s, b2=B2, weight_decay=DECAY), SPHERES)

    return {
        name: functools.partial(make_optimizer, name, RATE, SPHERES, B2, DECAY)
        for name in OPTIMIZERS
    } | {
        "stacked(adamsrt)": stacked,
        "optax.adam": lambda: optax.adam(RATE, b2=B2),
        "optax.adamw": lambda: optax.adamw(RATE, b2=B2, weight_decay=DECAY),
    }


def run_steps(tx: optax.GradientTransformation, dtype: str) -> tuple[Any, Any, Any]:
    """The first and the last parameters, and the last state, by one compiled scan."""

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        def step(carry: Any, grad: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    start, grads = put_on_device((make_inputs(0), make_inputs(1, STEPS)), dtype)
    return start, *run(start, grads)


def measure_displacement(what: str, make: Make, dtype: str) -> Values:
    start, end, _ = run_steps(make(), dtype)
    before = name_arrays(start)
    return {what: {name: x - before[name] for name, x in name_arrays(end).items()}}


TRACKED = {
    "radius": STEPPED,
    "angle": STEPPED,
    "effective_lr": STEPPED,
    "radial_cosine": STEPPED._replace(natural=1.0),
}


def measure_tracked(what: str, make: Make, dtype: str) -> Values:
    *_, state = run_steps(so.track(make(), SPHERES), dtype)
    return {f"{what}: {name}": name_arrays(optax.tree.get(state, name)) for name in TRACKED}


# --- geometry ---------------------------------------------------------------------------------

MAPS = ("transport", "exp", "log", "angle")


def measure_geometry(dtype: str) -> Values:
    @jax.jit
    def run(x: Any, y: Any, v: Any) -> Any:
        u = so.geometry.direction(x, SPHERES)
        return (
            so.geometry.transport(x, y, v, SPHERES),
            so.geometry.exp(u, so.geometry.project(u, v, SPHERES), SPHERES),
            so.geometry.log(x, y, SPHERES),
            so.geometry.angle(x, y, SPHERES),
        )

    found = run(*(put_on_device(make_inputs(seed), dtype) for seed in (2, 3, 4)))
    return {f"geometry.{name}": name_arrays(x) for name, x in zip(MAPS, found, strict=True)}


DISCOVERY = {
    "find_spheres: verdicts": VERDICTS,
    "find_spheres: figures on spheres": FIGURES,
    "find_spheres: tol / figures off": CLOSE,
    "check_spheres: changes of outputs": CHANGES,
}


def list_cases() -> dict[str, Case]:
    """All cases, in the order of the table."""
    makes = list_optimizers()
    found = {
        name: Case(functools.partial(measure_displacement, name, make), {name: STEPPED})
        for name, make in makes.items()
    }
    stacked = "stacked(adamsrt)"
    found[stacked] = found[stacked]._replace(rows={stacked: STEPPED._replace(like="adamsrt")})
    name = "muonh, default products"
    compute = functools.partial(measure_displacement, name, makes["muonh"])
    found[name] = Case(compute, {name: MUON}, products=None)
    for inner in ("optax.adam", "adamsrt"):
        name = f"track({inner})"
        rows = {f"{name}: {what}": row for what, row in TRACKED.items()}
        found[name] = Case(functools.partial(measure_tracked, name, makes[inner]), rows)
    found["geometry"] = Case(measure_geometry, {f"geometry.{name}": GEOMETRY for name in MAPS})
    found["spheres"] = Case(measure_discovery, DISCOVERY, reference="float32")
    for name, row, products, few_kernels in (
        ("training", LOSSES, "highest", False),
        ("training, few kernels", FEW_LOSSES, "highest", True),
        ("training, default products", DEFAULT_LOSSES, None, False),
    ):
        compute = functools.partial(measure_losses, name, few_kernels=few_kernels)
        found[name] = Case(compute, {name: row}, products, reference="float32")
    return found

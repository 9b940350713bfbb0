"""The paper's checks of its own hypotheses, on every filter and at every step of a real training.

    python -m benchmarks.assumptions --data-dir DIR [--steps 300] [--model resnet20] [--limit N] \\
        [--out FOLDER]

Theorem 2 asks that 1 - A <c, u> is positive and that steps on the sphere are shorter than pi (appendix
C.1.2); Theorem 4 neglects a term of the radius' fourth power (C.1.5).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import spherical_optax as so
from benchmarks import protocol, report
from benchmarks.cli import Parser, at_least
from benchmarks.data import SOURCES, DataError, Dataset, load
from benchmarks.loop import Trainer
from benchmarks.models import MODELS, ImageSizeError
from benchmarks.progress import progress
from benchmarks.spheres import filter_spheres

SEED = 0
FIRST_STEPS = 10  # the worst is also told without them
# "Order of magnitude" of what Theorem 4 neglects (section 3.2). The text does not say relative to what;
# here it is taken as a bound of the term as a part of r'^4.
PUBLISHED = 1e-4
# Okabe and Ito's colours, as in the other figures.
COLORS = {"SGD": "#0072B2", "SGD-M": "#D55E00", "Adam": "#009E73"}
Array = np.ndarray


# --- what is measured -------------------------------------------------------------------------


class Step(NamedTuple):
    """One step on every filter: vectors, a number per filter."""

    factor: Any  # 1 - A <c, u>
    angle: Any  # moved on the sphere, radians
    gradient: Any  # ||grad L(u)||, without the L2 term
    radius: Any  # before the step
    next_radius: Any


class WatchState(NamedTuple):
    inner_state: Any
    step: Step


def measure(params: Any, grads: Any, updates: Any, spheres: Any) -> Step:
    measured = so.analysis.measure_step(params, updates, spheres)
    # The update is q = -eta a / b and A c = eta (a / b) / r: hence A <c, u> = -<q, x> / r^2.
    factor = jax.tree.map(
        lambda qx, r: 1 + qx / (r * r),
        so.geometry.dot(updates, params, spheres),
        measured.radius,
    )
    # grad L(u) = r grad L(x). Of the latter the tangential part: BatchNorm's epsilon leaves some more.
    tangent = so.geometry.norm(so.geometry.project(params, grads, spheres), spheres)
    gradient = jax.tree.map(jnp.multiply, measured.radius, tangent)
    found = (factor, measured.angle, gradient, measured.radius, measured.next_radius)
    return Step(*(_filters(tree) for tree in found))


def watch(tx: optax.GradientTransformation, spheres: Any) -> optax.GradientTransformation:
    """`tx` itself, with the last step's `Step` in its state: the training loop needs no change."""

    def init(params):
        filters = _filters(so.geometry.norm(params, spheres))
        # Arrays of their own, because one that came twice could not be donated.
        return WatchState(tx.init(params), Step(*(jnp.zeros_like(filters) for _ in Step._fields)))

    def update(updates, state, params=None):
        grads = updates
        updates, inner_state = tx.update(grads, state.inner_state, params)
        return updates, WatchState(inner_state, measure(params, grads, updates, spheres))

    return optax.GradientTransformation(init, update)


class Diverged(ValueError):
    """The loss is not finite."""


class Recorder(Trainer):
    """A training loop that keeps the `Step` of every step."""

    def record(self, steps: int, advance: Callable[[float], None]) -> Step:
        """Arrays (steps, filters) of the first `steps` steps."""
        state = self.init(SEED)
        found = []
        for count in range(steps):
            epoch, step = divmod(count, self.steps)
            if step == 0:
                plan = self.plan(SEED, epoch)
            state, loss = self._train(state, *self.train, plan, np.int32(step))
            if not math.isfinite(loss):
                raise Diverged(f"diverged in step {count + 1} (the loss is not finite)")
            # Copies: the next step overwrites what is on the device.
            found.append(jax.tree.map(lambda x: np.array(x, np.float64), state.opt_state.step))
            advance(float(loss))
        return Step(*(np.stack(column) for column in zip(*found, strict=True)))


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    learning_rate: float
    weight_decay: float  # the L2 coefficient


def optimizers(dataset: str, model: str, spheres: Any) -> dict[str, Optimizer]:
    """With the paper's values. It lists none for SGD without momentum, which gets those of SGD-M."""
    sgd, adam = (protocol.hyperparameters(dataset, model, name) for name in ("sgd", "adam"))

    def descent(momentum: float | None) -> Optimizer:
        rate, _, decay = sgd
        tx = so.sgd(rate, spheres, momentum=momentum, weight_decay=decay)
        return Optimizer(tx, rate, decay)

    rate, b2, decay = adam
    assert b2 is not None
    return {
        "SGD": descent(None),
        "SGD-M": descent(protocol.MOMENTUM),
        "Adam": Optimizer(so.adam(rate, spheres, b2=b2, weight_decay=decay), rate, decay),
    }


def _filters(tree: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


# --- Theorem 4 --------------------------------------------------------------------------------
#
# With a tangential gradient, G = ||grad L(u)||, SGD with L2 has exactly
#   r'^2 = (1 - eta lambda)^2 r^2 + (eta G)^2 / r^2,   and hence, with beta = (1 - eta lambda)^4,
#   r'^4 = beta r^4 + 2 beta^{1/2} (eta G)^2  +  (eta G)^4 / r^4.
# Theorem 4 neglects the last term: the square of (eta G)^2 / r^2, in which it expands r'^4.


def theorem_4(fourth_power: Any, gradient: Any, learning_rate: float, weight_decay: float) -> Any:
    """r'^4 from r^4, as Theorem 4 has it."""
    root = (1 - learning_rate * weight_decay) ** 2  # beta^{1/2}
    return root**2 * fourth_power + 2 * root * (learning_rate * gradient) ** 2


def neglected(radius: Any, gradient: Any, learning_rate: float) -> Any:
    return (learning_rate * gradient / radius) ** 4


def radius_by_theorem_4(step: Step, learning_rate: float, weight_decay: float) -> Array:
    """After all steps, from the first radius and the gradients alone: what was neglected adds up."""
    fourth_power = step.radius[0] ** 4
    for gradient in step.gradient:
        fourth_power = theorem_4(fourth_power, gradient, learning_rate, weight_decay)
    return fourth_power**0.25


# --- what it amounts to -----------------------------------------------------------------------


class Quantity(NamedTuple):
    label: str
    meaning: str
    values: Callable[[Step, float], Array]  # of the learning rate, too
    holds: Callable[[Array], Array]
    condition: str
    worst: Callable[[Array], Any]
    digits: str
    only: tuple[str, ...] = tuple(COLORS)


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
        lambda step, eta: neglected(step.radius, step.gradient, eta) / step.next_radius**4,
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


def statistics(quantity: Quantity, values: Array) -> dict[str, Any]:
    """Over all filters and steps of `values`, (steps, filters)."""
    later = values[FIRST_STEPS:]
    return {
        **{name: float(np.quantile(values, q)) for name, q in QUANTILES.items()},
        "worst_after_the_first_steps": float(quantity.worst(later)) if later.size else None,
        "values": values.size,
        "condition": quantity.condition,
        "violations": int((~quantity.holds(values)).sum()),
    }


def all_values(
    steps: Mapping[str, Step], rates: Mapping[str, float]
) -> dict[str, dict[str, Array]]:
    """By quantity, then by optimizer."""
    return {
        key: {name: quantity.values(steps[name], rates[name]) for name in quantity.only}
        for key, quantity in QUANTITIES.items()
    }


def all_statistics(
    values: Mapping[str, Mapping[str, Array]],
) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        key: {name: statistics(QUANTITIES[key], found) for name, found in by_name.items()}
        for key, by_name in values.items()
    }


def accumulated(step: Step, optimizer: Optimizer) -> dict[str, float]:
    """How far the radius of Theorem 4 is from the measured one after all steps."""
    predicted = radius_by_theorem_4(step, optimizer.learning_rate, optimizer.weight_decay)
    off = np.abs(predicted / step.next_radius[-1] - 1)
    return {"median": float(np.median(off)), "max": float(off.max())}


def verdict(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A sentence per hypothesis that says whether it held."""
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


# --- how it is shown --------------------------------------------------------------------------


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in ("", " "):
        found.add_column(column, no_wrap=True)
    for column in (*QUANTILES, f"worst from {FIRST_STEPS + 1}", "broken"):
        found.add_column(column, justify="right", no_wrap=column in QUANTILES)
    for key, quantity in QUANTITIES.items():
        for name, row in rows[key].items():
            numbers = [row[q] for q in QUANTILES] + [row["worst_after_the_first_steps"]]
            found.add_row(
                quantity.label,
                name,
                *("-" if x is None else format(x, quantity.digits) for x in numbers),
                str(row["violations"]),
            )
    return found


def figure(
    values: Mapping[str, Mapping[str, Array]], sentences: Mapping[str, str], title: str, path: Path
) -> None:
    """One panel per hypothesis; its title says whether it held."""
    made = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    for axes, key in ((left, "factor"), (middle, "angle"), (right, "neglected")):
        bins = _bins(values[key], log=key != "factor")
        for name, found in values[key].items():
            # What a logarithmic axis cannot show, a filter that did not move, is in its first bin.
            shown = np.clip(found.ravel(), bins[0], bins[-1])
            axes.hist(shown, bins, histtype="step", lw=1.6, color=COLORS[name], label=name)
        words = sentences[key]
        lines = words.replace(": ", ":\n", 1) if ": " in words else words.replace(", ", ",\n", 1)
        axes.set(yscale="log", ylabel="count (filters, steps)", ylim=(0.7, None))
        axes.set_title(lines, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="1 - A⟨c, u⟩  (no unit; Theorem 2 needs it above 0)")
    middle.set(xscale="log", xlabel="angle moved in one step, rad")
    term = r"$(\eta\,\|\nabla L(u_k)\|\,/\,r_k)^4\,/\,r_{k+1}^4$"
    right.set(xscale="log", xlabel=f"neglected part of $r_{{k+1}}^4$ (SGD, no unit): {term}")
    if left.get_xlim()[0] < 0:
        _mark(left, 0.0, "0")
    _mark(middle, np.pi, "π")
    _mark(right, PUBLISHED, r"published: $10^{-4}$")
    handles, labels = left.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    made.suptitle(title, fontsize=12)
    made.savefig(path, dpi=150)


def _bins(values: Mapping[str, Array], log: bool) -> Array:
    flat = np.concatenate([found.ravel() for found in values.values()])
    if log:
        positive = flat[flat > 0]
        return np.geomspace(0.99 * positive.min(), 1.01 * positive.max(), 80)
    return np.linspace(flat.min() - 1e-6, flat.max() + 1e-6, 80)


def _mark(axes: Axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.4", ls=":", lw=1.2)
    place = axes.get_xaxis_transform()
    axes.text(x, 1.0, f"{text} ", transform=place, ha="right", va="top", color="0.3")


# --- command line -----------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks.assumptions", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--dataset", choices=SOURCES, default="cifar10")
    add("--data-dir", type=Path, help="holds NAME.npz or a TFDS folder; default: TFDS downloads")
    add("--model", choices=MODELS, default="resnet20")
    add("--steps", type=at_least(int, 1), default=300)
    add("--limit", type=at_least(int, 1), help="use only the first training images")
    add("--out", type=Path, help="folder for assumptions.json and assumptions.png")
    return parser


def record(
    data: Dataset, model_name: str, steps: int
) -> tuple[dict[str, Optimizer], dict[str, Step]]:
    model = MODELS[model_name](data.source.num_classes)
    spheres = filter_spheres(model, data.source.shape)
    compared = optimizers(data.source.name, model_name, spheres)
    found = {}
    with progress(len(compared) * steps) as advance:
        for name, optimizer in compared.items():
            tx = watch(optimizer.tx, spheres)
            # Step by step on every device, to see each of them.
            recorder = Recorder(model, data, tx, protocol.BATCH_SIZE, scan=False)

            def show(loss: float, name: str = name) -> None:
                advance(f"{name}: loss {loss:.4f}")

            try:
                found[name] = recorder.record(steps, show)
            except Diverged as error:
                raise Diverged(f"{name} {error}") from error
    return compared, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.out:
        parser.require_writable(args.out, args.out)
    try:
        data = load(args.dataset, args.data_dir, args.limit)
        compared, steps = record(data, args.model, args.steps)
    except (DataError, ImageSizeError, Diverged) as error:
        parser.error(str(error))

    values = all_values(steps, {name: o.learning_rate for name, o in compared.items()})
    rows = all_statistics(values)
    sentences, drift = verdict(rows), accumulated(steps["SGD"], compared["SGD"])
    filters = steps["SGD"].radius.shape[1]
    title = (
        f"{args.model} on {args.dataset}, batches of {protocol.BATCH_SIZE}: all {filters:,} filters "
        f"in the first {args.steps:,} steps, {filters * args.steps:,} values each"
    )
    console = Console()
    console.print(table(rows, title))
    for key, sentence in sentences.items():
        console.print(f"{QUANTITIES[key].label}: {sentence}", highlight=False, markup=False)
    console.print(
        f"radius of SGD by Theorem 4 after {args.steps} steps: off by {drift['median']:.1e} in the "
        f"median, at most {drift['max']:.1e} (relative)",
        highlight=False,
    )

    if args.out:
        limit = f" --limit {args.limit}" if args.limit else ""
        content = {
            "command": f"python -m benchmarks.assumptions --dataset {args.dataset} --data-dir DIR "
            f"--model {args.model} --steps {args.steps}{limit} --out FOLDER",
            "environment": report.environment(),
            "filters": filters,
            "steps": args.steps,
            "first_steps": FIRST_STEPS,
            "batch_size": protocol.BATCH_SIZE,
            "seed": SEED,
            "optimizers": {
                name: {"learning_rate": o.learning_rate, "l2": o.weight_decay}
                for name, o in compared.items()
            },
            "verdict": sentences,
            "quantities": {
                key: {"meaning": QUANTITIES[key].meaning, **by_name}
                for key, by_name in rows.items()
            },
            "radius_of_sgd_by_theorem_4_relative_error_after_all_steps": drift,
        }
        report.write_json(args.out / "assumptions.json", content)
        figure(values, sentences, title, args.out / "assumptions.png")
        console.print(f"written: {args.out}/assumptions.json, .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

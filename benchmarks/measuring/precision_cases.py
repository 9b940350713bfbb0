"""What `benchmarks.precision` computes, from inputs that are the same everywhere.

The inputs of optimizers and geometry are random numbers that bfloat16 holds exactly, so that both dtypes
have one reference, and that no last digit of NumPy's logarithms can be seen in them.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import spherical_optax as so
from benchmarks.training.data import SOURCES, Dataset, Split
from benchmarks.training.methods import OPTIMIZERS, make_optimizer
from benchmarks.training.models import MODELS
from benchmarks.training.normalization import BatchNorm
from benchmarks.training.trainer import Trainer

STEPS, RATE, B2, DECAY = 20, 1e-2, 0.99, 5e-4
BATCH, TRAINING_RATE = 64, 1e-3
SHAPES = {
    "conv1": (3, 3, 8, 16),
    "conv2": (3, 3, 8, 16),  # two, for `so.stacked` to put together
    "dense": {"kernel": (32, 48), "bias": (48,)},
    "head": (32, 4, 8),
    "scale": (16,),
}
SPHERES = {
    "conv1": so.Sphere(),
    "conv2": so.Sphere(),
    "dense": {name: so.Sphere((), tie="dense") for name in ("kernel", "bias")},
    "head": so.Sphere((1,)),
    "scale": None,
}
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}  # of `so.find_spheres`, the latter as it documents

Arrays = Mapping[str, np.ndarray]
Values = Mapping[str, Arrays]  # by row, then by the name of the array


class Row(NamedTuple):
    """How one row of the table is judged.

    `floors` by dtype: deviations that pass whatever the CPU's are; without one, there is nothing to
    measure. `coarse` is that of float32 where factors of products are rounded to TF32. `natural`: the
    size that a deviation is relative to where the reference is smaller. `zero`: the reference is zero.
    `like`: the row whose reference this one has.
    """

    floors: Mapping[str, float]
    coarse: float | None = None
    natural: float = 0.0
    zero: bool = False
    like: str = ""


class Case(NamedTuple):
    """A program, for each of the dtypes that its rows have floors for."""

    compute: Callable[[str], Values]
    rows: Mapping[str, Row]
    products: str | None = "highest"  # their precision; None: as the device has it
    reference: str = "float64"  # the dtype of the reference


# CUDA's powf may be wrong by 4 units in the last place (its documentation), which is 2.4e-5 of 1 - b2^t
# at the first step. So much put into it on a CPU made 7e-6 of Adam's displacement, without it 8e-7.
# bfloat16 has 8 binary digits: one rounding is up to 2^-9 of a number, four are 2^-7.
STEPPED = Row({"float32": 1e-5, "bfloat16": 2**-7})
# Sums of 1584 products, roots, sines: 16 units in the last place.
GEOMETRY = Row({"float32": 2e-6, "bfloat16": 2**-7})
# TF32 has 11 binary digits: factors rounded so on a CPU made 1.2e-3 of MuonH's displacement.
MUON = STEPPED._replace(coarse=5e-3, like="muonh")
# The package's own bounds on what rounding leaves; and 0.01, for the least figure off the spheres. The
# probes may be other points on another device: in ten tries on a CPU the largest and the least figure
# changed by factors of two and of eight, and no verdict did.
FIGURES = Row({"float32": 2e-4, "bfloat16": 5e-2}, natural=1.0, zero=True)
CHANGES = Row({"float32": 1e-3, "bfloat16": 0.15}, natural=1.0, zero=True)
CLOSE = Row({"float32": 1.0, "bfloat16": 5.0}, natural=1.0, zero=True)
VERDICTS = Row({"float32": 0.0, "bfloat16": 0.0})
# A ReLU that rounding switches is about 4e-3 of a gradient that 65,536 random pixels make, so that the
# losses are not smooth. Errors of 1e-7 in the first parameters made up to 1.5e-6 of them, of 1e-5
# 2.1e-5; factors in TF32 8e-5, activations in bfloat16 2e-4; 1.01 times this learning rate 5.4e-5.
LOSSES = Row({"float32": 3e-5})
FEW_LOSSES = Row({"float32": 3e-5, "bfloat16": 5e-4}, like="training")
DEFAULT_LOSSES = FEW_LOSSES._replace(coarse=4e-4)


@functools.cache
def make_inputs(seed: int, *steps: int) -> Any:
    """A tree of normal numbers: parameters, a tenth in size, or with `steps` gradients, of size 1.

    With a tenth of that, SGD moved by few units of bfloat16: 0.18 of that displacement was rounding.
    """
    rng, size = np.random.default_rng(seed), 1.0 if steps else 0.1

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return (size * rng.standard_normal((*steps, *shape))).astype(jnp.bfloat16)

    return jax.tree.map(normal, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def compute_checksum() -> int:
    """With other inputs than those of the reference, every comparison would be void."""
    arrays = [
        *jax.tree.leaves((make_inputs(0), make_inputs(1, STEPS), make_inputs(2))),
        *make_images(),
    ]
    return functools.reduce(lambda crc, x: zlib.crc32(x.tobytes(), crc), arrays, 0)


def put_on_device(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def name_arrays(tree: Any) -> dict[str, np.ndarray]:
    """By path, in float64."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64)
        for path, x in jax.tree.leaves_with_path(tree)
    }


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
    """Where the parameters start and end, and the last state; one compiled scan."""

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


# --- spheres ----------------------------------------------------------------------------------


class Network(nn.Module):
    """Convolutions with BatchNorm, a dense layer with LayerNorm, attention with QK normalisation."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
        for _ in range(2):
            x = nn.relu(norm()(nn.Conv(8, (3, 3), 2, use_bias=False, dtype=self.dtype)(x)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = nn.LayerNorm(dtype=self.dtype)(nn.Dense(16, dtype=self.dtype)(x))
        attention = functools.partial(nn.MultiHeadDotProductAttention, 2, normalize_qk=True)
        x = x + attention(use_bias=False, dtype=self.dtype)(x)
        return nn.Dense(10, dtype=self.dtype)(x.mean(1))


def make_network(dtype: str) -> tuple[Callable[[Any], Any], Any]:
    """A function of the parameters and these, in float32; `dtype` is that of the activations."""
    rng, net = np.random.default_rng(5), Network(jnp.dtype(dtype))
    x = rng.standard_normal((16, 12, 12, 3)).astype(np.float32)
    shapes: Any = jax.eval_shape(net.init, jax.random.key(0), x)

    def parameter(path: Any, like: Any) -> jax.Array:
        fan_in = np.prod(like.shape[:-1]) if like.ndim > 1 else 100
        value = fan_in**-0.5 * rng.standard_normal(like.shape)
        return jnp.asarray(value + (path[-1].key == "scale"), jnp.float32)

    def fn(params: Any) -> Any:
        variables = shapes | {"params": params}
        return net.apply(variables, x, mutable=["batch_stats"])[0]

    shapes["batch_stats"] = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes["batch_stats"])
    return fn, jax.tree.map_with_path(parameter, shapes["params"])


def measure_discovery(dtype: str) -> Values:
    fn, params = make_network(dtype)
    tol = TOLERANCE[dtype]
    survey = so.survey_spheres(fn, params, key=jax.random.key(0), tol=tol)
    report = so.check_spheres(fn, params, survey.spheres, key=jax.random.key(1))
    verdicts = {f.path: f"{f.sphere}, {f.verdict}" for f in survey.findings}
    verdicts |= {"check_spheres": "ok" if report.ok else str(report)}
    on = {f.path: max(f.natural, f.large) for f in survey.findings if f.sphere is not None}
    off = {f.path: tol / f.natural for f in survey.findings if f.verdict == "no"}
    return {
        "find_spheres: verdicts": {name: np.asarray(text) for name, text in verdicts.items()},
        "find_spheres: figures on spheres": name_arrays(on),
        "find_spheres: tol / figures off": name_arrays(off),
        "check_spheres: changes of outputs": name_arrays({c.path: c.change for c in report.checks}),
    }


DISCOVERY = {
    "find_spheres: verdicts": VERDICTS,
    "find_spheres: figures on spheres": FIGURES,
    "find_spheres: tol / figures off": CLOSE,
    "check_spheres: changes of outputs": CHANGES,
}


# --- training ---------------------------------------------------------------------------------


@functools.cache
def make_images() -> tuple[np.ndarray, np.ndarray]:
    rng, n = np.random.default_rng(6), 4 * BATCH
    pixels = rng.integers(0, 256, (n, *SOURCES["cifar10"].shape), np.uint8)
    return pixels, rng.integers(0, 10, n).astype(np.int32)


def measure_losses(what: str, dtype: str, few_kernels: bool = False) -> Values:
    """Of four steps; `dtype` is that of the activations.

    With `few_kernels` by the program that `training.build.make_trainer` makes for accelerators.
    """
    x, y = make_images()
    few = Split(x[:1], y[:1])
    data = Dataset(SOURCES["cifar10"], Split(x, y), few, few)
    norm = BatchNorm if few_kernels else nn.BatchNorm
    net = MODELS["resnet8"](10, dtype=jnp.dtype(dtype), norm=norm)
    init = functools.partial(net.init, train=False)
    shapes: Any = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *x.shape[1:])))
    spheres = so.spheres_where(shapes["params"], "Conv")

    def make(spheres: Any) -> optax.GradientTransformation:
        return so.adamsrt(TRAINING_RATE, spheres, b2=B2, weight_decay=DECAY)

    tx = so.stacked(make, spheres) if few_kernels else make(spheres)
    trainer = Trainer(net, data, tx, BATCH, scan=True, devices=jax.devices()[:1])
    _, found, _ = trainer.train_epoch(trainer.init(0), 0, 0)
    return {what: name_arrays({f"step {i}": loss for i, loss in enumerate(found)})}


def list_cases() -> dict[str, Case]:
    """In the order of the table."""
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

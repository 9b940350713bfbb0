"""The cases of `benchmarks.precision` that need a network: spheres that are found, and training."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import spherical_optax as so
from benchmarks.measuring.precision_inputs import (
    BATCH,
    Values,
    make_images,
    name_arrays,
)
from benchmarks.training.data import SOURCES, Dataset, Split
from benchmarks.training.models import MODELS
from benchmarks.training.normalization import BatchNorm
from benchmarks.training.trainer import Trainer

TRAINING_RATE, B2, DECAY = 1e-3, 0.99, 5e-4
TOLERANCE = {
    "float32": 1e-2,
    "bfloat16": 5e-2,
}  # of `so.find_spheres`; its documentation gives that for bfloat16


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
    """A function of the parameters, and parameters in float32; `dtype` is that of the activations."""
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


def measure_losses(what: str, dtype: str, few_kernels: bool = False) -> Values:
    """The losses of four training steps; `dtype` is that of the activations.

    `few_kernels` trains by the program that `training.build.make_trainer` makes for accelerators.
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

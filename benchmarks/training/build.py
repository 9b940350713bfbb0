"""Finds the filters that are on spheres, and builds the trainer of a run."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import spherical_optax as so
from benchmarks.cli import DTYPES
from benchmarks.training import recipes
from benchmarks.training.data import Dataset
from benchmarks.training.methods import make_optimizer
from benchmarks.training.models import MODELS
from benchmarks.training.normalization import BatchNorm
from benchmarks.training.trainer import Trainer, count_steps, init_variables

BATCH_SIZE = 16


@functools.cache
def find_filter_spheres(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    """Measures on noise, with BatchNorm in training mode, which parameters are on spheres."""
    images = jax.random.normal(jax.random.key(0), (BATCH_SIZE, *image_shape))
    variables = init_variables(model, image_shape, seed=1)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def logits(params: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    return so.find_spheres(logits, params, key=jax.random.key(2))


def make_trainer(
    data: Dataset,
    model: str,
    optimizer: str,
    values: recipes.Hyperparameters,
    epochs: int,
    batch_size: int,
    dtype: str = DTYPES[0],
    devices: Sequence[Any] | None = None,
    few_kernels: bool | None = None,
) -> Trainer:
    """A trainer whose compiled program takes learning rate and weight decay as arguments.

    `few_kernels`, the default on accelerators, computes the same up to rounding with fewer kernels, each
    of which costs a launch: BatchNorm's sums are computed in pairs, and the optimizer's small arrays are
    stacked. On ResNet-20 a training step with AdamSRT has 325 kernels instead of 443, and one with Adam
    292 instead of 388 (`python -m benchmarks.kernels --training resnet20`, JAX 0.11). CPUs keep the
    program of the published results.
    """
    if few_kernels is None:
        few_kernels = jax.default_backend() != "cpu"
    steps = epochs * count_steps(data, batch_size)
    # The spheres are found in float32, whatever the dtype of the training.
    spheres = find_filter_spheres(MODELS[model](data.source.num_classes), data.source.shape)
    norm = BatchNorm if few_kernels else nn.BatchNorm
    net = MODELS[model](data.source.num_classes, dtype=jnp.dtype(dtype), norm=norm)

    def build(learning_rate: Any, weight_decay: Any = 0.0) -> optax.GradientTransformation:
        schedule = recipes.make_schedule(learning_rate, steps)

        def make(spheres: Any) -> optax.GradientTransformation:
            return make_optimizer(optimizer, schedule, spheres, values.b2, weight_decay)

        # The methods since the paper may depend on the shapes of matrices, which a stack changes.
        stack = few_kernels and optimizer in recipes.PAPER_METHODS
        return so.stacked(make, spheres) if stack else make(spheres)

    hyperparams = recipes.select_injected(values)
    static = {"weight_decay"} - hyperparams.keys()
    tx = optax.inject_hyperparams(build, static_args=static)(**hyperparams)
    return Trainer(net, data, tx, batch_size, devices=devices)

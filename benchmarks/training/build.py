"""What a run is made of: the filters that are on spheres, found by measurement, and the trainer."""

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
    """Measured on noise, with BatchNorm in training mode."""
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
    """Learning rate and weight decay are arguments of its compiled program (`recipes.select_injected`).

    `few_kernels`, by default on accelerators, computes the same up to rounding with fewer kernels, each
    of which costs its launch there: BatchNorm's sums are computed in pairs, and the optimizer's small
    arrays are stacked. On ResNet-20, a step of AdamSRT has 325 in place of 443, and one of Adam 292 in
    place of 388 (`python -m benchmarks.kernels --training resnet20`). CPUs keep the program of the
    published results.
    """
    if few_kernels is None:
        few_kernels = jax.default_backend() != "cpu"
    steps = epochs * count_steps(data, batch_size)
    # What is invariant is measured in float32.
    spheres = find_filter_spheres(MODELS[model](data.source.num_classes), data.source.shape)
    norm = BatchNorm if few_kernels else nn.BatchNorm
    net = MODELS[model](data.source.num_classes, dtype=jnp.dtype(dtype), norm=norm)

    def build(learning_rate: Any, weight_decay: Any = 0.0) -> optax.GradientTransformation:
        schedule = recipes.make_schedule(learning_rate, steps)

        def make(spheres: Any) -> optax.GradientTransformation:
            return make_optimizer(optimizer, schedule, spheres, values.b2, weight_decay)

        # Those since the paper may go by the shapes of matrices, which a stack does not keep.
        stack = few_kernels and optimizer in recipes.PAPER_METHODS
        return so.stacked(make, spheres) if stack else make(spheres)

    hyperparams = recipes.select_injected(values)
    static = {"weight_decay"} - hyperparams.keys()
    tx = optax.inject_hyperparams(build, static_args=static)(**hyperparams)
    return Trainer(net, data, tx, batch_size, devices=devices)

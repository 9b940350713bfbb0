"""The paper's training protocol: its schedule and the hyper-parameters that its search found."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH_SIZE = 128
MOMENTUM = 0.9
EPOCHS = 405
MILESTONES = (135, 225, 315)

LEARNING_RATES = {
    "adam": 1e-3,
    "adamw": 1e-3,
    "adamg": 1e-2,
    "adams": 1e-3,
    "adamst": 1e-3,
    "adamsrt": 1e-3,
    "sgd": 1e-1,
    "sgd_mrt": 1e-1,
    "adamg_star": 1e-1,
}

# (data set, model) -> optimizer -> (b2, weight decay); SGD has no b2.
_SEARCHED: dict[tuple[str, str], dict[str, tuple[float | None, float]]] = {
    ("cifar10", "resnet20"): {
        "adam": (0.99, 5e-4),
        "adamw": (0.99, 1e-2),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 5e-4),
        "adamsrt": (0.99, 7.8125e-6),
        "sgd": (None, 2.5e-4),
        "sgd_mrt": (None, 3.125e-5),
    },
    ("cifar10", "resnet18"): {
        "adam": (0.999, 7.8125e-6),
        "adamw": (0.99, 6.25e-5),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 1.5625e-5),
        "adamsrt": (0.99, 7.8125e-6),
        "sgd": (None, 2.5e-4),
        "sgd_mrt": (None, 2.5e-4),
    },
    ("cifar10", "vgg16"): {
        "adam": (0.999, 3.125e-5),
        "adamw": (0.999, 2.5e-4),
        "adamg": (0.999, 5e-4),
        "adams": (0.999, 3.125e-5),
        "adamsrt": (0.999, 1.5625e-5),
        "sgd": (None, 2.5e-4),
        "sgd_mrt": (None, 6.25e-5),
    },
    ("cifar100", "resnet18"): {
        "adam": (0.999, 1.25e-4),
        "adamw": (0.99, 1.25e-4),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 1.25e-4),
        "adamsrt": (0.999, 0.0),
        "sgd": (None, 5e-4),
        "sgd_mrt": (None, 5e-4),
    },
    ("cifar100", "vgg16"): {
        "adam": (0.99, 6.25e-5),
        "adamw": (0.99, 1.5625e-5),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 6.25e-5),
        "adamsrt": (0.99, 7.8125e-6),
        "sgd": (None, 5e-4),
        "sgd_mrt": (None, 1.25e-4),
    },
    ("svhn_cropped", "resnet18"): {
        "adam": (0.999, 0.0),
        "adamw": (0.999, 7.8125e-6),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 3.125e-5),
        "adamsrt": (0.999, 7.8125e-6),
        "sgd": (None, 5e-4),
        "sgd_mrt": (None, 5e-4),
    },
    ("svhn_cropped", "vgg16"): {
        "adam": (0.99, 0.0),
        "adamw": (0.99, 3.125e-5),
        "adamg": (0.99, 5e-4),
        "adams": (0.99, 7.8125e-6),
        "adamsrt": (0.999, 2.5e-4),
        "sgd": (None, 5e-4),
        "sgd_mrt": (None, 3.125e-5),
    },
}
# The paper publishes no column of its own for these: they start from a relative's.
_SAME_AS = {"adamst": "adamsrt", "adamg_star": "sgd"}
_DEFAULT_COLUMN = ("cifar10", "resnet20")


class Hyperparameters(NamedTuple):
    learning_rate: float
    b2: float | None
    weight_decay: float


def hyperparameters(dataset: str, model: str, optimizer: str) -> Hyperparameters:
    """The paper's values; a combination that it did not train gets those of CIFAR-10, ResNet20."""
    column = _SEARCHED.get((dataset, model), _SEARCHED[_DEFAULT_COLUMN])
    b2, weight_decay = column[_SAME_AS.get(optimizer, optimizer)]
    return Hyperparameters(LEARNING_RATES[optimizer], b2, weight_decay)


def step_schedule(learning_rate: float, total_steps: int) -> optax.Schedule:
    """x 0.1 at epochs 135, 225 and 315 of 405, scaled to `total_steps`."""
    # Rounded up: never before the first step.
    milestones = np.array([-(-total_steps * m // EPOCHS) for m in MILESTONES], np.int32)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        passed = (jnp.reshape(count, 1) >= milestones).sum(dtype=jnp.float32)
        return learning_rate * 0.1**passed

    return schedule

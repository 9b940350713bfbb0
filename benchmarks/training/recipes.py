"""The recipes: the paper's schedule, the columns of its Table 2, the hyper-parameters of its search.

The hyper-parameters of Adam w/o (ab) were never released. It gets those of Adam w/o (abc).
"""

from collections.abc import Sequence
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
    "adamp": 1e-3,
    "sgdp": 1e-2,
    "adamh": 1e-3,  # radians per step, as for muonh
    "muonh": 1e-3,
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
# The paper has no hyper-parameters for these methods: each gets those of a related method.
_SAME_AS = {
    "adamst": "adamsrt",
    "adamg_star": "sgd",
    "adamp": "adamw",
    "sgdp": "sgd",
    "adamh": "adamw",
    "muonh": "adamw",
}
_DEFAULT_COLUMN = ("cifar10", "resnet20")


class Column(NamedTuple):
    """The data, network and number of epochs that all methods of a column of Table 2 share."""

    dataset: str
    model: str
    images: int | None = None  # of the training set, after the validation images have left it
    epochs: int = EPOCHS


COLUMNS = {
    f"{dataset}/{model}": Column(dataset, model)
    for dataset, models in {
        "cifar10": ("resnet20", "resnet18", "vgg16"),
        "cifar100": ("resnet18", "vgg16"),
        "svhn_cropped": ("resnet18", "vgg16"),
    }.items()
    for model in models
} | {
    # Our own column, for two CPU cores: the network is small, but can fit so few images. The paper's
    # methods only differ where a network fits its images.
    "cifar10-16/resnet8": Column("cifar10-16", "resnet8", images=5000, epochs=75),
}
# In the order of the paper's table; SGD-M is ours.
PAPER_METHODS = ("adam", "adamw", "adamg", "adams", "adamst", "adamsrt", "sgd")
SINCE_THE_PAPER = ("adamp", "sgdp", "adamh", "muonh")  # published by others

# The grid for columns without published values: for every method the same multiples of its learning rate
# and two L2 coefficients. A decay outside the gradient is 20 times as large: in the paper the default of
# AdamW is 1e-2, and that of the other methods 5e-4. The methods on a hyperball have no decay.
GRID_RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
GRID_DECAYS = (6.25e-5, 5e-4)
DECOUPLED = {"adamw": 20.0, "adamp": 20.0}
GRID_SEED = 100  # no seed of the table; the grid never looks at the test images


def list_grid(
    method: str,
    b2: float = 0.99,
    rates: Sequence[float] = GRID_RATES,
    decays: Sequence[float] = GRID_DECAYS,
) -> list["Hyperparameters"]:
    """`rates` are multiples of the published one, `decays` L2 coefficients."""
    decays = (0.0,) if method in ("adamh", "muonh") else decays
    return [
        Hyperparameters(
            rate * LEARNING_RATES[method],
            None if method in ("sgd", "sgdp") else b2,
            DECOUPLED.get(method, 1.0) * decay,
        )
        for rate in rates
        for decay in decays
    ]


def rank(validation_accuracy: float, train_loss: float) -> tuple[float, float]:
    """Orders the cells of a grid by validation accuracy, and equal ones by lower training loss."""
    return validation_accuracy, -train_loss


class Hyperparameters(NamedTuple):
    learning_rate: float
    b2: float | None
    weight_decay: float


def select_injected(values: Hyperparameters) -> dict[str, float]:
    """The values that a compiled program takes as arguments: one program serves all cells of a grid.

    A decay of zero is a constant, so that XLA leaves its arithmetic out. b2 is a constant too: 1 - b2
    rounds differently in a program that does not know b2.
    """
    found = {"learning_rate": values.learning_rate, "weight_decay": values.weight_decay}
    return {name: value for name, value in found.items() if name == "learning_rate" or value}


def get_hyperparameters(dataset: str, model: str, optimizer: str) -> Hyperparameters:
    """The paper's values; combinations that it did not train get those of CIFAR-10, ResNet20."""
    column = _SEARCHED.get((dataset, model), _SEARCHED[_DEFAULT_COLUMN])
    relative = _SAME_AS.get(optimizer, optimizer)
    if optimizer not in LEARNING_RATES or relative not in column:
        raise ValueError(
            f"{optimizer}: no hyper-parameters; add it to LEARNING_RATES and _SAME_AS in {__name__}"
        )
    b2, weight_decay = column[relative]
    return Hyperparameters(LEARNING_RATES[optimizer], b2, weight_decay)


def count_full_rate_epochs(epochs: int) -> int:
    """The number of epochs before the first milestone."""
    return max(epochs * MILESTONES[0] // EPOCHS, 1)


def make_schedule(learning_rate: float, total_steps: int) -> optax.Schedule:
    """Multiplies the rate by 0.1 at epochs 135, 225 and 315 of 405, scaled to `total_steps`."""
    # Rounded up, because no milestone may come before the first step.
    milestones = np.array([-(-total_steps * m // EPOCHS) for m in MILESTONES], np.int32)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        passed = (jnp.reshape(count, 1) >= milestones).sum(dtype=jnp.float32)
        return learning_rate * 0.1**passed

    return schedule

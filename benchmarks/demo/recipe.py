"""What `make demo` trains: a small ResNet on 200 of scikit-learn's digits, by seven methods."""

from dataclasses import asdict, dataclass
from typing import Any

from flax import linen as nn

from benchmarks.training import build, recipes
from benchmarks.training.data import DIGITS_TRAIN, DIGITS_VALIDATION, Dataset
from benchmarks.training.models import MODELS
from benchmarks.training.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """The values that all methods share; only the learning rate differs between methods."""

    epochs: int = 60
    batch_size: int = 50
    b2: float = 0.99
    l2: float = 5e-4  # inside the gradient: Adam, AdamS, AdamST, AdamSRT, SGD-M, AdamG off spheres
    decoupled_decay: float = 1e-2  # AdamW

    def describe(self) -> dict[str, Any]:
        return {
            "dataset": "digits",
            "training_images": DIGITS_TRAIN,
            "validation_images": DIGITS_VALIDATION,
            "model": "digits",
            "schedule": "learning rate x 0.1 after 1/3, 5/9 and 7/9 of the epochs",
            **asdict(self),
        }


RECIPE = Recipe()


def make_model(data: Dataset) -> nn.Module:
    return MODELS["digits"](data.source.num_classes)


def make_trainer(name: str, learning_rate: float, data: Dataset) -> Trainer:
    weight_decay = RECIPE.decoupled_decay if name == "adamw" else RECIPE.l2
    values = recipes.Hyperparameters(learning_rate, RECIPE.b2, weight_decay)
    return build.make_trainer(data, "digits", name, values, RECIPE.epochs, RECIPE.batch_size)

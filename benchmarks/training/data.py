"""The data sets by name, as uint8 images in memory, split into train, validation and test.

`digits` ships with scikit-learn. The other data sets are read from a folder that holds NAME.npz or a
TensorFlow Datasets folder NAME/VERSION (array_record format; TensorFlow itself is not needed). Without
a folder, TensorFlow Datasets downloads them. `cifar10-16` is CIFAR-10 averaged down to 16 x 16.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.cli import to_one_line

VALIDATION_FRACTION = 0.05  # of the training set, as in the paper
DIGITS_TRAIN, DIGITS_VALIDATION = 200, 400  # so few training images leave methods room to differ
SPLIT_SEED = 0  # every run of every method holds out the same images


class DataError(ValueError):
    """A data set is unknown, missing, corrupt or too small; the message is one line."""


@dataclass(frozen=True)
class Source:
    """The properties of a data set; hashable, because jit takes it as a static argument."""

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int  # in pixels, before random crops; 0: no augmentation
    of: str = ""  # the data set whose pixels are averaged to make this one


class Split(NamedTuple):
    images: Any  # (n, height, width, channels) uint8, of NumPy or of JAX
    labels: Any  # (n,) int32


class Dataset(NamedTuple):
    source: Source
    train: Split
    validation: Split
    test: Split


# Means and standard deviations of the training images in [0, 1]. The paper does not normalise SVHN.
_CIFAR = (32, 32, 3)
SOURCES = {
    source.name: source
    for source in (
        Source("digits", (8, 8, 1), 10, (0.3053,), (0.3759,), 0),
        Source("cifar10", _CIFAR, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4),
        Source("cifar100", _CIFAR, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4),
        Source("svhn_cropped", _CIFAR, 10, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0),
        Source(
            name="cifar10-16",
            shape=(16, 16, 3),
            num_classes=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2381, 0.2347, 0.2536),
            padding=0,  # no augmentation: a network for a CPU does not fit augmented images
            of="cifar10",
        ),
    )
}


# Numbers of training and test images, for data sets that need a download.
SIZES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn_cropped": (73_257, 26_032),
}


def compute_fingerprint(data: Dataset) -> str:
    """SHA-256 of all images and labels: it differs between data sets with the same name."""
    digest = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        for array in split:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load(name: str, data_dir: Path | None = None, limit: int | None = None) -> Dataset:
    """The data set `name`; `limit` keeps only the first images of its training set."""
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"unknown data set {name!r}; the known ones are {', '.join(SOURCES)}")
    if name == "digits":
        return _load_digits(source, limit)
    train, test = (
        _average_pixels(split, source) for split in _read(SOURCES[source.of or name], data_dir)
    )
    return _hold_out_validation(source, Split(*(array[:limit] for array in train)), test)


def make_random_images(name: str) -> Dataset:
    """Noise instead of images, as many as the data set has: to compile programs and to time them."""
    source = SOURCES[name]
    if name == "digits":
        return load(name)
    rng = np.random.default_rng(0)

    def noise(n: int) -> Split:
        images = rng.integers(0, 256, (n, *source.shape), np.uint8)
        return Split(images, rng.integers(0, source.num_classes, n, np.int32))

    return _hold_out_validation(source, *map(noise, SIZES[source.of or name]))


def _hold_out_validation(source: Source, train: Split, test: Split) -> Dataset:
    held_out = max(1, round(VALIDATION_FRACTION * len(train.labels)))
    validation, train = _split_shuffled(train, held_out)
    return Dataset(source, train, validation, test)


def _average_pixels(split: Split, source: Source) -> Split:
    (n, width), height = split.images.shape[:2], source.shape[0]
    if width == height:
        return split
    cells = split.images.reshape(n, height, width // height, height, width // height, -1)
    return Split(np.round(cells.mean((2, 4), np.float32)).astype(np.uint8), split.labels)


def _load_digits(source: Source, limit: int | None) -> Dataset:
    pixels, labels = load_digits(return_X_y=True)
    # Grey levels 0..16 become 0..255, like every other image here.
    images = np.round(pixels.reshape(-1, *source.shape) * (255 / 16)).astype(np.uint8)
    everything = Split(images, labels.astype(np.int32))
    train, validation, test = _split_shuffled(everything, DIGITS_TRAIN, DIGITS_VALIDATION)
    return Dataset(source, Split(*(array[:limit] for array in train)), validation, test)


def _split_shuffled(split: Split, *sizes: int) -> list[Split]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(split.labels))
    parts = np.split(order, np.cumsum(sizes))
    return [Split(*(array[part] for array in split)) for part in parts]


def _read(source: Source, data_dir: Path | None) -> tuple[Split, Split]:
    if data_dir is None:
        return _read_tfds(source, None)
    npz = data_dir / f"{source.name}.npz"
    if npz.exists():
        return _read_npz(source, npz)
    for folder in (data_dir, data_dir / "tfds"):
        if (folder / source.name).is_dir():
            return _read_tfds(source, folder)
    raise DataError(f"{data_dir} holds neither {npz.name} nor a TFDS folder {source.name}/")


def _read_npz(source: Source, path: Path) -> tuple[Split, Split]:
    try:
        with path.open("rb") as file:  # np.load leaves a file that it cannot read open
            found = np.load(file, allow_pickle=False)
            arrays = {key: found[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except KeyError as error:
        raise DataError(f"{path}: has no array {error.args[0].split()[0]}") from error
    except (OSError, EOFError, ValueError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or not an npz file ({to_one_line(error)})") from error
    return (
        _check(source, arrays["x_train"], arrays["y_train"], f"{path}: train"),
        _check(source, arrays["x_test"], arrays["y_test"], f"{path}: test"),
    )


def _read_tfds(source: Source, data_dir: Path | None) -> tuple[Split, Split]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{source.name} needs tensorflow-datasets: {to_one_line(error)}") from error
    where = f"TFDS folder {data_dir}" if data_dir else "TFDS download"
    try:
        splits = tfds.data_source(
            source.name,
            split=("train", "test"),
            data_dir=data_dir,
            download=data_dir is None,
        )
        train, test = (list(split) for split in splits)
    except Exception as error:  # readers, decoders and downloaders share no narrower class
        raise DataError(f"{where}: cannot read {source.name} ({to_one_line(error)})") from error
    return (
        _check(source, *_stack(train), f"{where}: train"),
        _check(source, *_stack(test), f"{where}: test"),
    )


def _stack(examples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    # TFDS writes records in a hashed order; where they carry an id, it restores the original one.
    if examples and "id" in examples[0]:
        examples = sorted(examples, key=lambda example: example["id"])
    images = np.array([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples])


def _check(source: Source, images: np.ndarray, labels: np.ndarray, where: str) -> Split:
    if images.dtype != np.uint8 or images.shape[1:] != source.shape:
        raise DataError(
            f"{where}: expected uint8 images of shape (n, {', '.join(map(str, source.shape))}), "
            f"found {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1]:
        raise DataError(f"{where}: {len(images)} images but labels of shape {labels.shape}")
    if not len(labels):
        raise DataError(f"{where}: no images")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= source.num_classes:
        raise DataError(f"{where}: labels must be integers from 0 to {source.num_classes - 1}")
    return Split(images, labels.astype(np.int32))

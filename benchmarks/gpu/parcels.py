"""A data set in two halves, small enough to travel one at a time, without loss.

CIFAR-10 has 176 MiB as an npz file and 97 MiB as the lossless WebP images of this module. One call to
the GPU's machine carries 64 MiB. Therefore each of the two calls carries one half:

    a/, b/              000.webp, ...: strips of STRIP images, one above the other
                        labels.npy
                        about.json: what the half belongs to, and the SHA-256 of its images
"""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from benchmarks.cli import to_one_line

HALVES = ("a", "b")
STRIP = 500  # images of 32 rows; a WebP image has at most 16,383 rows
ABOUT = "about.json"


class ParcelError(ValueError):
    """A half is missing or damaged; the message is one line."""


def pack(npz: Path, folder: Path) -> None:
    """Writes both halves of NAME.npz, which has the arrays that training/data.py reads."""
    try:
        with np.load(npz, allow_pickle=False) as arrays:
            images = np.concatenate([arrays["x_train"], arrays["x_test"]])
            labels = np.concatenate([arrays["y_train"].ravel(), arrays["y_test"].ravel()])
            train = len(arrays["y_train"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ParcelError(f"{npz}: is no data set ({to_one_line(error)})") from error
    middle = -(-len(images) // (2 * STRIP)) * STRIP
    parts = zip(HALVES, np.split(images, [middle]), np.split(labels, [middle]), strict=True)
    for half, some, their in parts:
        about = {"file": npz.name, "train": train, "of": len(images), "sha256": _sha256(some)}
        place = folder / half
        if _read_about(place) == about and _is_whole(place):
            continue
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        strips = [some[i : i + STRIP] for i in range(0, len(some), STRIP)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_save, strips, (place / f"{i:03}.webp" for i in range(len(strips)))))
        np.save(place / "labels.npy", their)
        (place / ABOUT).write_text(json.dumps(about), "utf-8")


def unpack(folder: Path, out: Path) -> Path:
    """Writes the npz file; raises ParcelError unless both halves are there and whole."""
    found = [_read_half(folder / half) for half in HALVES]
    first = found[0][0]
    if any(about["file"] != first["file"] for about, *_ in found):
        raise ParcelError(f"{folder}: the halves are of different data; prepare them again")
    images = np.concatenate([some for _, some, _ in found])
    labels = np.concatenate([their for *_, their in found])
    if len(images) != first["of"]:
        raise ParcelError(f"{folder}: {len(images)} of {first['of']} images; prepare them again")
    out.mkdir(parents=True, exist_ok=True)
    n, npz = first["train"], out / first["file"]
    np.savez(npz, x_train=images[:n], y_train=labels[:n], x_test=images[n:], y_test=labels[n:])
    return npz


def list_missing(folder: Path) -> list[str]:
    """The names of the halves that are missing."""
    return [half for half in HALVES if _read_about(folder / half) is None]


def _read_half(place: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    about = _read_about(place)
    if about is None:
        raise ParcelError(f"{place}: this half of the data is missing")
    try:
        strips = [_load(path) for path in sorted(place.glob("*.webp"))]
        images, labels = np.concatenate(strips), np.load(place / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise ParcelError(f"{place}: cannot be read ({error})") from error
    if _sha256(images) != about["sha256"] or len(labels) != len(images):
        raise ParcelError(f"{place}: is damaged; prepare it again")
    return about, images, labels


def _is_whole(place: Path) -> bool:
    try:
        return bool(_read_half(place))
    except ParcelError:
        return False


def _read_about(place: Path) -> dict[str, Any] | None:
    try:
        return json.loads((place / ABOUT).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _save(images: np.ndarray, path: Path) -> None:
    strip = Image.fromarray(images.reshape(-1, images.shape[2], 3))
    # 1,687 bytes per image, and 25 s for all of CIFAR-10. The highest effort saves 2 % in 30 minutes.
    strip.save(path, "WEBP", lossless=True, quality=50, method=2)


def _load(path: Path) -> np.ndarray:
    with Image.open(path) as strip:
        pixels = np.asarray(strip.convert("RGB"))
    width = pixels.shape[1]
    return pixels.reshape(-1, width, width, 3)


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()

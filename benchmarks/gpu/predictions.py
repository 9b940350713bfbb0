"""Predictions for an H100, made before the first measurement on one, beside the measurements."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER = ("what", "expected", "because", "measured")


class Prediction(NamedTuple):
    what: str
    expected: str
    because: str
    measure: Callable[
        [Path], Iterator[str]
    ]  # takes a folder with results, yields a text for every device


def read_time_ratio(model: str, optimizer: str) -> Callable[[Path], Iterator[str]]:
    """Reads the time of one step as a ratio to that of optax.adam."""

    def measure(results: Path) -> Iterator[str]:
        for content in read_contents(results, f"*/speed_few_*{model}.json"):
            row = content["optimizers"].get(optimizer)
            if row:
                yield f"{row['time_ratio']:.2f} ({content['environment']['device']})"

    return measure


def read_speeds(pick: Callable[[dict[str, Any]], float | None], form: str = "{:.2f}") -> Any:
    """Reads choice.json, the measurements that decided how to train (`benchmarks.gpu.calls.choose`)."""

    def measure(results: Path) -> Iterator[str]:
        for content in read_contents(results, "*/choice.json"):
            measured = content.get("images_per_second")
            if measured and (value := pick(measured)):
                yield f"{form.format(value)} ({content['device']['device']})"

    return measure


def read_contents(results: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted(results.glob(pattern)):
        yield json.loads(path.read_text("utf-8"))


def _compare_flags(found: dict[str, Any]) -> float | None:
    plain, *others = found["flags"].values()
    return others[0] / plain if others and plain else None


def _compare_float32(found: dict[str, Any]) -> float | None:
    plain = found["flags"][""]
    return found["dtypes"].get("float32", 0.0) / plain if plain else None


def _compare_together(found: dict[str, Any]) -> float | None:
    best = max(found["flags"].values())
    return found["two processes"] / best if best else None


BYTES = "bytes moved"
LAUNCHES = "kernels launched"
PREDICTIONS = (
    Prediction("AdamSRT : Adam, GPT-2", "about 1.25", BYTES, read_time_ratio("gpt2", "so.adamsrt")),
    Prediction("AdamS : Adam, GPT-2", "0.86", BYTES, read_time_ratio("gpt2", "so.adams")),
    Prediction(
        "AdamSRT : Adam, ResNet-18",
        "1.3 to 2.0",
        LAUNCHES,
        read_time_ratio("resnet18", "so.adamsrt"),
    ),
    Prediction(
        "AdamSRT : Adam, 300 small arrays",
        "about 2.0",
        LAUNCHES,
        read_time_ratio("small", "so.adamsrt"),
    ),
    Prediction(
        "the same, stacked",
        "1.0 to 1.2",
        LAUNCHES,
        read_time_ratio("small", "so.stacked(so.adamsrt)"),
    ),
    Prediction(
        "PyTorch's fused Adam : Adam, 300 small arrays",
        "far below 1",
        "one kernel for all",
        read_time_ratio("small", "torch Adam, fused"),
    ),
    Prediction(
        "images per second, ResNet-20, AdamSRT, bfloat16",
        "50,000 to 85,000, for the 442 kernels of a step at that time (325 now)",
        "442 launches of 2.5 us, cuDNN's dearer",
        read_speeds(lambda found: found["flags"][""], "{:,.0f}"),
    ),
    Prediction(
        "convolutions in CUDA graphs, times as fast",
        "1.2 to 1.6",
        LAUNCHES,
        read_speeds(_compare_flags),
    ),
    Prediction(
        "float32 (TF32) : bfloat16",
        "0.90 to 1.05",
        "fewer kernels, more bytes",
        read_speeds(_compare_float32),
    ),
    Prediction(
        "two processes together : one",
        "1.0 to 1.7",
        "gaps between launches",
        read_speeds(_compare_together),
    ),
)


def list_rows(results: Path) -> list[tuple[str, ...]]:
    return [
        (p.what, p.expected, p.because, "; ".join(p.measure(results)) or "not yet")
        for p in PREDICTIONS
    ]

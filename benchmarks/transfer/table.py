"""The tables, as texts, from what the result file holds."""

from collections.abc import Mapping
from typing import Any

from benchmarks.reporting.intervals import Estimate
from benchmarks.transfer.findings import write_factor

PENALTY_HEADER = ("method", "narrow rate", "wide rate", "ratio of the losses")
Methods = Mapping[str, Mapping[str, Any]]  # as in the result file


def make_rates_header(methods: Methods) -> tuple[str, ...]:
    return ("method", *list_widths(methods), "per doubling")


def format_rates(methods: Methods) -> list[tuple[str, ...]]:
    """log2 of the best rate at every width, and its slope."""
    return [
        (
            row["label"],
            *(format_estimate(width["log2_best_rate"]) for width in row["widths"].values()),
            format_estimate(row["slope"]),
        )
        for row in methods.values()
    ]


def format_penalties(methods: Methods) -> list[tuple[str, ...]]:
    """The best rates of the narrowest and of the widest network, and what the first costs there."""
    rows = []
    for row in methods.values():
        rates = [row["rates"][width["best_cell"]] for width in row["widths"].values()]
        rows.append(
            (row["label"], f"{rates[0]:.3g}", f"{rates[-1]:.3g}", format_factor(row["penalty"]))
        )
    return rows


def make_losses_header(methods: Methods) -> tuple[str, ...]:
    return ("method", *list_widths(methods))


def format_losses(methods: Methods) -> list[tuple[str, ...]]:
    """The training loss and, in brackets, the validation accuracy in per cent, at the best rates."""
    return [
        (
            row["label"],
            *(
                f"{format_loss(width['loss']['mean'])} ({100 * width['accuracy']['mean']:.1f})"
                for width in row["widths"].values()
            ),
        )
        for row in methods.values()
    ]


def list_widths(methods: Methods) -> list[str]:
    return [f"width {width}" for width in next(iter(methods.values()))["widths"]]


def format_estimate(estimate: Mapping[str, float | None] | None) -> str:
    return Estimate(**replace_none(estimate)).write(2) if estimate else "-"


def format_factor(factor: Mapping[str, float | None]) -> str:
    return write_factor(replace_none(factor))


def format_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:#.3g}"  # all seeds have diverged


def replace_none(content: Mapping[str, float | None]) -> dict[str, float]:
    """The file has null for what is no finite number."""
    return {key: float("nan") if value is None else value for key, value in content.items()}

"""The tables, as texts, from the cases of a result file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.scale.optimizers import REFERENCE

Case = Mapping[str, Any]  # as in the result file
Row = tuple[str, ...]
BASE = 100  # the times per array are compared with those at this number of arrays


class Table(NamedTuple):
    title: str
    header: Row
    format_rows: Callable[[Sequence[Case]], list[Row]]


def format_sharded(cases: Sequence[Case]) -> list[Row]:
    """Memory of one device, and what the devices send one another."""
    rows = []
    for case in cases:
        about = (case["network"], str(case["devices"]), case["optimizer"])
        if "error" in case:
            rows.append((*about, case["error"], *[""] * 7))
            continue
        share = case["largest_collective_bytes"] / case["smallest_matrix_shard_bytes"]
        mib = (case[f"{name}_bytes"] / 2**20 for name in ("parameter", "state", "temporary"))
        rows.append(
            (
                *about,
                *(f"{x:,.1f}" for x in mib),
                format_collectives(case),
                f"{case['largest_collective_bytes'] / 2**10:,.1f}",
                f"{share:,.0f}" if share >= 10 else f"{share:.2g}",
                f"{case['trace_seconds']:.1f}",
                f"{case['compile_seconds']:.1f}",
            )
        )
    return rows


def format_collectives(case: Case) -> str:
    arrays, sizes = case["collective_arrays"], case["collective_bytes"]
    kinds = [f"{arrays[k]:,} {k}, {format_mib(sizes[k])} MiB" for k in sorted(arrays)]
    return "; ".join(kinds) or "none"


def format_mib(size: int) -> str:
    mib = size / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.2g}"


def format_arrays(cases: Sequence[Case]) -> list[Row]:
    """Seconds, per array beside those of BASE arrays, and beside those of optax.adamw."""
    known = {(c["optimizer"], c["arrays"]): c for c in cases if "error" not in c}

    def compare(case: Case, other: Case | None, name: str, per_array: bool) -> str:
        if other is None or not case[name] or not other[name]:
            return "-"
        arrays = other["arrays"] / case["arrays"] if per_array else 1.0
        return f"{case[name] / other[name] * arrays:.2f}"

    rows = []
    for (optimizer, arrays), case in known.items():
        base, reference = known.get((optimizer, BASE)), known.get((REFERENCE, arrays))
        row = [optimizer, f"{arrays:,}"]
        for name in ("init_seconds", "trace_seconds", "compile_seconds"):
            row.append("-" if case[name] is None else f"{case[name]:.2f}")
        for name in ("trace_seconds", "compile_seconds"):
            row.append(compare(case, base, name, per_array=True))
        for name in ("trace_seconds", "compile_seconds"):
            row.append(compare(case, reference, name, per_array=False))
        rows.append(tuple(row))
    return rows


def format_discovery(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for case in cases:
        about = (f"{case['layers']} layers of width {case['width']}",)
        if "error" in case:
            rows.append((*about, case["error"], *[""] * 6))
            continue
        arrays, parameters, peak = case["arrays"], case["parameters"], case["peak_bytes"]
        rows.append(
            (
                *about,
                f"{arrays:,}",
                f"{parameters:,}",
                "yes" if case["right"] else "no",
                f"{case['seconds']:.1f}",
                f"{1e3 * case['seconds'] / arrays:.0f}",
                f"{peak / 2**20:,.0f}",
                f"{peak / (4 * parameters):.1f}",
            )
        )
    return rows


def find_marginal_copies(cases: Sequence[Case]) -> tuple[Case, Case, float] | None:
    """The narrowest and the widest of equally many layers, and the growth of the peak between them.

    The growth is in copies of the parameters, of 4 bytes each. Compiled programs, which do not grow with
    the width, drop out.
    """
    best = None
    measured = sorted((c for c in cases if "error" not in c), key=lambda c: c["parameters"])
    for i, small in enumerate(measured):
        for large in measured[i + 1 :]:
            span = large["parameters"] - small["parameters"]
            if small["layers"] == large["layers"] and (best is None or span > best[0]):
                best = (span, small, large)
    if best is None:
        return None
    span, small, large = best
    return small, large, (large["peak_bytes"] - small["peak_bytes"]) / (4 * span)


def write_marginal_copies(cases: Sequence[Case]) -> str:
    found = find_marginal_copies(cases)
    if found is None:
        return "No two sizes have equally many layers: the growth of the peak is not known."
    small, large, copies = found
    return (
        f"From {small['parameters']:,} to {large['parameters']:,} parameters in {large['layers']} "
        f"layers, the peak grows by {copies:.2f} copies of the parameters, themselves included."
    )


SHARDED = Table(
    "One step on a mesh: MiB and collectives of one device",
    (
        "network", "devices", "optimizer", "parameters", "state", "temporary", "collectives",
        "largest, KiB", "of a shard", "trace s", "compile s",
    ),
    format_sharded,
)  # fmt: skip
ARRAYS = Table(
    f"Processor seconds by number of arrays; per array: beside {BASE} arrays; x: of {REFERENCE}",
    (
        "optimizer", "arrays", "init s", "trace s", "compile s",
        "trace per array", "compile per array", "trace x", "compile x",
    ),
    format_arrays,
)  # fmt: skip
DISCOVERY = Table(
    "so.find_spheres: processor seconds, and peak memory beyond that of the process before",
    ("network", "arrays", "parameters", "right", "s", "ms per array", "peak MiB", "copies"),
    format_discovery,
)
TABLES = {"sharded": SHARDED, "arrays": ARRAYS, "discovery": DISCOVERY}

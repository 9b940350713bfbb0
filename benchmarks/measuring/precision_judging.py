"""Judges deviations from the reference by those of a CPU and by floors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.cli import DTYPES
from benchmarks.measuring.precision_cases import Case, Row
from benchmarks.measuring.precision_inputs import Arrays, Values
from benchmarks.reporting import report

FACTOR = 4.0

# By case and dtype: arrays, or the message of the error that prevented them.
Results = Mapping[tuple[str, str], Values | str]


def measure_deviation(x: np.ndarray, reference: np.ndarray, natural: float) -> float:
    """The relative deviation of numbers; for texts 1.0 if they differ."""
    if x.shape != reference.shape:
        raise ValueError(f"shape {x.shape}, in the reference {reference.shape}")
    if x.dtype.kind == "U":
        return float(x != reference)
    size = max(float(np.linalg.norm(reference)), natural * x.size**0.5)
    return float(np.linalg.norm(x - reference)) / size


def find_largest(found: Arrays, reference: Arrays | None, natural: float) -> tuple[float, str]:
    """The largest deviation, and the name of its array; NaN is larger than any number."""
    if reference is None:
        reference = {name: np.zeros(x.shape) for name, x in found.items()}
    if found.keys() != reference.keys():
        raise ValueError(f"{sorted(found)} are not the {sorted(reference)} of the reference")
    names = list(found)
    values = [measure_deviation(found[name], reference[name], natural) for name in names]
    i = int(np.argmax(values))
    text = found[names[i]].dtype.kind == "U" and values[i]
    return values[i], names[i] + (f": {found[names[i]]}" if text else "")


def choose_floor(row: Row, dtype: str) -> float:
    coarse = dtype == "float32" and report.find_float32_products() not in ("float32", "highest")
    return row.coarse if coarse and row.coarse is not None else row.floors[dtype]


def judge(
    what: str, row: Row, dtype: str, values: Values | str, reference: Values, cpu: float
) -> dict[str, Any]:
    """Judges a row by the values of its case, or their error; `cpu` is the CPU's deviation."""
    if isinstance(values, str):
        return {"failed": values, "passes": False}
    try:
        expected = None if row.zero else reference[row.like or what]
        found, of = find_largest(values[what], expected, row.natural)
    except Exception as error:  # other arrays, other shapes, or a reference that is zero
        return {"failed": f"not as in the reference: {describe_error(error)}", "passes": False}
    bound = max(FACTOR * cpu, choose_floor(row, dtype))
    return {"deviation": found, "of": of, "bound": bound, "passes": found <= bound}


def judge_all(
    chosen: Mapping[str, Case], results: Results, reference: Values, cpu: Mapping[Any, float]
) -> list[dict[str, Any]]:
    """One row of the table for every row of every case.

    `cpu` has the recorded deviations, by row and dtype; where there is none, only the floor counts.
    """
    rows = []
    for name, case in chosen.items():
        for what, row in case.rows.items():
            judged: dict[str, Any] = {"what": what}
            for dtype in DTYPES:
                judged[dtype] = None
                if dtype in row.floors:
                    judged[dtype] = judge(
                        what=what,
                        row=row,
                        dtype=dtype,
                        values=results[name, dtype],
                        reference=reference,
                        cpu=cpu.get((what, dtype), 0.0),
                    )
            rows.append(judged)
    return rows


def read_deviations(content: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (row["what"], dtype): found
        for row in content["rows"]
        for dtype in DTYPES
        if row[dtype] and (found := row[dtype].get("deviation")) is not None
    }


def passes(row: Mapping[str, Any]) -> bool:
    return all(row[dtype]["passes"] for dtype in DTYPES if row[dtype])


def list_problems(content: Mapping[str, Any]) -> list[str]:
    """A line for every row and dtype that fails."""
    return [
        f"{row['what']}, {dtype}: "
        + (
            f"failed: {found['failed']}"
            if "failed" in found
            else f"{format_deviation(found)} ({found['of']}), and at most {found['bound']:.1e} passes"
        )
        for row in content["rows"]
        for dtype in DTYPES
        if (found := row[dtype]) and not found["passes"]
    ]


def format_deviation(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    if "failed" in measured:
        return "failed"
    found = measured["deviation"]
    return "NaN" if found is None or found != found else f"{found:.1e}" if found else "0"


def describe_error(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]

"""How far this device's numbers are from float64, for all that the package does, beside a CPU's.

    python -m benchmarks.precision [--only NAME ...] [--out FILE.json]
    python -m benchmarks.precision --record [--only NAME ...]

    deviation = ||x - ref|| / max(||ref||, s sqrt(n)), the largest over all arrays, of n entries
    passes where deviation <= max(4 x the CPU's, a floor)

For an optimizer, x is the displacement by 20 steps along random gradients. The last parameters would
hide errors, because the displacement may be a small part of them. s is 1 for cosines and for numbers
that are zero but for rounding; for others it is 0. The reference is recorded once, on a CPU: in
float64, or in float32 for the losses of training and the verdicts on spheres. Matrix products have the
highest precision. Rows that say "default" are the exception: a GPU computes their products in TF32,
and they are judged by the floor for TF32. measuring/precision_cases.py explains the floors. The exit
status is 1 if a row fails; an error in one case leaves the other cases alone. `--record --only` keeps
what is recorded of the other cases.
"""

import contextlib
import io
import json
import shlex
import sys
import time
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cli import DTYPES, Parser
from benchmarks.measuring.precision_cases import Case, list_cases
from benchmarks.measuring.precision_inputs import Values, compute_checksum
from benchmarks.measuring.precision_judging import (
    describe_error,
    format_deviation,
    judge_all,
    list_problems,
    passes,
    read_deviations,
)
from benchmarks.reporting import report, tables

RESULTS = Path(__file__).parent / "results"
REFERENCE, CPU = RESULTS / "precision_reference.npz", RESULTS / "precision_cpu.json"
COMMAND = "python -m benchmarks.precision"
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
HEADER = ("what", "float32 CPU", "float32 here", "bfloat16 CPU", "bfloat16 here", "verdict")


def run(case: Case, dtype: str) -> Values:
    """Computes a case with JAX's usual promotions, and with float64 only if that is the dtype."""
    precision = (
        contextlib.nullcontext()
        if case.products is None
        else jax.default_matmul_precision(case.products)
    )
    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        precision,
    ):
        return case.compute(dtype)


def run_all(jobs: Mapping[tuple[str, str], Case]) -> dict[tuple[str, str], Values | str]:
    """Runs cases in threads, because they compile most of the time.

    Starts with the last case, training, which takes longest.
    """

    def attempt(dtype: str, case: Case) -> Values | str:
        try:
            return run(case, dtype)
        except Exception as error:  # any error: the other rows go on
            return describe_error(error)

    with ThreadPoolExecutor(report.describe_environment()["cores"]) as pool:
        found = {
            key: pool.submit(attempt, key[1], case) for key, case in reversed(list(jobs.items()))
        }
        return {key: future.result() for key, future in found.items()}


def list_dtypes(case: Case) -> list[str]:
    return [dtype for dtype in DTYPES if any(dtype in row.floors for row in case.rows.values())]


def measure(
    chosen: Mapping[str, Case], reference: Values, cpu: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Measures this device. `cpu` is the recorded content, and None on the CPU that is recorded."""
    start = time.perf_counter()
    jobs = {(name, dtype): case for name, case in chosen.items() for dtype in list_dtypes(case)}
    found = run_all(jobs)
    judged = judge_all(chosen, found, reference, read_deviations(cpu or {"rows": []}))
    if cpu is None:
        judged = judge_all(chosen, found, reference, read_deviations({"rows": judged}))
    environment = report.describe_environment()
    return {"environment": environment, "seconds": time.perf_counter() - start, "rows": judged}


# --- the reference ----------------------------------------------------------------------------


def record(only: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the reference and the CPU's deviations, of all cases or of some, unless a case fails."""
    known = list_cases()
    chosen = {name: known[name] for name in only or known}
    before = load()[1] if only else {"rows": []}
    rows = {what: row for case in chosen.values() for what, row in case.rows.items()}
    jobs = {
        (name, case.reference): case
        for name, case in chosen.items()
        if not all(row.zero or row.like for row in case.rows.values())
    }
    found = run_all(jobs)
    arrays: dict[str, Any] = {"checksum": np.uint32(compute_checksum())}
    if only:
        with np.load(io.BytesIO(REFERENCE.read_bytes())) as file:
            arrays |= {key: file[key] for key in file.files if key.partition("|")[0] not in rows}
    for (name, _), values in found.items():
        if isinstance(values, str):
            raise RuntimeError(f"{name}: {values}")
        for what, row in chosen[name].rows.items():
            for key, x in values[what].items() if not (row.zero or row.like) else ():
                arrays[f"{what}|{key}"] = x if x.dtype.kind == "U" else x.astype(np.float32)
    partial = REFERENCE.with_suffix(".tmp.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(REFERENCE)
    content = {"command": f"{COMMAND} --record"} | measure(chosen, load_reference(), None)
    if only:
        content = merge(before, content, [what for case in known.values() for what in case.rows])
    report.write_json(CPU, content)
    return content


def merge(
    before: Mapping[str, Any], content: Mapping[str, Any], order: Sequence[str]
) -> dict[str, Any]:
    """The content recorded `before` with the rows of `content`, which name their own environment."""
    rows = {row["what"]: row for row in before["rows"]}
    rows |= {row["what"]: row | {"environment": content["environment"]} for row in content["rows"]}
    return {**before, "rows": [rows[what] for what in order if what in rows]}


def load_reference() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(io.BytesIO(REFERENCE.read_bytes())) as file:
        if file["checksum"] != compute_checksum():
            raise ValueError("this NumPy draws other random numbers than the one that recorded it")
        for key in set(file.files) - {"checksum"}:
            what, _, name = key.partition("|")
            x = file[key]
            found.setdefault(what, {})[name] = x if x.dtype.kind == "U" else x.astype(np.float64)
    return found


def load() -> tuple[Values, dict[str, Any]]:
    """The reference and a CPU's deviations from it; raises ValueError if they cannot be read."""
    try:
        content = json.loads(CPU.read_text("utf-8"))
        read_deviations(content)
        return load_reference(), content
    except UNREADABLE as error:
        raise ValueError(describe_error(error)) from error


# --- the report -------------------------------------------------------------------------------


def format_rows(content: Mapping[str, Any], cpu: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The deviations as texts, with a dash where there is none; `cpu` is the recorded content."""
    beside = {row["what"]: row for row in cpu["rows"]}
    return [
        (
            row["what"],
            *(
                format_deviation(of.get(dtype))
                for dtype in DTYPES
                for of in (beside.get(row["what"], {}), row)
            ),
            "passes" if passes(row) else "FAILS",
        )
        for row in content["rows"]
    ]


def make_table(content: Mapping[str, Any], cpu: Mapping[str, Any]) -> Table:
    environment = content["environment"]
    title = (
        f"Deviation from the reference; here: {environment['device']}, default products in "
        f"{environment['float32_products']}"
    )
    return tables.to_rich(HEADER, format_rows(content, cpu), title, wrapped=HEADER[1:], width=8)


def make_parser(names: Sequence[str]) -> Parser:
    parser = Parser(prog="benchmarks.precision", description=str(__doc__).splitlines()[0])
    help_text = "record the reference and the CPU's deviations; on a CPU only"
    parser.add_argument("--record", action="store_true", help=help_text)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    return parser


def record_here(parser: Parser, args: Namespace) -> dict[str, Any]:
    if args.out:
        parser.error("--record: records where it belongs; no --out")
    if (platform := jax.default_backend()) != "cpu":
        parser.error(f"--record: the reference is recorded on a CPU, and this is a {platform}")
    try:
        content = record(args.only)
    except (RuntimeError, ValueError) as error:
        parser.exit(1, f"error: nothing recorded: {error}\n")
    print(f"written: {REFERENCE}\nwritten: {CPU}")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    known = list_cases()
    parser = make_parser(list(known))
    args = parser.parse_args(argv)
    if args.record:
        content = cpu = record_here(parser, args)
    else:
        if args.out:
            parser.require_writable(args.out, args.out.parent)
        try:
            reference, cpu = load()
        except ValueError as error:
            parser.error(f"no reference ({error}); record one on a CPU: {COMMAND} --record")
        chosen = {name: known[name] for name in args.only or known}
        content = measure(chosen, reference, cpu)
    Console().print(make_table(content, cpu))
    problems = list_problems(content)
    print("\n".join(problems) or f"everything passes, in {content['seconds']:.0f} s")
    if args.out:
        only = ["--only", *args.only] if args.only else []
        command = shlex.join([*COMMAND.split(), *only])
        report.write_json(args.out, {"command": command} | content)
        print(f"written: {args.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

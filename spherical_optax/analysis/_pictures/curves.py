"""Reads the curves of a picture from a list of summaries."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spherical_optax.analysis._path_order import sort_paths

History = Sequence[Mapping[str, float]]
Paths = str | Iterable[str] | None


class Curves(NamedTuple):
    """The numbers to draw, NaN where a picture leaves one out."""

    steps: np.ndarray  # (n,), ascending
    named: dict[str, np.ndarray]  # (n,) each, by the path of the parameter
    predicted: np.ndarray | None  # (n,)


def read_history(
    caller: str, quantity: str, history: History, paths: Paths, predicted: Any
) -> Curves:
    """The values of one quantity by step and parameter, and one error for what cannot be drawn."""
    entries = _require_summaries(caller, history)
    known = _list_known_paths(caller, quantity, entries)
    row_of = {float(entry["step"]): i for i, entry in enumerate(entries)}  # the last of equal steps
    steps = np.array(sorted(row_of))
    rows = [row_of[step] for step in steps]

    def hide_undrawable(values: Any) -> np.ndarray:
        values = np.asarray(values, float)
        is_drawn = np.isfinite(values)
        if quantity != "radius":
            is_drawn &= (values > 0) & (steps > 0)
        return np.where(is_drawn, values, np.nan)

    named = {
        path: hide_undrawable([entries[i].get(f"{quantity}/{path}", np.nan) for i in rows])
        for path in _choose_paths(caller, known, paths)
    }
    if np.isnan(list(named.values())).all():
        sign = "" if quantity == "radius" else "positive "
        raise ValueError(
            f"{caller}: no finite {sign}{quantity} in the history, nothing to draw; "
            "add the summaries of states after an update"
        )
    if predicted is None:
        return Curves(steps, named, None)
    if np.shape(predicted) not in ((), (len(entries),)):
        raise ValueError(
            f"{caller}: predicted has shape {np.shape(predicted)}; give a number, or one for each "
            f"of the {len(entries)} entries of the history"
        )
    per_entry = np.broadcast_to(np.asarray(predicted, float), len(entries))
    return Curves(steps, named, hide_undrawable(per_entry[rows]))


def _require_summaries(caller: str, history: Any) -> list[Mapping[str, float]]:
    is_list = isinstance(history, Iterable) and not isinstance(history, Mapping)
    entries: list[Any] = list(history) if is_list else []
    if not entries or not all(isinstance(e, Mapping) and "step" in e for e in entries):
        raise ValueError(f"{caller}: give a list of so.analysis.summary(state), one per step or so")
    return entries


def _list_known_paths(caller: str, quantity: str, entries: list[Mapping[str, float]]) -> list[str]:
    """The paths of the parameters for which the history has the quantity."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    known = [name.partition("/")[2] for name in names if name.startswith(f"{quantity}/")]
    if not known and quantity == "effective_lr" and any("/" in name for name in names):
        raise ValueError(
            f"{caller}: the effective learning rate of this optimizer is not known; "
            "plot_angles shows its angles"
        )
    if not known:
        raise ValueError(f"{caller}: no {quantity} in the history; so.track needs spheres")
    return sort_paths(known)


def _choose_paths(caller: str, known: list[str], paths: Paths) -> list[str]:
    if paths is None:
        return known
    chosen: set[str] = set()
    for wanted in [paths] if isinstance(paths, str) else paths:
        try:
            hits = {wanted} if wanted in known else {p for p in known if re.search(wanted, p)}
        except re.error as error:
            raise ValueError(f"{caller}: {wanted!r} is no regular expression: {error}") from None
        if not hits:
            raise ValueError(f"{caller}: {wanted!r} matches none of the paths {', '.join(known)}")
        chosen |= hits
    if not chosen:
        raise ValueError(f"{caller}: paths is empty; there are {', '.join(known)}")
    return [path for path in known if path in chosen]

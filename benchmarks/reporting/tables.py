"""Tables for a terminal and for a Markdown page, both from a header and rows of texts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.table import Table


def to_rich(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    *,
    words: int = 1,
    framed: bool = False,
    wrapped: Collection[str] = (),
    width: int | None = None,
) -> Table:
    """A table for `rich.console.Console.print`.

    Args:
      words: how many columns, from the left, hold words; they are aligned to the left, the numbers in
        the other columns to the right.
      framed: whether lines surround every cell. Without them the columns also stand closer together.
      wrapped: the columns whose lines may be broken.
      width: largest number of characters in a line of a wrapped column.
    """
    box, padding = (HEAVY_HEAD, (0, 1)) if framed else (SIMPLE_HEAD, (0, 0))
    table = Table(title=title, title_justify="left", box=box, padding=padding)
    for i, column in enumerate(header):
        may_wrap = column in wrapped
        table.add_column(
            column,
            justify="left" if i < words else "right",
            no_wrap=not may_wrap,
            max_width=width if may_wrap else None,
        )
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_ends(curve: Mapping[str, Any], digits: str, unit: float = 1.0, first: int = 0) -> str:
    """From where to where the mean of a curve goes: a dash where it is not known."""
    begin, end = curve["mean"][first], curve["mean"][-1]
    if begin is None or end is None or np.isnan(begin) or np.isnan(end):
        return "-"
    texts = (format(unit * value, digits).removesuffix(".") for value in (begin, end))
    return " → ".join(texts)

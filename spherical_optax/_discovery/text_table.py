"""Reports as aligned text."""

from collections.abc import Sequence
from typing import Any

from spherical_optax._core.sphere import Sphere


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [tuple(header), *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def figure(x: float) -> str:
    return "" if x != x else f"{x:.1e}"


def _cell(x: Any) -> str:
    """A float as a figure, a sphere without its defaults."""
    if x is None:
        return ""
    if isinstance(x, float):
        return figure(x)
    if not isinstance(x, Sphere):
        return str(x)
    blocks = "" if x.blocks is None else f", blocks={x.blocks}"
    return f"Sphere({x.index_axes}{blocks}{'' if x.tie is None else f', tie={x.tie!r}'})"

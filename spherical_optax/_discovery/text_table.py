"""Reports as aligned text."""

from collections.abc import Sequence
from typing import Any

from spherical_optax._core.sphere import Sphere


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The rows under the header, in columns of equal width."""
    cells = [tuple(header), *(tuple(map(_format_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_figure(x: float) -> str:
    """Two digits; nothing for NaN."""
    return "" if x != x else f"{x:.1e}"


def _format_cell(x: Any) -> str:
    """A float as a figure, a sphere without its defaults, anything else as `str` has it."""
    if x is None:
        return ""
    if isinstance(x, float):
        return format_figure(x)
    if not isinstance(x, Sphere):
        return str(x)
    blocks = "" if x.blocks is None else f", blocks={x.blocks}"
    tie = "" if x.tie is None else f", tie={x.tie!r}"
    return f"Sphere({x.index_axes}{blocks}{tie})"

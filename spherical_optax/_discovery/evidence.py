"""The radial figures of a candidate, and whether they say yes, no or neither.

The radial figure of a group is |<x, g>| / ||x g||, where ||x g|| is the root of sum((x g)^2). It is
about |N(0, 1)| if the group is not invariant, and zero but for rounding and eps if it is.
"""

import math
from typing import Any, NamedTuple

import numpy as np

# The larger radius is this many times the natural one.
LARGER = 10.0
# A figure at the natural radius that may be nothing but rounding, in any precision.
SMALL = 0.05
# With this many groups or more, the median over the groups says what one probe has found, and an odd
# probe may be dropped. With fewer groups a median is small by chance, and every probe has to agree.
MANY = 16


class Evidence(NamedTuple):
    """The figures of a candidate at both radii, in short. NaN where nothing was measured.

    Attributes:
      natural: at the natural radius, of a typical group.
      large: at LARGER times the natural radius, the root mean square over the groups.
      typical: at the larger radius, of a typical group.
      worst: at the larger radius, of the worst group.
      clear: a `natural` figure of this or more is a clear "no".
    """

    natural: float
    large: float
    typical: float
    worst: float
    clear: float

    @property
    def possible(self) -> bool:
        """Whether the natural radius leaves open that the groups are invariant."""
        return self.natural < self.clear

    def holds(self, tol: float, rounding: float) -> bool:
        """Whether the groups are invariant.

        The figures at the larger radius have to be small, and those at the natural radius have to
        explain them. The eps of a normalisation layer leaves a figure that falls with the square of the
        radius. A branch that drowns its shortcut, or a nonlinearity that saturates, leaves a figure that
        falls with the radius only, and this is not invariance. In low precision rounding hides which of
        them it is, so a figure that is not small at the natural radius does not hold there: that of the
        gate of a GELU is 0.07 to 0.17 in bfloat16, and that of an invariant matrix beside it below 0.02.
        """
        eps = 2 * self.natural / LARGER**2
        falls = self.typical < (max(rounding, eps) if self.natural < SMALL else eps)
        return self.possible and self.large < tol and self.worst < 10 * tol and falls

    def is_close(self, tol: float) -> bool:
        """Whether the figures say neither yes nor no; NaN at the larger radius says neither, too."""
        return self.possible and not self.large >= 10 * tol


class Figures:
    """The figures of a candidate's groups, an array of them for every probe; NaN for idle groups."""

    def __init__(self, groups: int):
        self._many = groups >= MANY
        self._natural: list[np.ndarray] = []
        self._large: list[np.ndarray] = []

    def add(self, figures: np.ndarray, large: bool) -> None:
        """Takes in the figures of one probe, at the larger radius or at the natural one."""
        (self._large if large else self._natural).append(figures)

    @property
    def any_natural(self) -> bool:
        """Whether there was a probe at the natural radius."""
        return bool(self._natural)

    def say_no(self) -> bool:
        """Whether the natural radius has already shown that the groups are not invariant.

        With many groups one probe may exceed the bound of 0.3, unless it exceeds 0.5.
        """
        natural = self._take_medians()
        if self._many:
            return any(f > 0.5 for f in natural) or sum(f > 0.3 for f in natural) > 1
        return any(f > 0.3 for f in natural)

    def summarize(self) -> Evidence:
        """The evidence of all probes.

        With MANY groups or more, takes the median over the probes at the natural radius, and drops the
        worst probe of each group at the larger radius.
        """
        clear = 0.3 if self._many else 0.1
        average = np.median if self._many else _compute_rms
        natural = float(average(self._take_medians())) if self._natural else math.nan
        # Fewer probes than two: the gradients were not finite, or they vanished.
        if len(self._large) < 2:
            return Evidence(natural, large=math.nan, typical=math.nan, worst=math.nan, clear=clear)
        worst = _pick_largest(np.stack(self._large), skip=1 if self._many else 0)
        return Evidence(
            natural,
            large=_compute_rms(worst),
            typical=float(np.median(worst)),
            worst=float(worst.max()),
            clear=clear,
        )

    def _take_medians(self) -> list[float]:
        """The median over the groups, for each probe at the natural radius."""
        return [float(np.nanmedian(figures)) for figures in self._natural]


def _compute_rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _pick_largest(rows: np.ndarray, skip: int) -> np.ndarray:
    """The largest number of each column for skip=0, the second largest for skip=1.

    A column with one number gives that number. NaN is no number, and a column of NaN is left out.
    """
    finite = np.isfinite(rows).sum(axis=0)
    index = np.clip(np.minimum(skip, finite - 1), 0, None)
    descending = -np.sort(-rows, axis=0)  # NaN last
    return np.take_along_axis(descending, index[None], axis=0)[0][finite > 0]

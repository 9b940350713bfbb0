"""Arrays with one parent in the tree, and the finest of their candidates that hold."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from spherical_optax._core.paths import Path
from spherical_optax._core.sphere import Sphere
from spherical_optax._discovery.candidates import Candidate, enumerate_candidates
from spherical_optax._discovery.evidence import MANY
from spherical_optax._discovery.radial_sums import RadialSums
from spherical_optax._discovery.splits import make_sphere

# An array with less influence than this, relative to the largest influence, has a gradient of rounding.
NO_INFLUENCE = 1e-5
# A figure of blocks that is larger is due to an eps, at the natural radius.
EPS_IN_BLOCKS = 0.02


class Finding(NamedTuple):
    """What was measured of one parameter array.

    Attributes:
      path: its path, with slashes.
      shape: its shape.
      sphere: its sphere, or None.
      natural: its radial figure at the natural radius.
      large: its radial figure at ten times that radius; NaN if it was not measured there.
      verdict: "sphere", "no", "no influence", "undecided", "L2 penalty" or "not finite".
    """

    path: str
    shape: tuple[int, ...]
    sphere: Sphere | None
    natural: float
    large: float
    verdict: str


class Siblings:
    """The arrays with one parent, which may form spheres together, by their index."""

    def __init__(
        self,
        paths: dict[int, Path],
        arrays: dict[int, jax.Array],
        vectors: bool,
        copies: frozenset[int] = frozenset(),
    ):
        self._paths, self._arrays = paths, arrays
        self._influence: dict[int, list[float]] = {i: [] for i in arrays}
        self._figures: dict[int, list[float]] = {i: [] for i in arrays}
        self._penalized: dict[int, set[int]] = {}  # the axes found in all probes at natural radii
        self._enlarged = False
        # The entries of a long list follow one another as the layers do: Keras hands them out so.
        near = len(arrays) > 5 and all(path[-1].isdigit() for path in paths.values() if path)
        self._candidates = enumerate_candidates(arrays, vectors, copies, near)
        self._by_key = {c.key: c for c in self._candidates}

    def measure(self, all_sums: list[RadialSums], large: np.ndarray) -> None:
        """Takes in a probe: the sums of all arrays, and which arrays are at the larger radius."""
        sums = {i: all_sums[i] for i in self._arrays}
        self._enlarged = self._enlarged or bool(large.any())
        most = max((s.influence for s in sums.values() if s.influence > 0), default=1.0)
        for i, s in sums.items():
            self._influence[i].append(s.influence / most)
            self._figures[i].append(s.figure)
            if not self._enlarged:
                axes = s.find_penalized_axes()
                self._penalized[i] = self._penalized.get(i, axes) & axes
        for candidate in self._candidates:
            if self._is_finer_than_a_no(candidate):
                candidate.ruled_out = True
            if not candidate.ruled_out:
                largest = max(candidate.splits, key=lambda i: self._arrays[i].size)
                candidate.measure(sums, large=bool(large[largest]))

    def _is_finer_than_a_no(self, candidate: Candidate) -> bool:
        """Whether a coarser candidate with many groups is ruled out.

        The "no" of a few large groups does not count: the eps of the many filters in a layer may add up
        to it, although every filter alone is invariant but for its eps.
        """
        coarser = (self._by_key.get(key) for key in candidate.coarser)
        return any(c is not None and c.groups >= MANY and c.ruled_out for c in coarser)

    def find_promising(self) -> set[int]:
        """The arrays that may still be on a sphere."""
        return {i for c in self._candidates if c.promising for i in c.splits}

    @property
    def _shown(self) -> list[Candidate]:
        """The candidates that may hold, and that the probes have shown along every axis."""
        return [c for c in self._candidates if c.promising and c.is_shown_along_every_axis]

    def judge(self, tol: float, rounding: float) -> Iterator[tuple[int, Finding]]:
        """The finding of each array, with its index, after all probes."""
        chosen = self._choose(tol, rounding)
        close = [c for c in self._shown if c.evidence.is_close(tol)]
        for i in self._arrays:
            if i in chosen:
                yield i, self._judge_chosen(i, chosen, close, rounding)
            else:
                yield i, self._judge_other(i, chosen, close)

    def _choose(self, tol: float, rounding: float) -> dict[int, Candidate]:
        """The finest candidates that hold, without overlap, for each of their arrays."""
        holding = [c for c in self._shown if c.evidence.holds(tol, rounding)]
        chosen: dict[int, Candidate] = {}
        for c in sorted(holding, key=lambda c: c.size):
            # If a kernel alone is as invariant as kernel and bias together, the bias has no effect. If
            # the kernel alone is clearly less so, by a factor of 10, the bias matters and must be tied:
            # its effect is only small next to that of the kernel on large inputs.
            wider = [w.evidence.large for w in holding if w.splits.items() > c.splits.items()]
            complete = all(c.evidence.large < 10 * max(large, 1e-5) for large in wider)
            if complete and not chosen.keys() & c.splits.keys():
                chosen |= dict.fromkeys(c.splits, c)
        return chosen

    def _judge_chosen(
        self, i: int, chosen: dict[int, Candidate], close: list[Candidate], rounding: float
    ) -> Finding:
        """On a sphere, unless a finer candidate of the same arrays says neither yes nor no.

        In that case it is open whether there is a sphere per layer or one per filter. It is open, too,
        where blocks leave the figure of an eps: of the filters in a block it may have averaged out.
        """
        c = chosen[i]
        finer = [d for d in close if d.splits.keys() == c.splits.keys() and d.size < c.size]
        if c.has_blocks and c.evidence.natural > max(EPS_IN_BLOCKS, rounding):
            finer.append(c)
        if finer:
            evidence = finer[0].evidence
            return self._make_finding(i, "undecided", evidence.natural, evidence.large)
        sphere = make_sphere(c.splits[i], self._name_tie(c, chosen))
        return self._make_finding(i, "sphere", c.evidence.natural, c.evidence.large, sphere)

    def _judge_other(self, i: int, chosen: dict[int, Candidate], close: list[Candidate]) -> Finding:
        """Off the spheres, and why."""
        natural = _take_median(self._figures[i])
        if not np.isfinite(self._influence[i]).any():
            return self._make_finding(i, "not finite", natural, math.nan)
        if np.nanmax(self._influence[i]) < NO_INFLUENCE:
            return self._make_finding(i, "no influence", natural, math.nan)
        rivals = [c for c in close if i in c.splits and not chosen.keys() & c.splits.keys()]
        if rivals:
            evidence = min((c.evidence for c in rivals), key=lambda e: e.large)
            return self._make_finding(i, "undecided", evidence.natural, evidence.large)
        verdict = "L2 penalty" if self._penalized[i] else "no"
        return self._make_finding(i, verdict, natural, math.nan)

    def _make_finding(
        self, i: int, verdict: str, natural: float, large: float, sphere: Sphere | None = None
    ) -> Finding:
        path, shape = "/".join(self._paths[i]), self._arrays[i].shape
        return Finding(path, shape, sphere, natural, large, verdict)

    def _name_tie(self, c: Candidate, chosen: dict[int, Candidate]) -> str | None:
        """The path of the parent, or the paths of the tied arrays if their parent has several ties."""
        if len(c.splits) < 2:
            return None
        parent = self._paths[next(iter(c.splits))][:-1]
        only_tie = all(d is c or len(d.splits) < 2 for d in chosen.values())
        if parent and only_tie:
            return "/".join(parent)
        return "+".join("/".join(self._paths[i]) for i in c.splits)


def _take_median(figures: list[float]) -> float:
    return float(np.nanmedian(figures)) if np.isfinite(figures).any() else math.nan


def group_by_parent(paths: list[Path], arrays: list[jax.Array], vectors: bool) -> list[Siblings]:
    """The arrays by their parent in the tree; in flat dicts a dot within a name is a level, too."""
    parents: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        parent = "/".join(path).replace(".", "/").rpartition("/")[0]
        parents.setdefault(parent, []).append(i)
    copies = find_copies(paths, arrays)
    return [
        Siblings({i: paths[i] for i in indices}, {i: arrays[i] for i in indices}, vectors, copies)
        for indices in parents.values()
    ]


def find_copies(paths: list[Path], arrays: list[jax.Array]) -> frozenset[int]:
    """The arrays whose first axis counts copies of a module: scanned layers, or critics of a `vmap`.

    All arrays below one node of the tree then have a first axis of the same length, none of them has no
    other axis, and one of them is a matrix in every copy.
    """
    below: dict[Path, list[int]] = {}
    for i, path in enumerate(paths):
        for n in range(len(path)):
            below.setdefault(path[:n], []).append(i)
    found: set[int] = set()
    for indices in below.values():
        shapes = [arrays[i].shape for i in indices]
        alike = len({shape[:1] for shape in shapes}) == 1 and min(map(len, shapes)) > 1
        if len(shapes) > 1 and alike and shapes[0][0] > 1 and max(map(len, shapes)) > 2:
            found.update(indices)
    return frozenset(found)

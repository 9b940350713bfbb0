"""The arrays of one module, and the finest of their candidates that hold."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from spherical_optax._candidates import Candidate, Sums, candidates
from spherical_optax._spheres import Path, Sphere

# A gradient this small next to those of the other arrays of the module is rounding.
NO_INFLUENCE = 1e-5


class Finding(NamedTuple):
    """What was measured of one parameter array."""

    path: str
    shape: tuple[int, ...]
    sphere: Sphere | None
    natural: float  # the radial figure at the natural radius
    large: float  # and at ten times that
    verdict: str  # "sphere", "no", "no influence" or "undecided"


class Module:
    """Arrays with a common parent in the tree."""

    def __init__(self, paths: dict[int, Path], arrays: dict[int, jax.Array], vectors: bool):
        self.paths, self.arrays = paths, arrays
        self._influence: dict[int, float] = dict.fromkeys(arrays, 0.0)
        self._radial: dict[int, list[float]] = {i: [] for i in arrays}
        self._candidates = candidates(arrays, vectors)
        self._by_key = {c.key: c for c in self._candidates}

    def measure(self, x: list[jax.Array], g: list[jax.Array], scaled: np.ndarray) -> None:
        """Takes in a probe: parameters and gradients, and which arrays are at the larger radius."""
        sums = {i: Sums(x[i], g[i]) for i in self.arrays}
        for candidate in self._candidates:
            above = (self._by_key.get(key) for key in candidate.coarser)
            candidate.alive &= all(c is None or c.alive for c in above)
            if candidate.alive:
                largest = max(candidate.parts, key=lambda i: self.arrays[i].size)
                candidate.measure(sums, bool(scaled[largest]))
        most = max(s.influence for s in sums.values())
        for i, s in sums.items():
            self._radial[i].append(s.radial)
            if most > 0:
                self._influence[i] = max(self._influence[i], s.influence / most)

    def promising(self) -> set[int]:
        """The arrays that may be on a sphere, so far."""
        return {i for c in self._candidates if c.alive and c.measured for i in c.parts}

    def findings(self, tol: float) -> Iterator[tuple[int, Finding]]:
        chosen = self._choose(tol)
        for i, array in self.arrays.items():
            where, shape = "/".join(self.paths[i]), array.shape
            if i in chosen:
                c = chosen[i]
                finer = [d for d in self._close(tol) if d.parts.keys() == c.parts.keys() and d.size < c.size]
                verdict = "undecided" if finer else "sphere"
                sphere = None if finer else c.parts[i].sphere(self._tie(c, chosen))
                e = finer[0].evidence if finer else c.evidence
                yield i, Finding(where, shape, sphere, e.natural, e.large, verdict)
                continue
            if self._influence[i] < NO_INFLUENCE:
                yield i, Finding(where, shape, None, math.nan, math.nan, "no influence")
                continue
            close = [c for c in self._close(tol) if i in c.parts and not c.parts.keys() & chosen.keys()]
            if close:
                e = min((c.evidence for c in close), key=lambda e: e.large)
                yield i, Finding(where, shape, None, e.natural, e.large, "undecided")
            else:
                figure = float(np.median(self._radial[i]))
                yield i, Finding(where, shape, None, figure, math.nan, "no")

    def _choose(self, tol: float) -> dict[int, Candidate]:
        """The finest that hold, without overlap."""
        holding = [c for c in self._candidates if c.alive and c.evidence.holds(tol)]
        chosen: dict[int, Candidate] = {}
        for c in sorted(holding, key=lambda c: c.size):
            wider = [w for w in holding if w.parts.items() > c.parts.items()]
            # As invariant alone as together with its bias: the bias does not matter. Less so: it does,
            # and is only small next to what the kernel gives.
            alone = all(c.evidence.large < 10 * max(w.evidence.large, 1e-5) for w in wider)
            if alone and not chosen.keys() & c.parts.keys():
                chosen |= dict.fromkeys(c.parts, c)
        return chosen

    def _close(self, tol: float) -> list[Candidate]:
        return [c for c in self._candidates if c.alive and c.evidence.close(tol)]

    def _tie(self, c: Candidate, chosen: dict[int, Candidate]) -> str | None:
        """The module's path, which no other tie of the tree has, or the arrays' own."""
        if len(c.parts) < 2:
            return None
        first = self.paths[next(iter(c.parts))]
        others = any(d is not c and len(d.parts) > 1 for d in chosen.values())
        if first[:-1] and not others:
            return "/".join(first[:-1])
        return "+".join("/".join(self.paths[i]) for i in c.parts)


def split(paths: list[Path], arrays: list[jax.Array], vectors: bool) -> list[Module]:
    """By parent; a dot in a name, as in flat dicts from elsewhere, counts as a level too."""
    modules: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        modules.setdefault("/".join(path).replace(".", "/").rpartition("/")[0], []).append(i)
    return [
        Module({i: paths[i] for i in m}, {i: arrays[i] for i in m}, vectors)
        for m in modules.values()
    ]

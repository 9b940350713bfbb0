"""The arrays of one module, and the finest of their candidates that hold."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from spherical_optax._core.paths import Path
from spherical_optax._core.sphere import Sphere
from spherical_optax._discovery.candidates import MANY, Candidate, candidates
from spherical_optax._discovery.radial_sums import Sums

# A gradient this small next to those of other arrays is rounding.
NO_INFLUENCE = 1e-5


class Finding(NamedTuple):
    """What was measured of one parameter array."""

    path: str
    shape: tuple[int, ...]
    sphere: Sphere | None
    natural: float  # the radial figure at the natural radius
    large: float  # and at ten times that
    verdict: str  # "sphere", "no", "no influence", "undecided" or "not finite"


class Module:
    """Arrays with a common parent in the tree, by their index."""

    def __init__(self, paths: dict[int, Path], arrays: dict[int, jax.Array], vectors: bool):
        self.paths, self.arrays = paths, arrays
        self._influence: dict[int, list[float]] = {i: [] for i in arrays}
        self._radial: dict[int, list[float]] = {i: [] for i in arrays}
        self._candidates = candidates(arrays, vectors)
        self._by_key = {c.key: c for c in self._candidates}

    def measure(self, x: list[jax.Array], g: list[jax.Array], large: np.ndarray) -> None:
        """Takes in a probe: parameters and gradients, and which arrays are at the larger radius."""
        sums = {i: Sums(x[i], g[i]) for i in self.arrays}
        most = max((s.influence for s in sums.values() if s.influence > 0), default=1.0)
        for i, s in sums.items():
            self._influence[i].append(s.influence / most)
            self._radial[i].append(s.figure)
        for candidate in self._candidates:
            # The eps of all filters of a layer may add up: few groups say nothing about finer ones.
            above = (self._by_key.get(key) for key in candidate.coarser)
            if any(c is not None and c.groups >= MANY and not c.alive for c in above):
                candidate.alive = False
            if candidate.alive:
                largest = max(candidate.parts, key=lambda i: self.arrays[i].size)
                candidate.measure(sums, bool(large[largest]))

    def promising(self) -> set[int]:
        """The arrays that may be on a sphere, so far."""
        return {i for c in self._candidates if c.promising for i in c.parts}

    def findings(self, tol: float, rounding: float) -> Iterator[tuple[int, Finding]]:
        chosen = self._choose(tol, rounding)
        close = [c for c in self._candidates if c.promising and c.evidence.close(tol)]
        for i, array in self.arrays.items():
            sphere, natural, large = None, _median(self._radial[i]), math.nan
            if i in chosen:
                c = chosen[i]
                # Per filter, or per layer after all?
                rivals = [d for d in close if d.parts.keys() == c.parts.keys() and d.size < c.size]
                verdict = "undecided" if rivals else "sphere"
                sphere = None if rivals else c.parts[i].sphere(self._tie(c, chosen))
                natural, large = (rivals[0] if rivals else c).evidence[:2]
            elif not np.isfinite(self._influence[i]).any():
                verdict = "not finite"
            elif np.nanmax(self._influence[i]) < NO_INFLUENCE:
                verdict = "no influence"
            elif rivals := [
                c for c in close if i in c.parts and not chosen.keys() & c.parts.keys()
            ]:
                verdict = "undecided"
                natural, large = min((c.evidence for c in rivals), key=lambda e: e.large)[:2]
            else:
                verdict = "no"
            path = "/".join(self.paths[i])
            yield i, Finding(path, array.shape, sphere, natural, large, verdict)

    def _choose(self, tol: float, rounding: float) -> dict[int, Candidate]:
        """The finest that hold, without overlap."""
        holding = [c for c in self._candidates if c.promising and c.evidence.holds(tol, rounding)]
        chosen: dict[int, Candidate] = {}
        for c in sorted(holding, key=lambda c: c.size):
            # A kernel is as invariant alone as with its bias if the bias does not matter. If it is less
            # so, then the bias does, and is only small next to what large inputs make of the kernel.
            wider = [w.evidence.large for w in holding if w.parts.items() > c.parts.items()]
            alone = all(c.evidence.large < 10 * max(large, 1e-5) for large in wider)
            if alone and not chosen.keys() & c.parts.keys():
                chosen |= dict.fromkeys(c.parts, c)
        return chosen

    def _tie(self, c: Candidate, chosen: dict[int, Candidate]) -> str | None:
        """The module's path, or the arrays' own if the module has several ties."""
        if len(c.parts) < 2:
            return None
        module = self.paths[next(iter(c.parts))][:-1]
        alone = all(d is c or len(d.parts) < 2 for d in chosen.values())
        if module and alone:
            return "/".join(module)
        return "+".join("/".join(self.paths[i]) for i in c.parts)


def _median(figures: list[float]) -> float:
    return float(np.nanmedian(figures)) if np.isfinite(figures).any() else math.nan


def split(paths: list[Path], arrays: list[jax.Array], vectors: bool) -> list[Module]:
    """By parent; in flat dicts a dot within a name counts as a level too."""
    modules: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        modules.setdefault("/".join(path).replace(".", "/").rpartition("/")[0], []).append(i)
    return [
        Module({i: paths[i] for i in m}, {i: arrays[i] for i in m}, vectors)
        for m in modules.values()
    ]

"""The arrays of a large model in portions, each of which is a program of its own.

What a program needs beside its arguments and results, to draw random numbers or to multiply arrays
before it sums them, is two or three times as large as its arrays. `find_spheres` on a transformer of 350
million parameters holds 5.3 copies of them at its peak, and 7.8 without portions (JAX 0.10, CPU; 3.7
where the C library gives freed memory back at once, `benchmarks.scale`).
"""

from collections.abc import Iterator, Sequence

import jax

# A smaller model is one portion.
ENTRIES = 2**24


def make_portions(arrays: Sequence[jax.Array], entries: int | None = None) -> Iterator[slice]:
    """Consecutive arrays with at most so many entries together; a larger array stands alone."""
    entries = ENTRIES if entries is None else entries
    start = total = 0
    for i, x in enumerate(arrays):
        if i > start and total + x.size > entries:
            yield slice(start, i)
            start, total = i, 0
        total += x.size
    yield slice(start, len(arrays))

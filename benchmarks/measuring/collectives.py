"""Counts what the devices send to one another, in the text of an optimized XLA program.

The bytes are those of the array that a collective makes on one device: of a gathered array, all of it.
Of a reduce-scatter they are those that it takes. Collectives within a branch or a loop count once.
"""

import re
from collections import Counter
from typing import NamedTuple

from benchmarks.measuring.hlo import Instruction, count_bytes, parse_program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\w+\[[\d,]*\]")


class Collectives(NamedTuple):
    """By kind: how many arrays the collectives make, their bytes, and those of the largest array."""

    arrays: Counter[str]
    bytes: Counter[str]
    largest: int


def count_collectives(text: str) -> Collectives:
    """The collectives of an optimized HLO program.

    XLA combines many small ones into one instruction, whose arrays count one by one.
    """
    _, program = parse_program(text)
    arrays: Counter[str] = Counter()
    total: Counter[str] = Counter()
    largest = 0
    for computation in program.values():
        shapes = {i.name: i.shape for i in computation}
        for i in computation:
            # The shape of the start of an asynchronous collective also holds its operands.
            kind = i.operation.removesuffix("-done")
            if kind in KINDS:
                sizes = [count_bytes(array) for array in _list_arrays(i, shapes)]
                arrays[kind] += len(sizes)
                total[kind] += sum(sizes)
                largest = max(largest, *sizes)
    return Collectives(arrays, total, largest)


def _list_arrays(i: Instruction, shapes: dict[str, str]) -> list[str]:
    taken = i.operation == "reduce-scatter"
    return _ARRAY.findall(" ".join(shapes[x] for x in i.operands) if taken else i.shape)

"""Counts kernels, and the bytes that they read and write, in the text of an optimized XLA program.

The bytes of a kernel are those of its operands and results, as if no cache kept any of them for the next
kernel. If a kernel reads only slices of an operand, the bytes are those of the slices.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

NOT_KERNELS = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}
KINDS = {"kLoop": "loop fusion", "kInput": "input fusion"}  # XLA puts sums into input fusions
LISTED_KINDS = (*KINDS.values(), "copy", "custom call", "other")
CALLS = {
    "call": "to_apply",
    "while": "body",
    "async": "calls",
}  # with the attribute that names the callee
SLICES = ("slice", "dynamic-slice", "gather")
_PAIR = r"\([^()]*\)"  # a shape is one word or a tuple, nested up to three deep
_SHAPE = rf"\([^()]*(?:\([^()]*(?:{_PAIR}[^()]*)*\)[^()]*)*\)|\S+"
_INSTRUCTION = re.compile(rf"\s+(?:ROOT )?%([\w.\-]+) = ({_SHAPE}) ([\w\-]+)\(([^)]*)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BRANCHES = re.compile(r"(?:true|false|branch)_computations?=\{?((?:%[\w.\-]+(?:, )?)+)")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    def find_called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        assert found, f"{self.name}: no {attribute}"
        return found[1]


class Counts(NamedTuple):
    kinds: Counter[str]
    read: int  # bytes
    written: int

    @property
    def kernels(self) -> int:
        return self.kinds.total()


Program = dict[str, list[Instruction]]


def parse_program(text: str) -> tuple[str, Program]:
    """The name of the entry computation of an optimized HLO program, and all its computations."""
    program: Program = {}
    entry, inside = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = program[found[2]] = []
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            inside.append(Instruction(*found.groups()))
        elif inside is not None and " = " in line:
            raise ValueError(f"not understood: {line.strip()[:100]}")
    return entry, program


def count(text: str, loop_body: bool = False, larger: bool = False) -> Counts:
    """Kernels of an optimized HLO program, and the bytes that they read and write.

    Every fusion, copy and custom call is one kernel, although a library may launch several kernels for
    one call. The start and the end of an asynchronous kernel count as one. Instructions within a
    `call`, those of command buffers included, count like any other, and those of a loop as many times
    as the loop runs. With `loop_body`, the count is that of one round of the entry's single loop.

    A conditional counts as one kernel, the copy that tells the host which branch to take, and its
    smaller branch. With `so.track(every=10)`, nine steps in ten take that branch, which does nothing.
    With `larger` the larger branch counts, which is that of the tenth step.
    """
    entry, program = parse_program(text)
    if loop_body:
        loops = [i for i in program[entry] if i.operation == "while"]
        if len(loops) != 1:
            raise ValueError(f"the program has {len(loops)} loops, not one")
        entry = loops[0].find_called("body")
    return _count(program, entry, larger)


def _count(program: Program, name: str, larger: bool) -> Counts:
    kinds: Counter[str] = Counter()
    read = written = 0
    sizes = {i.name: count_bytes(i.shape) for i in program[name]}

    def add(inner: Counts, times: int = 1) -> None:
        nonlocal read, written
        kinds.update({kind: times * n for kind, n in inner.kinds.items()})
        read, written = read + times * inner.read, written + times * inner.written

    for i in program[name]:
        # The start of an asynchronous kernel counts the bytes that it reads, and its end those that it
        # writes: the shape of the start holds the operands, too.
        operation = i.operation.removesuffix("-start")
        if operation in NOT_KERNELS or operation in ("async-update", "async-done"):
            continue
        if operation in CALLS:
            times = _read_rounds(i) if operation == "while" else 1
            add(_count(program, i.find_called(CALLS[operation]), larger), times)
        elif operation == "conditional":
            add(Counts(Counter(other=1), sizes[i.operands[0]], 0))
            names = _NAME.findall(" ".join(_BRANCHES.findall(i.attributes)))
            branches = (_count(program, branch, larger) for branch in names)
            choose = max if larger else min
            add(choose(branches, key=lambda c: (c.kernels, c.read + c.written)))
        elif operation.endswith("-done"):
            written += sizes[i.name]
        else:
            kinds[_classify(operation, i.attributes)] += 1
            written += sizes[i.name] if operation == i.operation else 0
            read += _count_read_bytes(program, i, sizes)
    return Counts(kinds, read, written)


def list_instructions(text: str) -> dict[str, tuple[str, int]]:
    """For each instruction that may be a kernel, wherever in the program: its kind, and its bytes."""
    _, program = parse_program(text)
    found = {}
    for computation in program.values():
        sizes = {i.name: count_bytes(i.shape) for i in computation}
        for i in computation:
            if i.operation not in {*NOT_KERNELS, *CALLS, "conditional"}:
                moved = _count_read_bytes(program, i, sizes) + sizes[i.name]
                found[i.name] = (_classify(i.operation, i.attributes), moved)
    return found


def _count_read_bytes(program: Program, i: Instruction, sizes: dict[str, int]) -> int:
    fused = program[i.find_called("calls")] if i.operation == "fusion" else []
    taken = _count_sliced_bytes(fused)
    return sum(min(taken.get(k, sizes[x]), sizes[x]) for k, x in enumerate(i.operands))


def _classify(operation: str, attributes: str) -> str:
    kind = re.search(r"\bkind=(\w+)", attributes)
    if operation == "fusion" and kind:
        return KINDS.get(kind[1], "other")
    return {"copy": "copy", "custom-call": "custom call"}.get(operation, "other")


def _read_rounds(loop: Instruction) -> int:
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if not found:
        raise ValueError(f"{loop.name}: how often it runs is not known")
    return int(found[1])


def _count_sliced_bytes(fused: Sequence[Instruction]) -> dict[int, int]:
    """For each parameter of a fusion that is only sliced: the bytes of its slices."""
    number = {i.name: int(i.arguments) for i in fused if i.operation == "parameter"}
    taken: Counter[int] = Counter()
    whole: set[int] = set()
    for i in fused:
        for k, parameter in enumerate(number.get(operand) for operand in i.operands):
            if parameter is None:
                continue
            if i.operation == "bitcast":
                number[i.name] = parameter
            elif i.operation in SLICES and k == 0:
                taken[parameter] += count_bytes(i.shape)
            else:
                whole.add(parameter)
    return {k: n for k, n in taken.items() if k not in whole}


def count_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple; the digits in the name of a type are its bits."""
    total = 0
    for kind, digits, dimensions in re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", shape):
        bits = int(digits) if digits else 8 * (kind == "pred")  # a token has none
        total += math.ceil(bits * math.prod(map(int, re.findall(r"\d+", dimensions))) / 8)
    return total

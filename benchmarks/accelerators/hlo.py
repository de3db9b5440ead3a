"""How many bytes a compiled program reads and writes, from its optimized HLO.

A kernel (a fusion, a copy, a call into a library, an operation left alone) reads its operands and writes its results,
each once, and nothing stays in a cache in between. Three kinds of buffers are not moved whole:

- what is only renamed: parameters, tuples, bitcasts, and `...-done`, the end of what `...-start` has counted;
- what a slice or a gather reads a part of, or a `dynamic-update-slice` writes a part of: the part counts, and the rest
  stays where it is, as the result aliases the operand;
- the operands of a conditional, a call or a loop: what its body does with them counts, a loop's as often as it turns.

Of a conditional, one branch counts, which `choose` names. Arithmetic on single numbers outside a fusion is the business
of the one processor that runs the program, not of a kernel.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Branches", "Count", "Hlo", "Sent", "count", "parsed", "sent"]

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others carry them in their name: f32, bf16, s4, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r" ?([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_FREE_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound")  # a TPU's: name what lies side by side, promise
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_PARTS = {"slice", "dynamic-slice", "gather"}  # read only as much as they return
_LARGE = 1024  # bytes; a copy of less is one of a counter or a verdict


class Buffer(NamedTuple):
    """An array somewhere."""

    bytes: int
    single: bool  # one number
    main: bool  # in the main memory, and not in the chip's own


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    operation: str
    buffers: tuple[Buffer, ...]  # of the result
    operands: tuple[str, ...]
    rest: str  # all after the operands

    def called(self, *attributes: str) -> list[str]:
        """Names of computations, from `attribute=%name` or `attribute={%name, %name}`."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(" ".join(found))


class Hlo(NamedTuple):
    """A program."""

    entry: str
    computations: dict[str, dict[str, Instruction]]  # in order, the root last
    roots: dict[str, str]


class Branches(NamedTuple):
    """A conditional on the way."""

    instruction: Instruction
    bytes: tuple[int, ...]  # of each branch, in the order of the HLO
    chosen: int


class Count(NamedTuple):
    """What one run of a program moves."""

    bytes: int = 0
    main: int = 0  # those of them in the main memory: the rest is in the chip's own
    kernels: int = 0
    copies: int = 0  # operations that do nothing but copy, of more than a kilobyte, within the main memory
    conditionals: tuple[Branches, ...] = ()

    def __add__(self, other: "Count") -> "Count":  # type: ignore[override]
        return Count(
            self.bytes + other.bytes,
            self.main + other.main,
            self.kernels + other.kernels,
            self.copies + other.copies,
            self.conditionals + other.conditionals,
        )

    def __mul__(self, times: int) -> "Count":  # type: ignore[override]
        return Count(
            self.bytes * times, self.main * times, self.kernels * times, self.copies * times, self.conditionals
        )


class Sent(NamedTuple):
    """The collectives of a program, those of all branches of its conditionals."""

    all_reduces: int
    all_gathers: int
    others: int
    bytes: int  # that one chip puts in


Choice = Callable[[Instruction, list[int]], int]


def dearest(conditional: Instruction, bytes_of_branches: list[int]) -> int:
    """The branch that moves most."""
    del conditional
    return max(range(len(bytes_of_branches)), key=bytes_of_branches.__getitem__)


def parsed(text: str) -> Hlo:
    """The text of a compiled program: `jax.stages.Compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry, here = "", ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            here = found[2]
            entry = here if found[1] else entry
            computations[here] = {}
        elif here and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3])
            computations[here][instruction.name] = instruction
            if found[1]:
                roots[here] = instruction.name
    if not entry:
        raise ValueError("This is no HLO: it has no ENTRY.")
    return Hlo(entry, computations, roots)


def _instruction(name: str, line: str) -> Instruction:
    shape = line[: _end(line, 0)] if line.startswith("(") else line.split(" ", 1)[0]
    found = _OPERATION.match(line, len(shape))
    if found is None:
        raise ValueError(f"This is no HLO: {line[:80]}")
    end = _end(line, found.end() - 1)
    inside = line[found.end() : end - 1]
    operands = (inside,) if found[1] == "parameter" else tuple(_NAME.findall(inside))  # a parameter has a number
    return Instruction(name, found[1], _buffers(shape), operands, line[end:])


def _end(line: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i + 1
    return len(line)


def _buffers(shape: str) -> tuple[Buffer, ...]:
    buffers = []
    for kind, dims, layout in _ARRAY.findall(shape):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim.removeprefix("<="))
        digits = re.search(r"\d+", kind)
        bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
        buffers.append(Buffer(-(-size * bits // 8), size == 1, re.search(r"S\([1-9]", layout) is None))
    return tuple(buffers)


def count(hlo: Hlo, choose: Choice = dearest) -> Count:
    """What a run moves in which `choose(conditional, bytes of its branches)` says which branch is taken."""
    known: dict[str, Count] = {}

    def of(name: str) -> Count:
        if name not in known:
            body = hlo.computations[name]
            known[name] = sum((one(each, body) for each in body.values()), Count())
        return known[name]

    def one(each: Instruction, body: dict[str, Instruction]) -> Count:
        if each.operation == "conditional":
            branches = [of(x) for x in each.called("branch_computations", "true_computation", "false_computation")]
            sizes = [x.bytes for x in branches]
            chosen = choose(each, sizes)
            return branches[chosen] + Count(conditionals=(Branches(each, tuple(sizes), chosen),))
        if each.operation == "while":
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.rest)
            return sum(map(of, each.called("condition", "body")), Count()) * (int(times[1]) if times else 1)
        if each.operation in ("call", "async-start"):
            return sum(map(of, each.called("to_apply", "calls")), Count())
        return _kernel(hlo, each, body)

    return of(hlo.entry)


def sent(hlo: Hlo) -> Sent:
    """What a chip sends in one run in which everything in the program happens once."""
    found: dict[str, list[int]] = {name: [] for name in _COLLECTIVES}
    for body in hlo.computations.values():
        for each in body.values():
            name = each.operation.removesuffix("-start")
            if name in found:
                buffers = [buffer for operand in each.operands for buffer in body[operand].buffers]
                found[name].append(sum(buffer.bytes for buffer in buffers))
    reduces, gathers, *others = found.values()
    return Sent(len(reduces), len(gathers), sum(map(len, others)), sum(map(sum, found.values())))


def _kernel(hlo: Hlo, each: Instruction, body: dict[str, Instruction]) -> Count:
    if each.operation in _FREE or each.operation.endswith(("-done", "-update")):
        return Count()
    if each.operation == "custom-call" and any(f'"{name}"' in each.rest for name in _FREE_CALLS):
        return Count()
    sources = {name: body[name].buffers for name in each.operands if name in body}
    if each.operation in ("copy-start", "slice-start"):
        # The result is (destination, source, flag) or ((source), destination, flag).
        to = each.buffers[0 if each.operation == "copy-start" else -2]
        source_in_main = all(buffer.main for buffers in sources.values() for buffer in buffers)
        main = to.bytes * (to.main + source_in_main)
        return Count(2 * to.bytes, main, 1, int(to.main and source_in_main and to.bytes > _LARGE))
    if each.operation == "fusion":
        read, written = _of_fusion(hlo, each, sources)
    elif each.operation in _PARTS:
        read, written = {each.operands[0]: each.buffers}, each.buffers
    elif each.operation == "dynamic-update-slice":
        read, written = {each.operands[1]: sources[each.operands[1]]}, sources[each.operands[1]]
    else:
        read, written = sources, each.buffers
        if all(buffer.single for buffers in (written, *read.values()) for buffer in buffers):
            return Count()
    moved = [buffer for buffers in (written, *read.values()) for buffer in buffers]
    total, main = (sum(b.bytes for b in moved if b.main or not only) for only in (False, True))
    copies = each.operation == "copy" and written[0].bytes > _LARGE and all(b.main for b in moved)
    return Count(total, main, 1, int(copies))


def _of_fusion(
    hlo: Hlo, fusion: Instruction, sources: dict[str, tuple[Buffer, ...]]
) -> tuple[dict[str, tuple[Buffer, ...]], tuple[Buffer, ...]]:
    """What it reads of each operand and what it writes."""
    (name,) = fusion.called("calls")
    body = hlo.computations[name]
    parameters = {each.operands[0]: each.name for each in body.values() if each.operation == "parameter"}
    updated = _updates(body, hlo.roots[name])
    read: dict[str, tuple[Buffer, ...]] = {}
    for number, source in enumerate(fusion.operands):
        parts = _parts_read(body, parameters[str(number)])
        whole = sources.get(source, ())
        used = whole if parts is None else tuple(Buffer(x.bytes, x.single, whole[0].main) for x in parts)
        before = read.get(source, ())
        read[source] = max(before, used, key=lambda buffers: sum(b.bytes for b in buffers))
    written = tuple(
        Buffer(updated[i].bytes, updated[i].single, buffer.main) if i in updated else buffer
        for i, buffer in enumerate(fusion.buffers)
    )
    return read, written


def _parts_read(body: dict[str, Instruction], name: str) -> list[Buffer] | None:
    """The parts of a parameter that are read, if it is read in parts; None: all of it."""
    parts: list[Buffer] = []
    for each in body.values():
        if name not in each.operands:
            continue
        if each.operation == "bitcast":
            inner = _parts_read(body, each.name)
            if inner is None:
                return None
            parts += inner
        elif each.operation in _PARTS and each.operands[0] == name and name not in each.operands[1:]:
            parts += each.buffers
        elif each.operation == "dynamic-update-slice" and each.operands[0] == name and name not in each.operands[1:]:
            pass  # written in place
        else:
            return None
    return parts


def _updates(body: dict[str, Instruction], root: str) -> dict[int, Buffer]:
    """Which results are an operand with a part of it overwritten, and the part."""
    last = body[root]
    results = last.operands if last.operation == "tuple" else (root,)
    found = {}
    for i, name in enumerate(results):
        each = body[name]
        while each.operation == "bitcast":
            each = body[each.operands[0]]
        if each.operation == "dynamic-update-slice":
            found[i] = body[each.operands[1]].buffers[0]
    return found

"""Parse the text of a compiled program (HLO): instructions, shapes, trip counts of loops."""

import dataclasses
import math
import re

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO; `shape` and `attributes` are its text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    def called(self) -> list[str]:
        """Return the computations that run as part of this instruction, without loop conditions."""
        names = []
        for one, branches in _CALLED.findall(self.attributes):
            names += [one] if one else [b.strip().lstrip("%") for b in branches.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed module: computations by name, each a dict of instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_partitions: int


def parse(text: str) -> Program:
    """Return the program in the text of `Compiled.as_text()`.

    Raises ValueError if it holds no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    # Computations begin at the margin, and their instructions are indented, one a line.
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    # In the module's first line, which lists layouts of all arguments and may be long.
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Program(computations, entry, int(partitions.group(1)) if partitions else 1)


def trip_count(program: Program, body: dict[str, Instruction], loop: Instruction) -> int:
    """Return how often a loop runs that counts up to a constant.

    Scans are such loops, as are those that overlap a product with its collective. Raises ValueError
    for any other.
    """
    # XLA writes the count down if it has proved it. Else it follows from the limit in the
    # condition, the increment in the body and the start in the carried tuple.
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition = program.computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)[1]]
    counter = [i for i in condition.values() if i.opcode == "get-tuple-element"]
    limits = _constants(program, condition)
    # Two limits or counters would be a `while` of the program's own, of unknown length.
    if len(limits) != 1 or len(counter) != 1:
        raise ValueError(f"unknown number of runs of the loop {loop.name}: it ends at {limits}")
    index = int(re.search(r"index=(\d+)", counter[0].attributes)[1])
    inside = program.computations[re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)[1]]
    (result,) = (i for i in inside.values() if i.root)
    steps = _added(program, inside, result.operands[index])
    if len(steps) != 1:
        raise ValueError(f"unknown number of runs of the loop {loop.name}: it counts by {steps}")
    first, carried = 0, _origin(body, loop.operands[0])
    if carried is not None and carried.opcode == "tuple":
        start = _origin(body, carried.operands[index])
        first = _value(start) or 0 if start is not None else 0  # scans count from 0
    # Rounded up: the last run may pass the limit.
    return -(-(limits.pop() - first) // steps.pop())


def _added(program: Program, body: dict[str, Instruction], name: str) -> set[int]:
    """Return the constants that an addition adds, which may be fused."""
    instruction = _origin(body, name)
    if instruction.opcode == "fusion":
        return _constants(program, program.computations[instruction.called()[0]])
    values = [_value(_origin(body, operand)) for operand in instruction.operands]
    return {value for value in values if value is not None}


def _origin(body: dict[str, Instruction], name: str) -> Instruction | None:
    """Return the instruction that makes a value, before copies of it."""
    instruction = body.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = body.get(instruction.operands[0])
    return instruction


def _value(instruction: Instruction) -> int | None:
    """Return the value of an integer constant; None for any other instruction."""
    if instruction.opcode != "constant" or not re.match(r"[su]\d+\[\]", instruction.shape):
        return None
    return int(re.match(r"\((-?\d+)\)", instruction.attributes)[1])


def _constants(program: Program, computation: dict[str, Instruction]) -> set[int]:
    """Return the integer constants of a computation and of those that it calls."""
    found = {_value(instruction) for instruction in computation.values()} - {None}
    for instruction in computation.values():
        for called in instruction.called():
            found |= _constants(program, program.computations[called])
    return found


def shape_bytes(shape: str, *, main_memory: bool = False) -> int:
    """Return the bytes of a shape such as `f32[8,128]{1,0}`, or of all of a tuple's.

    With `main_memory`, without the arrays that the compiler has put into on-chip memory: `S(1)`.
    """
    return sum(
        _bits(kind) * math.prod(_numbers(sizes)) // 8
        for kind, sizes, layout in _SHAPE.findall(shape)
        if not (main_memory and re.search(r"S\([1-9]\)", layout))
    )


def shapes(shape: str) -> list[str]:
    """Return the arrays of a shape: itself, or those of a tuple in order."""
    return [match.group() for match in _SHAPE.finditer(shape)]


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line.strip())  # long tuples have comments: /*index=5*/
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opens : closes + 1]))
    opcode = rest[:opens]
    attributes = rest[closes + 1 :]
    # A constant's value and a parameter's number stand where others have operands.
    if opcode in ("constant", "parameter"):
        attributes = rest[opens:]
    root = line.startswith("ROOT ")
    return Instruction(name.lstrip("%"), shape, opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


def dims(shape: str) -> list[int]:
    """Return the sizes of a shape such as `f32[8,128]{1,0}`: [8, 128]."""
    return _numbers(_SHAPE.search(shape).group(2))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8  # a byte for each truth value
    digits = re.search(r"\d+", kind)  # the first: f8e4m3fn has 8 bits
    return int(digits.group()) if digits else 0  # a token has no bits

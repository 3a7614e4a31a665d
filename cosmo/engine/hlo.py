"""What one execution of a compiled program costs, counted from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs. All
numbers are for one device.
"""

import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Nothing is computed or moved by these.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8": 8, "bf16": 16, "c64": 64, "c128": 128}
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

    def called(self) -> list[str]:
        """Computations that run as part of this instruction, but for a loop's condition."""
        names = []
        for one, branches in _CALLED.findall(self.attributes):
            names += [one] if one else [b.strip().lstrip("%") for b in branches.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Cost:
    """Sums over one execution on one device. Bytes of a collective: the larger of what goes in and
    what comes out."""

    matmul_flops: float = 0.0
    hbm_bytes: float = 0.0
    # kind -> (participating devices -> bytes)
    collectives: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

    def collective_bytes(self) -> dict[str, float]:
        """kind -> bytes, over all group sizes."""
        return {kind: sum(by_size.values()) for kind, by_size in self.collectives.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed module: computations by name, each a dict of instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_partitions: int


def parse(text: str) -> Program:
    """Read the text of `Compiled.as_text()`. Raises ValueError if it holds no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
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
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Program(computations, entry, int(partitions.group(1)) if partitions else 1)


def cost(program: Program) -> Cost:
    """The cost of running `program` once."""

    @functools.cache
    def of(name: str, fused: bool) -> Cost:
        body = program.computations[name]
        total = Cost()
        for instruction in body.values():
            total = _add(total, _own_cost(program, body, instruction, fused))
            times = 1
            if instruction.opcode == "while":
                times = trip_count(program, body, instruction)
            for called in instruction.called():
                if called in program.computations:
                    inside = fused or instruction.opcode == "fusion"
                    total = _add(total, of(called, inside), times)
        return total

    return of(program.entry, False)


def trip_count(program: Program, body: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop of a fixed length runs: one that counts up to a constant, as a scan does."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes).group(1)
    limits = set(_integer_constants(program, condition))
    if len(limits) != 1:
        raise ValueError(f"cannot tell how often {loop.name} runs: its condition has {limits}")
    return limits.pop() - _start(program, body, loop, condition)


def shape_bytes(shape: str) -> int:
    """Bytes of a shape such as `f32[8,128]{1,0}`, or of all of a tuple's."""
    return sum(_bits(kind) * _product(dims) // 8 for kind, dims, _ in _SHAPE.findall(shape))


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line.strip())
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opens : closes + 1]))
    opcode = rest[:opens]
    attributes = rest[closes + 1 :]
    if opcode in ("constant", "parameter"):  # the value or the number
        attributes = rest[opens:]
    return Instruction(name.lstrip("%"), shape, opcode, operands, attributes)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


def _own_cost(program, body, instruction: Instruction, fused: bool) -> Cost:
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        size = _collective_bytes(body, instruction, started=opcode != kind)
        group = _group_size(instruction.attributes, program.num_partitions)
        return Cost(hbm_bytes=2.0 * size, collectives={kind: {group: size}})
    flops = 0.0
    if opcode in ("dot", "convolution"):
        operands = [body[name].shape for name in instruction.operands[:2]]
        count = _dot_flops if opcode == "dot" else _convolution_flops
        flops = count(instruction, *operands)
    moved = 0.0
    if not fused and opcode not in _FREE and not opcode.endswith("-done"):
        moved = _moved_bytes(program, body, instruction)
    return Cost(matmul_flops=flops, hbm_bytes=moved)


def _collective_bytes(body, instruction: Instruction, started: bool) -> float:
    """The larger of operands and result; the result of a `-start` is a tuple that holds both."""
    given = sum(shape_bytes(body[name].shape) for name in instruction.operands)
    result = shape_bytes(instruction.shape)
    if started and instruction.opcode != "all-reduce-start":
        result -= given
    return float(max(given, result))


def _group_size(attributes: str, everyone: int) -> int:
    """Devices of one group: replica_groups={{0,1},{2,3}}, [16,2]<=[32] or a mesh's named axes."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed.group(1).count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota.group(2))
    mesh = re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        axes = re.findall(r"'(\w+)'", mesh.group(2))
        return math.prod(int(sizes[axis]) for axis in axes)
    return everyone


def _dot_flops(instruction: Instruction, lhs: str, rhs: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = _dims(lhs)
    indices = [int(i) for i in contracted.group(1).split(",") if i] if contracted else []
    return 2.0 * math.prod(_dims(instruction.shape)) * math.prod(dims[i] for i in indices)


def _convolution_flops(instruction: Instruction, lhs: str, rhs: str) -> float:
    """Multiply-adds of a convolution, as which a TPU's compiler writes every product.

    Batch dimensions appear as spatial ones with padding and dilation: only places where a window
    meets the input count.
    """
    text = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    given, kernel, out = (
        dict(zip(label, _dims(shape), strict=True))
        for label, shape in zip(labels, (lhs, rhs, instruction.shape), strict=True)
    )
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{(.*?)\}", text) or [""])[0])
    )
    rank = len(out) - 2

    def numbers(name, default):
        return window[name].split("x") if name in window else [default] * rank

    meetings = 1
    for axis in range(rank):
        low = int(numbers("pad", "0_0")[axis].split("_")[0])
        stride, lhs_dilate, rhs_dilate = (
            int(numbers(name, "1")[axis]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        label = str(axis)
        places = np.arange(out[label])[:, None] * stride - low
        places = places + np.arange(kernel[label]) * rhs_dilate
        inside = (places >= 0) & (places <= (given[label] - 1) * lhs_dilate)
        meetings *= int(np.sum(inside & (places % lhs_dilate == 0)))

    def group(name):
        found = re.search(rf"\b{name}_group_count=(\d+)", text)
        return int(found.group(1)) if found else 1

    contracted = given["f"] // group("feature")
    return 2.0 * contracted * kernel["o"] * (given["b"] // group("batch")) * meetings


def _moved_bytes(program, body, instruction: Instruction) -> float:
    """Bytes read and written in main memory; of a slice of an array only the slice counts."""
    opcode = instruction.opcode
    result = _main_memory_bytes(instruction.shape)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * result
    if opcode == "dynamic-update-slice":
        return 2.0 * _main_memory_bytes(body[instruction.operands[1]].shape)
    reads = [_main_memory_bytes(body[name].shape) for name in instruction.operands]
    called = instruction.called()
    if opcode == "fusion" and called and called[0] in program.computations:
        inner = program.computations[called[0]]
        for number in range(len(reads)):
            part = _part_read(program, inner, number)
            if part is not None:
                reads[number] = min(reads[number], part)
        updates = [i for i in inner.values() if i.opcode == "dynamic-update-slice"]
        for update in updates:  # written in place: the array around it is not touched
            whole, part = shape_bytes(update.shape), shape_bytes(inner[update.operands[1]].shape)
            result = max(result - whole + part, part)
    return float(sum(reads) + result)


def _part_read(program: Program, inner: dict[str, Instruction], number: int) -> int | None:
    """Bytes that a fusion reads of operand `number`, if it only slices it, or updates it in place.

    None: it reads all of it. Fusions hold fusions, so slices may lie deeper.
    """
    own = [
        i
        for i in inner.values()
        if i.opcode == "parameter" and i.attributes.startswith(f"({number})")
    ]
    names, total = {i.name for i in own}, 0
    for user in inner.values():
        places = [place for place, name in enumerate(user.operands) if name in names]
        if not places:
            continue
        called = user.called()
        if user.opcode == "bitcast":
            names.add(user.name)
        elif user.opcode in ("dynamic-slice", "slice") and places == [0]:
            total += shape_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and places == [0]:
            continue
        elif user.opcode == "fusion" and called[0] in program.computations:
            for place in places:
                part = _part_read(program, program.computations[called[0]], place)
                if part is None:
                    return None
                total += part
        else:
            return None
    return total


def _main_memory_bytes(shape: str) -> int:
    """As `shape_bytes`, without what the compiler has put into on-chip memory: `S(1)`."""
    return sum(
        _bits(kind) * _product(dims) // 8
        for kind, dims, layout in _SHAPE.findall(shape)
        if not re.search(r"S\([1-9]\)", layout)
    )


def _integer_constants(program: Program, name: str) -> list[int]:
    found = []
    for instruction in program.computations[name].values():
        value = re.match(r"\((\d+)\)", instruction.attributes)
        if instruction.opcode == "constant" and value and instruction.shape.startswith("s32[]"):
            found.append(int(value.group(1)))
        for called in instruction.called():
            found += _integer_constants(program, called)
    return found


def _start(program: Program, body, loop: Instruction, condition: str) -> int:
    """Where the loop's counter starts, if that can be read; else 0, as in every scan."""
    reads = [i for i in program.computations[condition].values() if i.opcode == "get-tuple-element"]
    carried = body.get(loop.operands[0])
    if len(reads) != 1 or carried is None or carried.opcode != "tuple":
        return 0
    index = int(re.search(r"index=(\d+)", reads[0].attributes).group(1))
    first = body.get(carried.operands[index])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = body.get(first.operands[0])
    value = re.match(r"\((\d+)\)", first.attributes) if first is not None else None
    return int(value.group(1)) if value and first.opcode == "constant" else 0


def _add(total: Cost, more: Cost, times: int = 1) -> Cost:
    collectives = {kind: dict(by_size) for kind, by_size in total.collectives.items()}
    for kind, by_size in more.collectives.items():
        mine = collectives.setdefault(kind, {})
        for size, count in by_size.items():
            mine[size] = mine.get(size, 0.0) + times * count
    return Cost(
        total.matmul_flops + times * more.matmul_flops,
        total.hbm_bytes + times * more.hbm_bytes,
        collectives,
    )


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _SHAPE.search(shape).group(2).split(",") if d]


def _product(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _bits(kind: str) -> int:
    known = _BITS.get(kind) or _BITS.get(kind[:2])
    if known:
        return known
    digits = re.search(r"\d+", kind)
    if not digits:
        return 0  # a token
    return int(digits.group())

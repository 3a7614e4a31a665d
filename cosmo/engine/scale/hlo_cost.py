"""What one execution of a compiled program costs, counted from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs. All
numbers are for one device.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from cosmo.engine.scale import hlo

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


@dataclasses.dataclass(frozen=True)
class Cost:
    """Sums over one execution on one device.

    Bytes of a collective are the larger of its operands and its results.
    """

    matmul_flops: float = 0.0
    hbm_bytes: float = 0.0
    # kind -> (participating devices -> bytes)
    collectives: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

    def collective_bytes(self) -> dict[str, float]:
        """Kind -> bytes, over all group sizes."""
        return {kind: sum(by_size.values()) for kind, by_size in self.collectives.items()}


def cost(program: hlo.Program) -> Cost:
    """The cost of running `program` once. Raises ValueError for a loop of unknown length."""

    @functools.cache
    def of(name: str, fused: bool) -> Cost:
        body, total, channels = program.computations[name], Cost(), set()
        for instruction in body.values():
            total = _add(total, _own_cost(program, body, instruction, fused))
            if instruction.opcode == "fusion" and not fused:
                # A collective that products hide stands in several fusions: its start, the steps
                # that it runs beside, its end. Its channel tells that it is one.
                for channel, one in _hidden_collectives(program, instruction).items():
                    if channel not in channels:
                        channels.add(channel)
                        total = _add(total, one)
            times = 1
            if instruction.opcode == "while":
                times = hlo.trip_count(program, body, instruction)
            for called in instruction.called():
                if called in program.computations:
                    inside = fused or instruction.opcode == "fusion"
                    total = _add(total, of(called, inside), times)
        return total

    return of(program.entry, False)


def _hidden_collectives(program: hlo.Program, fusion: hlo.Instruction) -> dict[str, Cost]:
    """Channel -> cost of the collectives inside a fusion, and inside those within it."""
    found = {}
    for name in fusion.called():
        body = program.computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = channel.group(1) if channel else instruction.name
                found[key] = _own_cost(program, body, instruction, False)
            elif instruction.opcode == "fusion":
                found.update(_hidden_collectives(program, instruction))
    return found


def _own_cost(program, body, instruction: hlo.Instruction, fused: bool) -> Cost:
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind in COLLECTIVES and fused:
        return Cost()  # see _hidden_collectives
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


def _collective_bytes(body, instruction: hlo.Instruction, started: bool) -> float:
    """The larger of operands and result; the result of a `-start` is a tuple that holds both."""
    given = sum(hlo.shape_bytes(body[name].shape) for name in instruction.operands)
    result = hlo.shape_bytes(instruction.shape)
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


def _dot_flops(instruction: hlo.Instruction, lhs: str, rhs: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = hlo.dims(lhs)
    indices = [int(i) for i in contracted.group(1).split(",") if i] if contracted else []
    return 2.0 * math.prod(hlo.dims(instruction.shape)) * math.prod(dims[i] for i in indices)


def _convolution_flops(instruction: hlo.Instruction, lhs: str, rhs: str) -> float:
    """Multiply-adds of a convolution, as which a TPU's compiler writes every product.

    Batch dimensions appear as spatial ones with padding and dilation: only places where a window
    meets the input count.
    """
    text = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    given, kernel, out = (
        dict(zip(label, hlo.dims(shape), strict=True))
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


def _moved_bytes(program, body, instruction: hlo.Instruction) -> float:
    """Bytes read and written in main memory; of a slice of an array only the slice counts."""
    opcode = instruction.opcode
    result = hlo.main_memory_bytes(instruction.shape)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * result
    if opcode == "dynamic-update-slice":
        return 2.0 * hlo.main_memory_bytes(body[instruction.operands[1]].shape)
    reads = [hlo.main_memory_bytes(body[name].shape) for name in instruction.operands]
    called = instruction.called()
    if opcode == "fusion" and called and called[0] in program.computations:
        inner = program.computations[called[0]]
        for number in range(len(reads)):
            part = _part_read(program, inner, number)
            if part is not None:
                reads[number] = min(reads[number], part)
        updates = [i for i in inner.values() if i.opcode == "dynamic-update-slice"]
        for update in updates:  # written in place: the array around it is not touched
            whole, part = (
                hlo.shape_bytes(update.shape),
                hlo.shape_bytes(inner[update.operands[1]].shape),
            )
            result = max(result - whole + part, part)
    return float(sum(reads) + result)


def _part_read(program: hlo.Program, inner: dict[str, hlo.Instruction], number: int) -> int | None:
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
            total += hlo.shape_bytes(user.shape)
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

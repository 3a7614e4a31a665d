"""Count the cost of one execution of a compiled program from its HLO text.

All numbers are for one device.
"""

# Why not XLA's own `cost_analysis`: it counts the body of a loop once, however often it runs.

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

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
# These compute and move nothing; a `while` and an asynchronous call are counted by their bodies.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "async-start", "async-update"),
}
# An all-reduce is a reduce-scatter and then an all-gather.
_LINK_CROSSINGS = {"all-reduce": 2.0}  # of a byte of a collective's result; others once


@dataclasses.dataclass(frozen=True)
class Cost:
    """Sums over one execution on one device.

    `collectives` maps (kind, participating devices) to bytes: the larger of operands and results.
    """

    matmul_flops: float = 0.0
    hbm_bytes: float = 0.0
    # The parts of both that are kernels' own estimates.
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0
    collectives: collections.Counter[tuple[str, int]] = dataclasses.field(
        default_factory=collections.Counter
    )

    def collective_bytes(self) -> dict[str, float]:
        """Return the bytes of each kind of collective, over all group sizes."""
        total: collections.Counter[str] = collections.Counter()
        for (kind, _), size in self.collectives.items():
            total[kind] += size
        return dict(total)

    def link_bytes(self) -> dict[str, float]:
        """Return the bytes that a device must receive, by kind of collective."""
        # A device gathers all but its own part.
        total: collections.Counter[str] = collections.Counter()
        for (kind, group), size in self.collectives.items():
            total[kind] += size * _LINK_CROSSINGS.get(kind, 1.0) * (group - 1) / group
        return dict(total)

    def plus(self, more: "Cost", times: int = 1) -> "Cost":
        """Return this cost with `more` added `times` times."""
        repeated = {key: times * size for key, size in more.collectives.items()}
        return Cost(
            self.matmul_flops + times * more.matmul_flops,
            self.hbm_bytes + times * more.hbm_bytes,
            self.kernel_flops + times * more.kernel_flops,
            self.kernel_bytes + times * more.kernel_bytes,
            self.collectives + collections.Counter(repeated),
        )


def cost(program: hlo.Program) -> Cost:
    """Return the cost of running `program` once. Raises ValueError for a loop of unknown length."""
    return costs(program)(program.entry, False)


def costs(program: hlo.Program) -> Callable[[str, bool], Cost]:
    """Return a function: (computation's name, whether inside a fusion) to the cost of one run."""

    @functools.cache
    def of(name: str, fused: bool) -> Cost:
        body, total = program.computations[name], Cost()
        channels = set(continued_channels(program, body))
        for instruction in body.values():
            total = total.plus(own_cost(program, body, instruction, fused))
            if instruction.opcode == "fusion" and not fused:
                # A collective hidden behind products stands in several fusions: its start, the
                # steps that it runs beside, its end. It has one channel, and is counted once.
                for channel, one in fused_collectives(program, instruction).items():
                    if channel not in channels:
                        channels.add(channel)
                        total = total.plus(one)
            # A conditional counts all its branches: for the step of "skip", both.
            times = 1
            if instruction.opcode == "while":
                times = hlo.trip_count(program, body, instruction)
            for called in instruction.called():
                if called in program.computations:
                    inside = fused or instruction.opcode == "fusion"
                    total = total.plus(of(called, inside), times)
        return total

    return of


def fused_collectives(program: hlo.Program, fusion: hlo.Instruction) -> dict[str, Cost]:
    """Return {channel: cost} of the collectives inside a fusion, and in fusions within it."""
    found = {}
    for name in fusion.called():
        body = program.computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = channel.group(1) if channel else instruction.name
                one = own_cost(program, body, instruction)
                if _is_scattered(body, instruction):
                    kinds = {
                        ("reduce-scatter", n): size for (_, n), size in one.collectives.items()
                    }
                    one = dataclasses.replace(one, collectives=collections.Counter(kinds))
                found[key] = one
            elif instruction.opcode == "fusion":
                found.update(fused_collectives(program, instruction))
    return found


def continued_channels(program: hlo.Program, body: dict[str, hlo.Instruction]) -> set[str]:
    """Return the channels that a computation's fusions continue, started by another computation."""
    # A product that hides a collective may run in a loop between the start and the end.
    fusions = [i for i in body.values() if i.opcode == "fusion"]
    channels = {key for fusion in fusions for key in fused_collectives(program, fusion)}
    channels -= _started_channels(program, [body])
    return channels and channels & _started_channels(program, program.computations.values())


def _started_channels(program: hlo.Program, bodies) -> set[str]:
    """Return the channels that fusions of these computations start."""
    found: set[str] = set()
    for body in bodies:
        for fusion in body.values():
            inner = program.computations.get((fusion.called() or [""])[0], {})
            starts = 'custom_call_target="AsyncCollectiveStart"'
            if fusion.opcode == "fusion" and any(starts in i.attributes for i in inner.values()):
                found |= set(fused_collectives(program, fusion))
    return found


def own_cost(program, body, instruction: hlo.Instruction, fused: bool = False) -> Cost:
    """Return the cost of one instruction of `body`, without the computations that it calls."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind in COLLECTIVES and fused:
        return Cost()  # `fused_collectives` counts it
    if kind in COLLECTIVES:
        size = _collective_bytes(body, instruction, started=opcode != kind)
        group = _group_size(instruction.attributes, program.num_partitions)
        moved = 2.0 * size  # read and written
        return Cost(hbm_bytes=moved, collectives=collections.Counter({(kind, group): size}))
    # A kernel's instructions are not in the text, its `pl.CostEstimate` is.
    kernel = re.search(
        r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.attributes
    )
    if opcode == "custom-call" and kernel:
        flops, moved = map(float, kernel.groups())
        return Cost(flops, moved, flops, moved)
    flops = 0.0
    if opcode in ("dot", "convolution"):
        operands = [body[name].shape for name in instruction.operands[:2]]
        count = _dot_flops if opcode == "dot" else _convolution_flops
        flops = count(instruction, *operands)
    # Inside a fusion values stay in registers: only the fusion's own operands and results move.
    moved = 0.0
    # The `-start` of an asynchronous operation has counted for its `-done` too.
    if not fused and opcode not in _FREE and not opcode.endswith("-done"):
        moved = _moved_bytes(program, body, instruction)
    return Cost(matmul_flops=flops, hbm_bytes=moved)


def _collective_bytes(body, instruction: hlo.Instruction, started: bool) -> float:
    """Return the larger of the operands' bytes and the result's."""
    given = sum(hlo.shape_bytes(body[name].shape) for name in instruction.operands)
    result = hlo.shape_bytes(instruction.shape)
    # The result of a `-start` is a tuple that holds the operands too.
    if started and instruction.opcode != "all-reduce-start":
        result -= given
    return float(max(given, result))


def _is_scattered(body, instruction: hlo.Instruction) -> bool:
    """Return whether a fused all-reduce is one of which each device keeps only its part."""
    # libtpu writes a reduce-scatter so, as one `AllReduceScatterFusion`, or as a loop of
    # permutations beside the product (v5e). Its bytes cross the links once.
    if instruction.opcode != "all-reduce":
        return False
    names, sliced = {instruction.name}, False
    for user in body.values():
        if names.isdisjoint(user.operands):
            continue
        if user.opcode in ("get-tuple-element", "bitcast"):
            names.add(user.name)
        elif user.opcode == "dynamic-slice":
            sliced = True
        else:
            return False
    return sliced


def _group_size(attributes: str, everyone: int) -> int:
    """Return the devices of one group, from any of the three forms that XLA writes."""
    # replica_groups={{0,1},{2,3}}, [16,2]<=[32], or the named axes of a mesh.
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
    # Each element of the result is a sum over the contracted axes: a multiply-add counts as two.
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = hlo.dims(lhs)
    indices = [int(i) for i in contracted.group(1).split(",") if i] if contracted else []
    return 2.0 * math.prod(hlo.dims(instruction.shape)) * math.prod(dims[i] for i in indices)


def _convolution_flops(instruction: hlo.Instruction, lhs: str, rhs: str) -> float:
    """Return the operations of a convolution, a multiply-add counted as two."""
    # A TPU's compiler writes every product as a convolution. Batch dimensions appear as spatial
    # ones with padding and dilation: only places where a window meets the input count.
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
        # The places of the (dilated, padded) input that each window of the kernel meets.
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
    """Return the bytes read and written in main memory."""
    # A slice of an array, or an update in place, touches only the slice.
    size = functools.partial(hlo.shape_bytes, main_memory=True)
    opcode = instruction.opcode
    if opcode in ("copy-start", "slice-start"):
        # A copy into on-chip memory beside other work. Its tuple names the source too.
        place = 0 if opcode == "copy-start" else 1
        target = hlo.shapes(instruction.shape)[place]
        reads_memory = size(body[instruction.operands[0]].shape) > 0
        return float(size(target) + (hlo.shape_bytes(target) if reads_memory else 0))
    result = size(instruction.shape)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * result  # read and written
    if opcode == "dynamic-update-slice":
        return 2.0 * size(body[instruction.operands[1]].shape)
    reads = [size(body[name].shape) for name in instruction.operands]
    called = instruction.called()
    if opcode == "fusion" and called and called[0] in program.computations:
        inner = program.computations[called[0]]
        result -= _results_unwritten(inner, instruction)
        for number in range(len(reads)):
            part = _part_read(program, inner, number)
            if part is not None:
                reads[number] = min(reads[number], part)
        for update in inner.values():
            if update.opcode == "dynamic-update-slice":
                part = hlo.shape_bytes(inner[update.operands[1]].shape)
                result = max(result - hlo.shape_bytes(update.shape) + part, part)
    return float(sum(reads) + result)


def _results_unwritten(inner: dict[str, hlo.Instruction], fusion: hlo.Instruction) -> int:
    """Return the bytes of a fusion's results that belong to collectives within it."""
    # `fused_collectives` counts them, once for all fusions of a channel. Between the first and the
    # last, the arrays pass through fusions as parameters that are results too.
    root = next((i for i in inner.values() if i.root), None)
    arrays = hlo.shapes(fusion.shape)
    if root is None:
        return 0
    if _is_collective_part(root):
        return hlo.shape_bytes(fusion.shape, main_memory=True)
    if root.opcode != "tuple" or len(root.operands) != len(arrays):
        return 0
    passed = "output_to_operand_aliasing" in fusion.attributes
    return sum(
        hlo.shape_bytes(array, main_memory=True)
        for name, array in zip(root.operands, arrays, strict=True)
        if _is_collective_part(inner[name]) or (passed and inner[name].opcode == "parameter")
    )


def _is_collective_part(instruction: hlo.Instruction) -> bool:
    """Return whether this is a collective, or libtpu's start or end of one in a fusion."""
    return (
        instruction.opcode.removesuffix("-start") in COLLECTIVES
        or 'custom_call_target="AsyncCollective' in instruction.attributes
    )


def _part_read(program: hlo.Program, inner: dict[str, hlo.Instruction], number: int) -> int | None:
    """Return the bytes that a fusion reads of operand `number`, None if it reads all of it.

    A fusion may only slice an operand, or update it in place. Fusions within it are followed.
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
        # A bitcast is the same memory under another shape, so its users count too.
        if user.opcode == "bitcast":
            names.add(user.name)
        elif _is_collective_part(user):
            continue  # counted with the collective
        elif user.opcode == "tuple" and user.root:
            continue  # passed through in place
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

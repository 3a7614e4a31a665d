"""Count the time of collectives that no computation hides, from a compiled program's HLO text.

All numbers are seconds of one device, at the chip's peaks.
"""

import collections
import functools
from collections.abc import Iterable

from cosmo.engine.scale import chips, hlo, hlo_cost


def exposed_seconds(program: hlo.Program, chip: chips.Chip) -> dict[str, float] | None:
    """Return the exposed seconds of each kind of collective in one execution of `program`.

    None if a peak of `chip` is not known. Raises ValueError for a loop of unknown length.
    """
    if not (chip.matmul_flops and chip.hbm_bytes_per_second and chip.link_bytes_per_second):
        return None
    cost_of = hlo_cost.costs(program)

    def working(cost: hlo_cost.Cost) -> float:
        products = cost.matmul_flops / chip.matmul_flops
        return max(products, cost.hbm_bytes / chip.hbm_bytes_per_second)

    def sending(costs: Iterable[hlo_cost.Cost]) -> dict[str, float]:
        total: collections.Counter[str] = collections.Counter()
        for cost in costs:
            total.update(cost.link_bytes())
        return {kind: size / chip.link_bytes_per_second for kind, size in total.items()}

    # The text of a compiled program is scheduled: its order is the order of execution.
    @functools.cache
    def run(name: str) -> _Timeline:
        body, line = program.computations[name], _Timeline()
        elsewhere = hlo_cost.continued_channels(program, body)
        fused = {
            i.name: {
                channel: cost
                for channel, cost in hlo_cost.fused_collectives(program, i).items()
                if channel not in elsewhere
            }
            for i in body.values()
            if i.opcode == "fusion"
        }
        first, last = _ends(fused)
        starts: dict[str, str] = {}  # the start of which an instruction is an update
        for instruction in body.values():
            opcode, operands = instruction.opcode, instruction.operands
            own = hlo_cost.own_cost(program, body, instruction)
            called = [one for one in instruction.called() if one in program.computations]
            if opcode in ("while", "conditional", "call"):
                # A conditional counts all its branches, as in `hlo_cost.cost`.
                times = hlo.trip_count(program, body, instruction) if opcode == "while" else 1
                for one in called:
                    line.repeat(run(one), times)
            elif opcode == "fusion":
                channels = fused[instruction.name]
                # The fusions between hide a channel, not those that start and end it.
                for channel in channels:
                    if last[channel] == instruction.name != first[channel]:
                        line.end(channel)
                line.work(working(sum_costs([own, *(cost_of(one, True) for one in called)])))
                for channel, cost in channels.items():
                    if first[channel] == instruction.name:
                        line.start(channel, sending([cost]))
                    if first[channel] == last[channel]:
                        line.end(channel)
            elif opcode == "async-start":
                line.start(instruction.name, sending(cost_of(one, False) for one in called))
            elif opcode.endswith("-update"):
                starts[instruction.name] = starts.get(operands[0], operands[0])
            elif opcode.endswith("-done"):
                line.end(starts.get(operands[0], operands[0]))
            elif own.collectives:
                line.start(instruction.name, sending([own]))
                if not opcode.endswith("-start"):
                    line.end(instruction.name)
            # Asynchronous copies run beside other work, so they would count twice.
            elif not opcode.endswith("-start"):
                line.work(working(own))
        for key in list(line.pending):
            line.end(key)
        return line

    return dict(run(program.entry).exposed)


def sum_costs(costs: Iterable[hlo_cost.Cost]) -> hlo_cost.Cost:
    """Return the sum of costs."""
    return functools.reduce(hlo_cost.Cost.plus, costs, hlo_cost.Cost())


class _Timeline:
    """The instructions of a computation so far.

    `work_left` seconds of work hide nothing yet; `pending` has the seconds still to send, by kind,
    of each collective that has started.
    """

    def __init__(self):
        self.work_left = 0.0
        self.exposed: collections.Counter[str] = collections.Counter()
        self.pending: dict[str, dict[str, float]] = {}

    def work(self, seconds: float) -> None:
        """Hide collectives behind `seconds` of work, in the order in which they started."""
        # They share the links, so a second of work hides a second of all together.
        for times in self.pending.values():
            for kind in times:
                hidden = min(times[kind], seconds)
                times[kind] -= hidden
                seconds -= hidden
        self.work_left += seconds

    def start(self, key: str, times: dict[str, float]) -> None:
        """Begin a collective of these seconds by kind."""
        self.pending[key] = dict(times)

    def end(self, key: str) -> None:
        """Expose what no work has hidden of a collective; nothing for an unknown key."""
        self.exposed.update(self.pending.pop(key, {}))

    def repeat(self, inner: "_Timeline", times: int) -> None:
        """Run a whole computation `times` times."""
        # Inside, some of its work has hidden its own collectives.
        self.exposed.update({kind: times * left for kind, left in inner.exposed.items()})
        self.work(times * inner.work_left)


def _ends(fused: dict[str, dict[str, hlo_cost.Cost]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the first and the last fusion of each channel."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for name, channels in fused.items():
        for channel in channels:
            first.setdefault(channel, name)
            last[channel] = name
    return first, last

"""Plan a training step on absent devices: whether it fits, its cost, its highest speed.

The step is the one that `train` runs (`step.compile_step`). For a TPU slice libtpu compiles it, for
CPU devices XLA does. For GPUs, whose compiler needs the GPU, all numbers are arithmetic.
"""

import collections
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.model import models, partitioning
from cosmo.engine.model.step import (
    StepConfig,
    check_bad_step_policy,
    compile_step,
    state_shardings,
)
from cosmo.engine.scale import chips, hlo, hlo_cost, overlap, sizing

_GPUS_A_HOST = 8  # of DGX and cloud machines


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """The settings of `train` that shape its step."""

    model: models.EncoderDecoderModel
    dataset: datasets.DatasetConfig
    step: StepConfig = StepConfig()
    partitioner: partitioning.Partitioner = partitioning.Partitioner()
    bad_step_policy: str = "stop"  # with "skip" the step has a branch, see `make_train_step`
    total_steps: int = 0
    initial_step: int = 0  # steps of total_steps that the starting checkpoint has done

    def __post_init__(self):
        check_bad_step_policy(self.bad_step_policy)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one step on one device, in bytes, seconds and floating-point operations.

    None: not known. `estimated`: by arithmetic, nothing was compiled. "bound": no run is faster.
    """

    topology: str
    devices: int
    device: str
    estimated: bool
    mesh: dict[str, int]
    attention: str
    remat_policy: str
    num_microbatches: int
    batch_size: int
    tokens_per_step: int
    parameters: int
    fits: bool
    hbm_arguments_bytes: int
    hbm_temporaries_bytes: int | None
    hbm_peak_bytes: int | None
    hbm_limit_bytes: int | None
    matmul_flops: float | None
    matmul_flops_minimum: float
    hbm_traffic_bytes: float | None
    kernel_flops: float | None  # of both, the parts that kernels estimate themselves
    kernel_traffic_bytes: float | None
    collective_bytes: dict[str, float] | None
    roofline_seconds: dict[str, float | None]
    exposed_seconds: dict[str, float] | None  # of collectives, not hidden behind computation
    step_seconds_bound: float | None
    tokens_per_second_bound: float | None
    steps: int
    days_bound: float | None
    days_at_half: float | None
    compile_seconds: float | None

    def flags(self) -> str:
        """Return the flags that repeat this plan."""
        return (
            f"--gin.NUM_PARTITIONS={self.mesh['model']} --gin.REMAT_POLICY={self.remat_policy} "
            f"--gin.NUM_MICROBATCHES={self.num_microbatches} --gin.ATTENTION={self.attention}"
        )


def plan_step(
    job: PlannedRun, topology: str, *, start_step: int | None = None, hlo_path: str | None = None
) -> Plan:
    """Return the plan of `job` on `topology`; write the compiled text to `hlo_path`, if given.

    A `start_step` of None is the job's `initial_step`, or 0 if that is not below its total. Raises
    UserError for settings that do not suit the devices.
    """
    if start_step is None:  # a checkpoint without a step has a smaller total: see the recipes
        start_step = job.initial_step if job.initial_step < job.total_steps else 0
    if job.total_steps and not 0 <= start_step < job.total_steps:
        raise UserError(
            f"start step {start_step} is not below TRAIN_STEPS={job.total_steps}",
            setting="start_step",
        )
    name, shape = chips.parse_topology(topology)
    chip = chips.CHIPS[name]
    batch = datasets.abstract_batch(job.dataset)
    job = dataclasses.replace(job, model=sizing.choose_attention(job.model, batch, chip))
    devices = _devices(name, shape)
    count = int(shape) if devices is None else len(devices)
    # CPU devices share the memory of their host.
    limit = chip.hbm_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    # A partition must not leave its host, where the links are fast.
    local = min(count, _GPUS_A_HOST)
    if devices is not None:  # libtpu's description names the process of each device
        local = sum(device.process_index == devices[0].process_index for device in devices)
    choice = sizing.choose_device_settings(
        job.model, job.step, batch, job.partitioner, count, local, chip.hbm_bytes
    )
    parts = choice.num_partitions
    partitioning.check_partitions(parts, count, local)
    model, config, partitioner = sizing.apply_device_settings(
        job.model, job.step, job.partitioner, choice
    )
    if devices is None:
        mesh = partitioning.abstract_mesh(count // parts, parts)
        if hlo_path:
            raise UserError(
                f"nothing is compiled for {topology}, so there is no text to write", setting="hlo"
            )
    else:
        mesh = partitioner.mesh(devices)
    rows, microbatches = job.dataset.batch_size, choice.num_microbatches
    partitioning.check_batch_size(rows, mesh, microbatches, "BATCH_SIZE")
    if devices is None:
        found = _by_arithmetic(model, config, batch, count, choice)
    else:
        found = _compiled(model, config, job, partitioner, partitioner.layout(mesh), hlo_path)
    return _finish(job, topology, chip, dict(mesh.shape), choice, found, limit, batch, start_step)


def sweep(
    job: PlannedRun,
    topology: str,
    choices: list[sizing.DeviceSettings],
    start_step: int | None = None,
) -> Iterator[tuple[sizing.DeviceSettings, Plan | UserError]]:
    """Yield (choice, its plan, or the error if it does not suit the devices)."""
    for choice in choices:
        model, config, partitioner = sizing.apply_device_settings(
            job.model, job.step, job.partitioner, choice
        )
        # An error of one choice must not end the sweep.
        asked = dataclasses.replace(job, model=model, step=config, partitioner=partitioner)
        try:
            yield choice, plan_step(asked, topology, start_step=start_step)
        except UserError as error:
            yield choice, error


def rank(plans: list[Plan]) -> list[Plan]:
    """Return the plans that fit, the fastest bound first; of equal ones, the least total work."""

    # Bounds are often equal, as the same resource limits several settings.
    def key(plan: Plan):
        parts = [seconds or 0.0 for seconds in plan.roofline_seconds.values()]
        return plan.step_seconds_bound or 0.0, sum(parts), plan.hbm_peak_bytes or 0

    return sorted((plan for plan in plans if plan.fits), key=key)


def remedy(job: PlannedRun, plan: Plan, start_step: int | None = None) -> Plan | None:
    """Return the first plan that fits, of settings that need less memory than `plan`, or None."""
    parts, given = plan.mesh["model"], plan.num_microbatches
    # From the cheapest remedy on: more microbatches, then less kept, then more partitions.
    choices = [
        sizing.DeviceSettings(*one)
        for one in itertools.product((parts, 2 * parts), ("minimal", "full"), (given, 2 * given))
        if one != (parts, plan.remat_policy, given)
    ]
    plans = (found for _, found in sweep(job, plan.topology, choices, start_step))
    return next((found for found in plans if isinstance(found, Plan) and found.fits), None)


class _Found(NamedTuple):
    """The result of compiling, or of arithmetic."""

    arguments: int  # bytes, as are temporaries
    temporaries: int | None
    cost: hlo_cost.Cost | None = None
    program: hlo.Program | None = None
    estimated: bool = False
    seconds: float | None = None


def _compiled(model, config, job: PlannedRun, partitioner, layout, hlo_path) -> _Found:
    abstract, shardings = state_shardings(model, config, partitioner, layout.mesh)
    began = time.monotonic()
    try:
        batch = datasets.abstract_batch(job.dataset)
        skips = job.bad_step_policy == "skip"
        compiled = compile_step(model, config, batch, layout, abstract, shardings, 0, skips)
    except jax.errors.JaxRuntimeError as error:
        # A program too large for the device is an answer too: libtpu's error names its memory.
        needed = re.search(
            r"temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of", str(error)
        )
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise UserError(f"the compiler failed: {str(error).splitlines()[0]}") from error
        number, unit = [group for group in needed.groups() if group is not None]
        temporaries = int(float(number) * 1024 ** " KMGT".index(unit or " "))
        shards = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
        sizes = [a.dtype.itemsize * math.prod(s.shard_shape(a.shape)) for a, s in shards]
        return _Found(sum(sizes), temporaries)
    seconds = time.monotonic() - began
    text = compiled.as_text()
    if hlo_path:
        write_atomic(hlo_path, text)
    try:
        program = hlo.parse(text)
        cost = hlo_cost.cost(program)
    except ValueError as error:
        raise UserError(
            f"the compiled program cannot be counted: {error}; write it to a file to see why",
            setting="hlo",
        ) from error
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    # The donated state's memory holds the new one. Besides: results that do not alias it, the
    # program, all temporaries.
    others = memory.output_size_in_bytes - memory.alias_size_in_bytes
    others += memory.generated_code_size_in_bytes + memory.temp_size_in_bytes
    return _Found(arguments, others, cost, program, seconds=seconds)


def _by_arithmetic(model, config, batch, count: int, choice: sizing.DeviceSettings) -> _Found:
    memory = sizing.memory_estimate(model, config, batch, count, choice)
    kinds = sizing.traffic_estimate(model, batch, count, choice)
    # A gather runs over the devices along `data`; a sum counts as one over all devices.
    flops = sizing.matmul_flops(model, batch) / count
    sizes = {"all-gather": count // choice.num_partitions, "all-reduce": count}
    moved = collections.Counter({(kind, sizes[kind]): size for kind, size in kinds.items()})
    hbm_bytes = sizing.hbm_traffic_estimate(model, config, batch, count, choice)
    cost = hlo_cost.Cost(flops, hbm_bytes, collectives=moved)
    return _Found(int(memory["arguments"]), int(memory["temporaries"]), cost, estimated=True)


def _finish(job, topology, chip, mesh, choice, found: _Found, limit, batch, begin) -> Plan:
    devices = mesh["data"] * mesh["model"]
    peak = None if found.temporaries is None else found.arguments + found.temporaries
    cost, program = found.cost, found.program
    roofline: dict[str, float | None] = dict.fromkeys(("compute", "hbm", "interconnect"))
    if cost is not None:
        roofline = {
            "compute": _over(cost.matmul_flops, chip.matmul_flops),
            "hbm": _over(cost.hbm_bytes, chip.hbm_bytes_per_second),
            "interconnect": _over(sum(cost.link_bytes().values()), chip.link_bytes_per_second),
        }
    # A roofline: the three overlap at best, so the slowest of them bounds the step.
    known = [seconds for seconds in roofline.values() if seconds is not None]
    # Without the peak of products the others alone would be a bound that means little.
    bound = max(known) if known and roofline["compute"] is not None else None
    # Padding counts too: rows have a fixed length, and devices compute all of it.
    tokens = sum(
        batch[name].shape[0] * batch[name].shape[1]
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    # As in T5X, TRAIN_STEPS counts the steps of the starting checkpoint.
    steps = max(job.total_steps - begin, 0)
    days = None if bound is None else steps * bound / 86_400
    return Plan(
        topology=topology,
        devices=devices,
        device=chip.name,
        estimated=found.estimated,
        mesh=mesh,
        attention=job.model.network.attention,
        remat_policy=choice.remat_policy,
        num_microbatches=choice.num_microbatches,
        batch_size=job.dataset.batch_size,
        tokens_per_step=tokens,
        parameters=models.parameter_count(job.model),
        # Without a cost the compiler has refused the program.
        fits=peak is not None and peak <= limit and cost is not None,
        hbm_arguments_bytes=found.arguments,
        hbm_temporaries_bytes=found.temporaries,
        hbm_peak_bytes=peak,
        hbm_limit_bytes=limit,
        matmul_flops=cost and cost.matmul_flops,
        # Without recomputation: the ratio of the two shows how much the settings recompute.
        matmul_flops_minimum=sizing.minimum_matmul_flops(job.model, batch) / devices,
        hbm_traffic_bytes=cost and cost.hbm_bytes,
        kernel_flops=cost and cost.kernel_flops,
        kernel_traffic_bytes=cost and cost.kernel_bytes,
        collective_bytes=cost and cost.collective_bytes(),
        roofline_seconds=roofline,
        exposed_seconds=program and overlap.exposed_seconds(program, chip),
        step_seconds_bound=bound,
        tokens_per_second_bound=_over(tokens, bound),
        steps=steps,
        days_bound=days,
        # Nobody reaches a roofline: half of it is the number to plan with.
        days_at_half=days and 2 * days,
        compile_seconds=found.seconds,
    )


def _devices(name: str, shape: str) -> list[Any] | None:
    """Return the devices to compile for; None if that needs the device itself."""
    if name in chips.GPUS:
        return None  # XLA's GPU compiler needs the GPU
    if name == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < int(shape):
            raise UserError(
                f"cpu:{shape}: JAX was started with {len(devices)} devices", setting="topology"
            )
        return devices[: int(shape)]
    # libtpu describes and compiles for slices that this machine has not.
    from jax.experimental import topologies

    options = {"chip_config_name": chips.CHIPS[name].chip_config}
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{name}:{shape}",
            **{key: value for key, value in options.items() if value},
        )
    except Exception as error:  # jaxlib raises several kinds
        if "TPU support not installed" in str(error) or isinstance(error, ImportError):
            raise UserError(
                f"{name}:{shape} needs the TPU's compiler, libtpu, though no TPU: "
                "pip install -e '.[tpu]'",
                setting="topology",
            ) from error
        raise UserError(
            f"{name}:{shape} is no slice that libtpu knows: {str(error).splitlines()[0]}",
            setting="topology",
        ) from error
    return list(description.devices)


def _over(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or not rate else amount / rate

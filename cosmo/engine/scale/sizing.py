"""Estimate a training step before it is compiled: products, memory, traffic; choose defaults.

All numbers come from the abstract loss itself (shapes and its jaxpr), so they hold for any network.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import core

from cosmo.engine.model import models, partitioning
from cosmo.engine.model.step import StepConfig
from cosmo.engine.scale import chips

log = logging.getLogger(__name__)

# Room for memory that XLA needs beside the arrays of the layer at work.
_WORKING_MEMORY_FACTOR = 1.35
_MAX_MEMORY_SHARE = 0.92  # of a device's memory: an estimate must leave room
_EQUAL_COST_RATIO = 1.1  # of layouts whose costs are this close, the fewest partitions are taken


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
    """The settings that depend on the devices, and that a run may leave open."""

    num_partitions: int
    remat_policy: str
    num_microbatches: int


def minimum_matmul_flops(model: models.EncoderDecoderModel, batch: models.Batch) -> float:
    """Return the operations in the matrix products of one step over all devices.

    They are those of loss and gradients without recomputation; a multiply-add counts as two.
    `batch` is abstract.
    """
    return matmul_flops(_with(model, remat_policy="none"), batch)


def matmul_flops(model: models.EncoderDecoderModel, batch: models.Batch) -> float:
    """Return the same number, with the products that the model's remat_policy recomputes."""
    # A kernel's products are not in the jaxpr, and plain attention's are the least.
    return _matmul_flops(_with(model, attention="plain"), tuple(sorted(batch.items())))


# A trace takes seconds, and every plan of a sweep needs the same two or three.
_traced_once = functools.lru_cache(maxsize=64)


@_traced_once
def _matmul_flops(model: models.EncoderDecoderModel, batch: tuple) -> float:
    return sum(times * _dot_flops(equation) for equation, times in _products(model, batch))


@_traced_once
def _products(model: models.EncoderDecoderModel, batch: tuple) -> list[tuple[Any, int]]:
    """Return (product, how often it is computed) of loss and gradients of the whole batch."""

    def gradients(params, batch):
        return jax.value_and_grad(lambda p: models.loss(model, p, batch), has_aux=True)(params)

    jaxpr = jax.make_jaxpr(gradients)(models.abstract_params(model), dict(batch)).jaxpr
    return list(_dots(jaxpr))


@_traced_once
def _optimizer_bytes(model: models.EncoderDecoderModel, step: StepConfig) -> int:
    state = jax.eval_shape(step.transformation().init, models.abstract_params(model))
    return _bytes(jax.tree.leaves(state))


def kept_activations(
    model: models.EncoderDecoderModel, batch: models.Batch, remat_policy: str
) -> list[jax.ShapeDtypeStruct]:
    """Return the arrays that the forward pass of the whole batch keeps for the backward pass."""
    return _kept(_with(model, remat_policy=remat_policy), tuple(sorted(batch.items())))


@_traced_once
def _kept(model: models.EncoderDecoderModel, batch: tuple) -> list[jax.ShapeDtypeStruct]:
    params = models.abstract_params(model)
    # On two abstract devices, so that gathered weights are not counted among what is kept.
    layout = partitioning.Layout(partitioning.abstract_mesh(2, 1))

    def forward(params, batch, key):
        with layout.active():
            return jax.vjp(lambda p: models.loss(model, p, batch, key), params, has_aux=True)[1]

    key = jax.eval_shape(lambda: jax.random.key(0)) if model.network.dropout_rate else None
    # The backward pass reads parameters too, but they are in memory anyway.
    own = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
    kept = []
    for leaf in jax.tree.leaves(jax.eval_shape(forward, params, dict(batch), key)):
        if (leaf.shape, leaf.dtype) in own:
            own.remove((leaf.shape, leaf.dtype))
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kept.append(leaf)
    return kept


def memory_estimate(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    batch: models.Batch,
    devices: int,
    choice: DeviceSettings,
) -> dict[str, float]:
    """Return estimated bytes on each device: {"arguments" (the state), "temporaries"}."""
    data, parts = devices // choice.num_partitions, choice.num_partitions
    params, state = models.parameter_count(model), _state_bytes(model, step)
    network, rows = model.network, batch["encoder_input_tokens"].shape[0]

    def share(policy: str) -> float:
        """Return a device's share of what is kept, of one microbatch."""
        total = 0.0
        for array in kept_activations(model, batch, policy):
            over = choice.num_microbatches if rows in array.shape else 1
            total += _share(network, rows, array, data, parts) / over
        return total

    stacks = _size(network, "num_encoder_layers"), _size(network, "num_decoder_layers")
    # Recomputation brings back one layer's activations at a time, and gathers its weights.
    at_work = share("none") / max(*stacks, 1)
    gathered = 2 * 2 * params / (max(sum(stacks), 1) * parts)  # a layer's weights and gradients
    # Float32. Microbatches add up theirs in a second copy.
    gradients = 4 * params / devices * (2 if choice.num_microbatches > 1 else 1)
    training = (
        share(choice.remat_policy) + _WORKING_MEMORY_FACTOR * (at_work + gathered) + gradients
    )
    # Generation, as evaluations do, gathers the decoder's weights: less than all of them.
    return {"arguments": state / devices, "temporaries": max(training, 2 * params / parts)}


def hbm_traffic_estimate(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    batch: models.Batch,
    devices: int,
    choice: DeviceSettings,
) -> float:
    """Return the estimated bytes that one device reads from and writes to its memory in a step.

    They are the operands and results of products, each moved once, and the state and gradients,
    which the optimizer reads and writes. All other work counts as fused with these.
    """
    data, parts = devices // choice.num_partitions, choice.num_partitions
    rows = batch["encoder_input_tokens"].shape[0]
    total = 0.0
    plain = _with(model, attention="plain")  # a kernel's products are not in the jaxpr
    for equation, times in _products(plain, tuple(sorted(batch.items()))):
        for array in [value.aval for value in (*equation.invars, *equation.outvars)]:
            # Every microbatch reads the weights, and writes their gradients.
            count = 1 if rows in array.shape else choice.num_microbatches
            total += times * count * _share(model.network, rows, array, data, parts)
    return total + 2 * (_state_bytes(model, step) + 4 * models.parameter_count(model)) / devices


def _state_bytes(model: models.EncoderDecoderModel, step: StepConfig) -> float:
    """Return the bytes of parameters and optimizer state, over all devices."""
    # Neither the policy nor the microbatches change the optimizer's state.
    one = dataclasses.replace(step, num_microbatches=1)
    optimizer = _optimizer_bytes(_with(model, remat_policy="none"), one)
    return 4 * models.parameter_count(model) + optimizer


def _share(network: Any, rows: int, array: Any, data: int, parts: int) -> float:
    """Return the bytes of a device's share of an array of the forward or backward pass.

    Rows are split over `data`; heads, feed-forward and pieces over `model`, as weights are.
    """
    split = {_size(network, "mlp_dim"), _size(network, "vocab_size"), _size(network, "num_heads")}
    split -= {0, _size(network, "emb_dim")}
    if rows not in array.shape:
        return _bytes([array]) / parts
    return _bytes([array]) / (data * (parts if split & set(array.shape) else 1))


def traffic_estimate(
    model: models.EncoderDecoderModel, batch: models.Batch, devices: int, choice: DeviceSettings
) -> dict[str, float]:
    """Return estimated bytes of collectives on each device and step, by kind.

    The kinds are "all-gather" and "all-reduce".
    """
    # Weights are gathered forward and backward and their gradients summed, in the compute type.
    # With partitions, the output of each attention and feed-forward and the gradient of its input
    # are summed over them.
    network, parts = model.network, choice.num_partitions
    data = devices // parts
    size = jnp.dtype(network.dtype).itemsize
    params = models.parameter_count(model)
    gathered = reduced = 0.0
    if data > 1:
        rows = batch["encoder_input_tokens"].shape[0]
        kept = [
            a for a in kept_activations(model, batch, choice.remat_policy) if rows not in a.shape
        ]
        kept = sum(math.prod(a.shape) for a in kept if a.dtype == jnp.dtype(network.dtype))
        gathered = (2.0 * params - kept) * size / parts * choice.num_microbatches
        reduced = size * params / parts * choice.num_microbatches
    if parts > 1:
        rows = batch["encoder_input_tokens"].shape[0] / data
        source = batch["encoder_input_tokens"].shape[1]
        target = batch["decoder_input_tokens"].shape[1]
        encoder = _size(network, "num_encoder_layers")
        decoder = _size(network, "num_decoder_layers")
        # Sums forward and backward: an encoder layer has 2 sublayers, a decoder layer 3. The
        # gradient of the encoder's output is summed over the layers first, over partitions once.
        positions = 4 * encoder * source + 6 * decoder * target + source
        reduced += size * rows * positions * _size(network, "emb_dim")
    return {"all-gather": gathered, "all-reduce": reduced}


def choose_device_settings(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    batch: models.Batch,
    partitioner: partitioning.Partitioner,
    devices: int,
    local_devices: int,
    hbm_bytes: float | None,
) -> DeviceSettings:
    """Return the settings with open ones (None, "auto") chosen.

    They are for `devices`, of which a host has `local_devices`, each with `hbm_bytes` of memory.
    None means not known, as on a CPU: then nothing is recomputed. The partitions are those with
    the least collective traffic. Then the cheapest rematerialization and microbatches are taken
    whose estimated memory fits.
    """
    policy, count = _policy(model), step.num_microbatches
    rows = batch["encoder_input_tokens"].shape[0]

    def cost(parts: int) -> float:
        # A byte of an all-reduce crosses the links twice.
        traffic = traffic_estimate(model, batch, devices, DeviceSettings(parts, "full", 1))
        return traffic["all-gather"] + 2 * traffic["all-reduce"]

    parts = partitioner.num_partitions
    if parts is None:
        heads, mlp = _size(model.network, "num_heads"), _size(model.network, "mlp_dim")
        # A partition must not leave its host, nor cut a head, nor leave devices without rows.
        able = [
            n
            for n in range(1, local_devices + 1)
            if not any(size % n for size in (devices, local_devices, heads, mlp))
            and rows % (devices // n) == 0
        ] or [1]
        parts = able[0]
        # Costs trace the loss, which takes seconds: not where there is nothing to compare.
        if len(able) > 1:
            least = min(map(cost, able))
            parts = next(n for n in able if cost(n) <= _EQUAL_COST_RATIO * least)
    policies = [policy] if policy else ["minimal", "none", "full"] if hbm_bytes else ["none"]
    counts = [count] if count else [1, 2, 4, 8, 16]
    options = sorted(
        (DeviceSettings(parts, *option) for option in itertools.product(policies, counts)),
        key=functools.partial(_cost, gathers=parts != devices),
    )
    if parts < 1 or devices % parts:
        return options[0]  # an error of `Partitioner.mesh`, which names the setting
    shards = devices // parts
    options = [o for o in options if rows % (shards * o.num_microbatches) == 0] or options
    if not hbm_bytes:
        return options[0]
    # From the cheapest on; the last one is taken whether it fits or not, so it is not traced.
    for option in options[:-1]:
        memory = memory_estimate(model, step, batch, devices, option)
        if sum(memory.values()) <= _MAX_MEMORY_SHARE * hbm_bytes:
            return option
    return options[-1]


def choose_attention(
    model: models.EncoderDecoderModel, batch: models.Batch, chip: chips.Chip | None
) -> models.EncoderDecoderModel:
    """Return the model; attention that is left open ("auto") is chosen for a chip.

    The choice is the kernel where the chip runs it and has room for the lengths, else "plain".
    """
    network = model.network
    if getattr(network, "attention", "plain") != "auto":
        return model
    lengths = [batch[f"{side}_input_tokens"].shape[1] for side in ("encoder", "decoder")]
    room = all(itertools.starmap(network.attention_fits, itertools.product(lengths, lengths)))
    return _with(model, attention="fused" if chip and chip.fuses_attention and room else "plain")


def choose_for_this_run(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    partitioner: partitioning.Partitioner,
    batch: models.Batch,
) -> DeviceSettings:
    """Return the settings for the devices of this run, and log those that were open."""
    device = jax.local_devices()[0]
    chip = chips.by_kind(device.device_kind)
    stats = device.memory_stats() or {}
    hbm_bytes = stats.get("bytes_limit") or (chip.hbm_bytes if chip else None)
    # Processes must choose alike, and their devices may report different limits.
    if hbm_bytes and jax.process_count() > 1:
        hbm_bytes = float(np.min(multihost_utils.process_allgather(np.float32(hbm_bytes))))
    local = jax.local_device_count()
    choice = choose_device_settings(
        model, step, batch, partitioner, jax.device_count(), local, hbm_bytes
    )
    given = (partitioner.num_partitions, _policy(model), step.num_microbatches)
    names = ("NUM_PARTITIONS", "REMAT_POLICY", "NUM_MICROBATCHES")
    settings = [
        f"{name}={value}"
        for name, value, setting in zip(names, dataclasses.astuple(choice), given, strict=True)
        if setting is None
    ]
    if settings:
        where = f"{jax.device_count()} x {device.device_kind}"
        log.info("chosen for %s: %s", where, ", ".join(settings))
    return choice


def apply_device_settings(
    model: models.EncoderDecoderModel,
    step: StepConfig,
    partitioner: partitioning.Partitioner,
    choice: DeviceSettings,
) -> tuple[models.EncoderDecoderModel, StepConfig, partitioning.Partitioner]:
    """Return model, step and partitioner with the settings of `choice`."""
    return (
        _with(model, remat_policy=choice.remat_policy),
        dataclasses.replace(step, num_microbatches=choice.num_microbatches),
        dataclasses.replace(partitioner, num_partitions=choice.num_partitions),
    )


def _dots(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield (product, how often it is computed) of a jaxpr, a scan's as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, times
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in core.jaxprs_in_params(equation.params):
            yield from _dots(inner, inside)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)


def _bytes(arrays: Iterable[Any]) -> float:
    return float(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays))


def _cost(choice: DeviceSettings, gathers: bool) -> float:
    """Return a relative cost, by which settings are tried in order.

    `gathers`: whether weights are gathered from other devices along `data`.
    """
    # Full rematerialization computes a third more. A microbatch gathers all weights again; where
    # none are gathered, it only casts them again.
    # Keeping everything ("none") costs more memory traffic than computing attention again.
    policy = {"none": 0.1, "full": 2.5}.get(choice.remat_policy, 0.0)
    return (1.0 if gathers else 0.01) * choice.num_microbatches + policy


def _policy(model: models.EncoderDecoderModel) -> str | None:
    """Return the remat_policy, None if it is left open."""
    policy = getattr(model.network, "remat_policy", "none")
    return None if policy == "auto" else policy


def _with(model: models.EncoderDecoderModel, **settings: str) -> models.EncoderDecoderModel:
    """Return the model with other settings of its network, those that the network has."""
    settings = {name: value for name, value in settings.items() if hasattr(model.network, name)}
    return dataclasses.replace(model, network=dataclasses.replace(model.network, **settings))


def _size(network: Any, name: str) -> int:
    """Return a size of T5's; 0 for a network without it."""
    return getattr(network, name, 0)

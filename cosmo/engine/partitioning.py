"""One mesh of devices, and which axis of which array lies along which of its sides.

The mesh has two sides: `data` splits the batch and, fully sharded (FSDP), the parameters and the
optimizer's state; `model` splits heads, feed-forward and vocabulary (tensor parallelism).
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cosmo.engine.errors import UserError

# Logical axis of a parameter -> side of the mesh. An axis that does not divide stays whole.
AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("embed", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("joined_kv", "model"),
    ("heads", "model"),
    ("buckets", None),
    ("layers", None),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How to lay a run over its devices; `num_partitions` (T5X's) is how many share a model."""

    num_partitions: int = 1
    axis_rules: tuple[tuple[str, str | None], ...] = AXIS_RULES

    def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (all of them by default)."""
        devices = jax.devices() if devices is None else devices
        if self.num_partitions < 1 or len(devices) % self.num_partitions:
            raise UserError(
                f"num_partitions={self.num_partitions} does not divide {len(devices)} devices"
                " (gin: NUM_PARTITIONS)"
            )
        if jax.process_count() > 1 and jax.local_device_count() % self.num_partitions:
            raise UserError(
                f"num_partitions={self.num_partitions} must divide the {jax.local_device_count()} "
                "devices of each host: hosts feed rows of their own (gin: NUM_PARTITIONS)"
            )
        # A host's devices stand together, so that it owns one run of the batch's rows.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.asarray(devices).reshape(-1, self.num_partitions)
        return Mesh(grid, ("data", "model"))

    def param_shardings(self, mesh: Mesh, abstract: Any, axes: Any) -> Any:
        """A sharding for every parameter: `axes` are its logical names, see models.logical_axes."""
        rules = dict(self.axis_rules)

        def sharding(leaf, names):
            spec: list[str | None] = []
            for size, name in zip(leaf.shape, names, strict=True):
                side = rules.get(name)
                free = side is not None and side not in spec and size % mesh.shape[side] == 0
                spec.append(side if free else None)
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(sharding, abstract, axes)


def state_shardings(mesh: Mesh, abstract_state: Any, params: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state, which mirrors the parameters in whole or in part.

    A leaf whose path ends like a parameter's is laid out like it; Adafactor's rows and columns lack
    one of its axes and lose that axis of the layout; all else (counters) is replicated.
    """
    known = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
    ):
        known[_names(path)] = (leaf.shape, sharding.spec)

    def sharding(path, leaf):
        names = _names(path)
        # per_layer keeps the state of a stack under the stack's path: (stack, moment, parameter).
        cut = names.index("layers") + 1 if "layers" in names else 0
        for head in range(cut + 1):
            for start in range(cut, len(names)):
                name = names[head:cut] + names[start:]
                if name in known:
                    lost_first = "v_col" in names  # of a square matrix the column loses the first
                    return NamedSharding(mesh, _project(leaf.shape, *known[name], lost_first))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def _names(path) -> tuple[str, ...]:
    """A path as words; a key such as "encoder/layers" counts as two."""
    words: list[str] = []
    for entry in path:
        key = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))
        words += str(key).split("/")
    return tuple(words)


def _project(shape, param_shape, spec, lost_first: bool) -> PartitionSpec:
    sides = (*spec, *[None] * (len(param_shape) - len(spec)))
    if shape == param_shape:
        return PartitionSpec(*sides)
    axes = range(len(param_shape))
    for lost in axes if lost_first else reversed(axes):
        if shape == param_shape[:lost] + param_shape[lost + 1 :]:
            return PartitionSpec(*sides[:lost], *sides[lost + 1 :])
    return PartitionSpec()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch along `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, num_microbatches: int, name: str) -> None:
    """Raise UserError unless `batch_size` divides over data shards times microbatches."""
    shards = math.lcm(mesh.shape["data"], jax.process_count())
    if batch_size < 1 or batch_size % (shards * num_microbatches):
        parts = f"{shards} data shard{'s' if shards > 1 else ''}"
        if num_microbatches > 1:
            parts += f" x {num_microbatches} microbatches"
        raise UserError(f"batch_size={batch_size} does not divide over {parts} (gin: {name})")


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host rows (this process's share of the batch) to global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

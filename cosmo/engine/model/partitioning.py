"""One mesh of devices, and which axis of which array lies along which of its sides.

The mesh has two sides: `data` splits the batch and, fully sharded (FSDP), the parameters and the
optimizer's state; `model` splits heads, feed-forward and vocabulary (tensor parallelism).
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cosmo.engine.base.errors import UserError

# Logical axis of a parameter -> side of the mesh. An axis that does not divide stays whole.
AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("embed", "data"),
    ("norm", None),  # a vector is too small to be worth gathering
    ("vocab", "model"),
    ("mlp", "model"),
    ("joined_kv", "model"),
    ("heads", "model"),
    ("buckets", None),
    ("layers", None),
)


# Both sides are Auto: layouts come from the constraints below. JAX 0.11 and later would else take
# Explicit, where every array carries its layout in its type and constraints mean something else.
AXIS_TYPES = (AxisType.Auto, AxisType.Auto)

GATHERED = "gathered"  # names for rematerialization policies
GATHERED_ATTENTION = "gathered_attention"


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How to lay a run over its devices; `num_partitions` (T5X's) is how many share a layer.

    None: training chooses (`sizing.choose`), all else takes 1.
    """

    num_partitions: int | None = None
    axis_rules: tuple[tuple[str, str | None], ...] = AXIS_RULES

    def __post_init__(self):
        # gin gives lists, which cannot be keys of the functions that are cached by their settings.
        object.__setattr__(self, "axis_rules", tuple(map(tuple, self.axis_rules)))

    def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (all of them by default)."""
        devices = jax.devices() if devices is None else devices
        parts = 1 if self.num_partitions is None else self.num_partitions
        if parts < 1 or len(devices) % parts:
            raise UserError(
                f"num_partitions={parts} does not divide {len(devices)} devices",
                setting="NUM_PARTITIONS",
            )
        if jax.process_count() > 1 and jax.local_device_count() % parts:
            raise UserError(
                f"num_partitions={parts} must divide the {jax.local_device_count()} "
                "devices of each host: hosts feed rows of their own",
                setting="NUM_PARTITIONS",
            )
        if len(devices) > 1 and devices[0].platform == "cpu":
            _forgo_compilation_cache()
        # A host's devices stand together, so that it owns one run of the batch's rows.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.asarray(devices).reshape(-1, parts)
        return Mesh(grid, ("data", "model"), axis_types=AXIS_TYPES)

    def layout(self, mesh: Mesh) -> "Layout":
        """The rules, applied to `mesh`."""
        return Layout(mesh, self.axis_rules)

    def param_shardings(self, mesh: Mesh, abstract: Any, axes: Any) -> Any:
        """A sharding for every parameter: `axes` are its logical names, see models.logical_axes."""
        layout = self.layout(mesh)
        return jax.tree.map(lambda leaf, names: layout.sharding(leaf.shape, names), abstract, axes)


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """Return a mesh of data x model devices that need not exist, for shapes and plans."""
    return AbstractMesh((data, model), ("data", "model"), axis_types=AXIS_TYPES)


def _forgo_compilation_cache() -> None:
    """Compile anew from here on: XLA's CPU programs lose the order of their collectives on disk.

    Read back from the persistent cache, independent all-reduces start in whatever order, each
    device waits in another one, and the run hangs (jaxlib 0.10).
    """
    if jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # which otherwise remembers that it was in use


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axis rules on a mesh. Under `with layout.active():` the network lays out what it computes."""

    mesh: Mesh
    axis_rules: tuple[tuple[str, str | None], ...] = AXIS_RULES

    def sharding(
        self, shape: tuple[int, ...], names: tuple[str | None, ...], without: str | None = None
    ) -> NamedSharding:
        """Where an array of `shape` lies whose axes have these logical names.

        An axis that does not divide, whose side is taken by an axis before it, or whose side is
        `without`, stays whole.
        """
        rules = dict(self.axis_rules)
        spec: list[str | None] = []
        for size, name in zip(shape, names, strict=True):
            side = rules.get(name)
            free = side is not None and side != without and side not in spec
            spec.append(side if free and size % self.mesh.shape[side] == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """To be entered inside the function that is jitted, so that it is part of what it is."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, jitted under this layout; its results are whole on every device."""

        @functools.wraps(function)
        def laid_out(*args):
            with self.active():
                return function(*args)

        return jax.jit(laid_out, out_shardings=replicated(self.mesh))


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the active layout's rules for these logical axes; as it is without one."""
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(x.shape, names))


def constrain_tree(tree: Any, axes: Any) -> Any:
    """`constrain` of every array of `tree`, by its tuple of names in `axes`."""
    return jax.tree.map(lambda x, names: constrain(x, *names), tree, axes)


def gathers() -> bool:
    """Whether parameters lie over several devices along `data`, in the active layout."""
    layout = _ACTIVE.get()
    return layout is not None and layout.mesh.shape["data"] > 1


def gather(weight: jax.Array, names: tuple[str, ...], called: str = GATHERED) -> jax.Array:
    """A parameter made whole along `data` for one use; its gradient is scattered as it is summed.

    What lies along `model` stays there. Without an active layout, `weight` itself. Policies of
    rematerialization know the result by the name `called`.
    """
    if not gathers():
        return weight
    layout = _ACTIVE.get()
    stored = layout.sharding(weight.shape, names)
    whole = layout.sharding(weight.shape, names, without="data")
    return checkpoint_name(_gather(weight, stored, whole), called)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, stored: NamedSharding, whole: NamedSharding):
    # The first constraint keeps a cast to the compute type on this side of the collective.
    weight = jax.lax.with_sharding_constraint(weight, stored)
    return jax.lax.with_sharding_constraint(weight, whole)


_gather.defvjp(
    lambda weight, stored, whole: (_gather(weight, stored, whole), None),
    lambda stored, whole, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


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
        raise UserError(f"batch_size={batch_size} does not divide over {parts}", setting=name)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host rows (this process's share of the batch) to global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

"""Lay arrays over one mesh of devices: which axis is split along which side of the mesh.

The mesh has two sides. `data` splits the batch and, fully sharded (FSDP), the parameters and the
optimizer's state. `model` splits heads, feed-forward and vocabulary (tensor parallelism).
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cosmo.engine.base.errors import UserError

# Logical axis of a parameter -> side of the mesh. An axis that does not divide stays whole.
AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("embed", "data"),
    ("norm", None),  # gathering a vector costs more than holding it
    ("vocab", "model"),
    ("mlp", "model"),
    ("joined_kv", "model"),
    ("heads", "model"),
    ("buckets", None),
    ("positions", None),
    ("layers", None),
)


# Both sides are Auto: layouts come from the constraints below. JAX 0.11 and later would else take
# Explicit, where every array carries its layout in its type and constraints mean something else.
AXIS_TYPES = (AxisType.Auto, AxisType.Auto)

GATHERED = "gathered"  # names for rematerialization policies
GATHERED_ATTENTION = "gathered_attention"
PROJECTED = "projected"


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How to lay a run over its devices; `num_partitions` (T5X's) of them share a layer.

    With None training chooses (`sizing.choose_device_settings`), and all other commands take 1.
    """

    num_partitions: int | None = None
    axis_rules: tuple[tuple[str, str | None], ...] = AXIS_RULES

    def __post_init__(self):
        # gin gives lists, which cannot be keys of the functions that are cached by their settings.
        object.__setattr__(self, "axis_rules", tuple(map(tuple, self.axis_rules)))

    def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """Return the mesh over `devices` (all of them by default).

        Raises UserError if `num_partitions` does not divide them, or those of each host.
        """
        devices = jax.devices() if devices is None else devices
        parts = 1 if self.num_partitions is None else self.num_partitions
        several = jax.process_count() > 1
        check_partitions(parts, len(devices), jax.local_device_count() if several else len(devices))
        if len(devices) > 1 and devices[0].platform == "cpu":
            _forgo_compilation_cache()
        # A host's devices are neighbours, so that it has one run of the batch's rows.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.asarray(devices).reshape(-1, parts)
        return Mesh(grid, ("data", "model"), axis_types=AXIS_TYPES)

    def layout(self, mesh: Mesh) -> "Layout":
        """Return the axis rules on `mesh`."""
        return Layout(mesh, self.axis_rules)

    def param_shardings(self, mesh: Mesh, abstract: Any, axes: Any) -> Any:
        """Return a sharding for every parameter of `abstract`, from `models.logical_axes`."""
        layout = self.layout(mesh)
        return jax.tree.map(lambda leaf, names: layout.sharding(leaf.shape, names), abstract, axes)


def check_partitions(parts: int, devices: int, host_devices: int) -> None:
    """Raise UserError unless `parts` divides all devices, and those of each host."""
    problem = None
    if parts < 1 or devices % parts:
        problem = f"does not divide {devices} devices"
    elif host_devices % parts:
        problem = (
            f"must divide the {host_devices} devices of each host: hosts feed rows of their own"
        )
    if problem:
        raise UserError(f"num_partitions={parts} {problem}", setting="NUM_PARTITIONS")


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """Return a mesh of data x model devices that need not exist, for shapes and plans."""
    return AbstractMesh((data, model), ("data", "model"), axis_types=AXIS_TYPES)


def _forgo_compilation_cache() -> None:
    """Turn off the compilation cache of this process, for programs of several CPU devices."""
    # Read back from disk, XLA's CPU programs have lost the order of their collectives: all-reduces
    # start in any order, each device waits in another one, and the run hangs (jaxlib 0.10).
    if jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # else its state stays "in use"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axis rules on a mesh. Under `with layout.active():` the network lays out its activations."""

    mesh: Mesh
    axis_rules: tuple[tuple[str, str | None], ...] = AXIS_RULES

    def sharding(
        self, shape: tuple[int, ...], names: tuple[str | None, ...], without: str | None = None
    ) -> NamedSharding:
        """Return the sharding of an array of `shape` whose axes have these logical names.

        An axis stays whole if it does not divide, if an axis before it has taken its side, or if
        its side is `without`.
        """
        # One side cannot split two axes of an array: the first that fits takes it.
        rules = dict(self.axis_rules)
        spec: list[str | None] = []
        for size, name in zip(shape, names, strict=True):
            side = rules.get(name)
            free = side is not None and side != without and side not in spec
            spec.append(side if free and size % self.mesh.shape[side] == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this layout current for `gather` and `constrain`.

        Enter it inside the jitted function, so that tracing sees it.
        """
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, jitted under this layout; its results are whole on every device."""

        @functools.wraps(function)
        def laid_out(*args, **named):
            with self.active():
                return function(*args, **named)

        return jax.jit(laid_out, out_shardings=replicated(self.mesh))


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Return `x` laid out by the active layout for these logical axes; `x` itself without one."""
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(x.shape, names))


def parts(size: int, name: str) -> int:
    """Return into how many parts the active layout splits an axis along `model`; 1 without one."""
    layout = _ACTIVE.get()
    if layout is None:
        return 1
    (side,) = layout.sharding((size,), (name,), without="data").spec
    return 1 if side is None else layout.mesh.shape[side]


def copies(x: jax.Array, count: int, name: str) -> jax.Array:
    """Return `count` copies of x [B, ...], one for each part of an axis `name`: [P, B, ...].

    A device holds the copy for its part alone, so this takes no memory. Their gradients are summed
    over devices here, and not where a copy is used.
    """
    copied = jnp.broadcast_to(x, (count, *x.shape))
    return constrain(copied, name, "batch", *[None] * (x.ndim - 1))


def on_each_device(
    function: Callable[..., jax.Array], names: list[tuple[str | None, ...]]
) -> Callable[..., jax.Array]:
    """Return `function`, called by each device with its part of arrays of these logical axes.

    Its result is laid out as its first array. XLA cannot divide such a function by itself: a kernel
    of our own.
    """

    def called(*arrays: jax.Array) -> jax.Array:
        layout = _ACTIVE.get()
        if layout is None or layout.mesh.size == 1:
            return function(*arrays)
        specs = [layout.sharding(a.shape, n).spec for a, n in zip(arrays, names, strict=True)]
        return jax.shard_map(
            function, mesh=layout.mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False
        )(*arrays)

    return called


def platform() -> str | None:
    """Return the platform that the current program is traced for; None if devices are abstract."""
    layout = _ACTIVE.get()
    if layout is None:
        return jax.default_backend()
    # A plan traces programs for devices that this process has not.
    return layout.mesh.devices.flat[0].platform if isinstance(layout.mesh, Mesh) else None


def gathers() -> bool:
    """Return whether the active layout splits parameters over several devices along `data`."""
    layout = _ACTIVE.get()
    return layout is not None and layout.mesh.shape["data"] > 1


def on_cpu() -> bool:
    """Return whether the current program is traced for CPU devices."""
    layout = _ACTIVE.get()
    if layout is None:
        return jax.default_backend() == "cpu"
    # A plan traces programs for devices that this process has not; a GPU's are abstract.
    return isinstance(layout.mesh, Mesh) and layout.mesh.devices.flat[0].platform == "cpu"


def gather(weight: jax.Array, names: tuple[str, ...], called: str = GATHERED) -> jax.Array:
    """Return a parameter made whole along `data` for one use, or itself without an active layout.

    Axes along `model` stay there. The gradient is scattered as it is summed. Policies of
    rematerialization refer to the result by the name `called`.
    """
    if not gathers():
        return weight
    layout = _ACTIVE.get()
    stored = layout.sharding(weight.shape, names)
    whole = layout.sharding(weight.shape, names, without="data")
    return checkpoint_name(_gather(weight, stored, whole), called)


# A gradient rule of our own, which scatters: left alone, XLA kept whole activations and needed
# 80 GiB for cosmo_3b on a v3.
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
    """Return shardings of an optimizer's state, which mirrors the parameters in whole or in part.

    A leaf whose path ends like a parameter's is laid out like it. Adafactor's rows and columns lack
    one of its axes and lose that axis of the layout. All other leaves (counters) are replicated.
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
    """Return the names in a path; a key such as "encoder/layers" counts as two."""
    words: list[str] = []
    for entry in path:
        key = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))
        words += str(key).split("/")
    return tuple(words)


def _project(shape, param_shape, spec, lost_first: bool) -> PartitionSpec:
    """Return a parameter's spec without the axis that `shape` lacks."""
    sides = (*spec, *[None] * (len(param_shape) - len(spec)))
    if shape == param_shape:
        return PartitionSpec(*sides)
    axes = range(len(param_shape))
    # Both axes of a square matrix fit, and the order of the search decides.
    for lost in axes if lost_first else reversed(axes):
        if shape == param_shape[:lost] + param_shape[lost + 1 :]:
            return PartitionSpec(*sides[:lost], *sides[lost + 1 :])
    return PartitionSpec()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows along `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, num_microbatches: int, name: str) -> None:
    """Raise UserError unless `batch_size` divides over data shards times microbatches."""
    # Processes count too: each feeds whole rows of its own.
    shards = math.lcm(mesh.shape["data"], jax.process_count())
    if batch_size < 1 or batch_size % (shards * num_microbatches):
        parts = f"{shards} data shard{'s' if shards > 1 else ''}"
        if num_microbatches > 1:
            parts += f" x {num_microbatches} microbatches"
        raise UserError(f"batch_size={batch_size} does not divide over {parts}", setting=name)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays on the mesh from this process's rows of the batch."""
    sharding = batch_sharding(mesh)
    # Each process has its own rows: none has the whole batch.
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

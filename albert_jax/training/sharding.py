"""Where arrays live: the device mesh, one table from logical axes to mesh axes, and what travels
over it.

The mesh has four axes. `slice` counts the slices that only a data-center network joins; `data` and
`fsdp` share out the batch inside a slice, and masters and optimizer state with it (ZeRO-1:
Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1); `tensor` splits heads and feed-forward
columns. A config's `mesh.data` is slice x data.

The step computes in a `shard_map` that is manual over all four: `gathered` makes whole parameters
out of each device's part, once a step, and `reduced` turns whole gradients into parts, once a step.
Left to the partitioner, both would be done again in every layer or microbatch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from albert_jax.config import Config, MeshConfig
from albert_jax.errors import UserError
from albert_jax.model.layers import STACK_AXES, TENSOR_AXIS

AXES = ("slice", "data", "fsdp", TENSOR_AXIS)
BATCH_AXES = ("slice", "data", "fsdp")
STATE_AXES = ("data", "fsdp")  # inside a slice: only shards cross between slices

# Logical axis -> mesh axes of the parameters and all that is kept beside them.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "vocab": STATE_AXES,
    "position": None,
    "type": None,
    "embedding": None,
    "hidden": STATE_AXES,
    "heads": TENSOR_AXIS,
    "ffn": TENSOR_AXIS,
    "pooled": None,
    "label": None,
    "group": None,
    "inner": None,
}


def make_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh a config asks for, over all of `devices`; neighbours on an axis are neighbours in
    the slice.

    Raises:
        UserError: the axes do not multiply to the number of devices, or do not divide the batch or
            the model.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = _axis_sizes(config.mesh, len(devices))
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']} does not split over {slices} slices; the slices share out "
            f"the batch, so mesh.data must be a multiple of {slices}."
        )
    shape = (1, sizes["data"] // slices, sizes["fsdp"], sizes[TENSOR_AXIS])
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1, 1), devices)
    else:
        arranged = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=devices[0].platform == "tpu"
        )
    mesh = Mesh(arranged, AXES)
    shards = batch_shards(mesh)
    named = {"train.global_batch_size": config}
    for stage in config.stages if config.data.schedule else ():
        named[f"data.schedule from step {stage.first_batch} on: the batch"] = config.at(stage)
    for name, each in named.items():
        batch = each.train.global_batch_size
        if batch % shards:
            raise UserError(
                f"{name}={batch} does not split over mesh.data={sizes['data']} x "
                f"mesh.fsdp={sizes['fsdp']}; nearest that do: {batch // shards * shards or shards} "
                f"and {-(-batch // shards) * shards}."
            )
        microbatches(each, mesh)
    for field in ("num_attention_heads", "intermediate_size"):
        value = getattr(config.model, field)
        if value % sizes[TENSOR_AXIS]:
            raise UserError(
                f"mesh.tensor={sizes[TENSOR_AXIS]} does not divide model.{field}={value}."
            )
    return mesh


def microbatches(config: Config, mesh: Mesh) -> int:
    """In how many parts each device handles its share of the batch.

    Raises:
        UserError: the microbatch does not divide the share.
    """
    share = config.train.global_batch_size // batch_shards(mesh)
    micro = config.train.microbatch_size
    if micro <= 0 or micro >= share:
        return 1
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        raise UserError(
            f"train.microbatch_size={micro} does not divide a device's share of the batch, "
            f"{config.train.global_batch_size} / {batch_shards(mesh)} = {share} sequences; "
            f"{nearest} does."
        )
    return share // micro


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices (or tensor-parallel groups of them) the batch is shared out."""
    return _size(mesh, BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def axis_names(boxed_params: Any) -> Any:
    """The logical axis names of every parameter, out of what `Module.init` returned.

    Raises:
        ValueError: a parameter without names, or with one that no rule covers.
    """

    def names(path: Any, leaf: Any) -> tuple[str, ...]:
        where = jax.tree_util.keystr(path)
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {where} has no logical axis names.")
        unknown = [name for name in leaf.names if name not in RULES]
        if unknown or len(leaf.names) != leaf.value.ndim:
            raise ValueError(
                f"parameter {where} of shape {leaf.value.shape} is named {leaf.names}; no rule "
                f"covers {unknown}."
            )
        return tuple(map(str, leaf.names))

    return jax.tree_util.tree_map_with_path(names, boxed_params, is_leaf=_is_box)


def param_spec(mesh: Mesh, names: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """By the table; what its mesh axes do not divide is split over fewer of them, or stays whole,
    as does what one device holds.

    (30,000 pieces do not divide over 64 chips, say.) Vectors are split over `tensor` alone: they
    are small, and each collective has its price.
    """
    vector = sum(name not in STACK_AXES for name in names) < 2
    spec = []
    for name, size in zip(names, shape, strict=True):
        rule = RULES[name]
        choices: tuple[Any, ...] = (rule,)
        if rule == STATE_AXES:
            choices = () if vector else (STATE_AXES, *reversed(STATE_AXES))
        sizes = {c: _size(mesh, c) for c in choices if c is not None}
        fits = [c for c, devices in sizes.items() if devices > 1 and size % devices == 0]
        spec.append(fits[0] if fits else None)
    return PartitionSpec(*spec)


def gathered(part: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
    """A parameter whole but for its tensor split, out of each device's part; inside a shard_map.

    What travels is rounded to `dtype`, the one it is computed in; what is returned is float32
    again, so that gradients of it are summed in float32. (Rounding a second time changes nothing,
    and the compiler leaves out the way there and back.)
    """
    for axis, mesh_axes in _split_axes(spec):
        travelling = part.astype(dtype)
        part = jax.lax.all_gather(travelling, mesh_axes, axis=axis, tiled=True)
        part = part.astype(np.float32)
    return part


def reduced(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """This device's part of a gradient, summed over all that share out the batch; inside a
    shard_map.

    Inside a slice first, each device keeping its part, then over the slices, part by part.
    """
    left = list(BATCH_AXES)
    for axis, mesh_axes in _split_axes(spec):
        gradient = jax.lax.psum_scatter(gradient, mesh_axes, scatter_dimension=axis, tiled=True)
        left = [name for name in left if name not in mesh_axes]
    return jax.lax.psum(gradient, tuple(left))


def first_row(mesh: Mesh, global_batch_size: int) -> jax.Array:
    """The number, in the global batch, of the first row this device holds; inside a shard_map."""
    return jax.lax.axis_index(BATCH_AXES) * (global_batch_size // batch_shards(mesh))


def local_rows(sharding: NamedSharding, batch_size: int) -> list[tuple[int, int]]:
    """The ranges [start, stop) of a global batch's rows that this process's devices hold,
    ascending.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({s[0].indices(batch_size)[:2] for s in slices if s is not None})


def to_global(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """This process's rows, as its part of global arrays of `batch_size` rows."""
    return {
        key: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
        for key, value in batch.items()
    }


def _split_axes(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    """(array axis, mesh axes) of every axis that is split over STATE_AXES or one of them."""
    found = []
    for axis, entry in enumerate(spec):
        mesh_axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        if mesh_axes and set(mesh_axes) <= set(STATE_AXES):
            found.append((axis, mesh_axes))
    return found


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _axis_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        raise UserError(
            f"{asked} does not make {devices} devices; set one axis to -1 to take whatever is "
            "left, "
            "or change them so that their product is the number of devices."
        )
    return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}


def _is_box(leaf: object) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)

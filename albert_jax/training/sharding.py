"""Where arrays live: the device mesh, one table from logical axes to mesh axes, and batches onto
devices.

The mesh has three axes. `data` and `fsdp` both share out the batch; `fsdp` also splits parameters
and optimizer state; `tensor` splits heads and feed-forward columns.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from albert_jax.config import Config, MeshConfig
from albert_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. Parameters above the line, activations (act_*) below it.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": "fsdp",
    "position": None,
    "type": None,
    "embedding": None,
    "hidden": "fsdp",
    "heads": "tensor",
    "ffn": "tensor",
    "label": None,
    "group": None,
    "inner": None,
    # ---
    "act_batch": BATCH_AXES,
    "act_length": None,
    "act_hidden": None,
    "act_heads": "tensor",
    "act_head_size": None,
    "act_ffn": "tensor",
    "act_slot": None,
    "act_vocab": None,
}


def make_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh a config asks for, over all of `devices`.

    Raises:
        UserError: the axes do not multiply to the number of devices, or do not divide the batch or
            the model.
    """
    sizes = _axis_sizes(config.mesh, len(devices))
    mesh = Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))
    shards = batch_shards(mesh)
    batch, micro = config.train.global_batch_size, config.train.microbatch_size
    if batch % shards:
        raise UserError(
            f"train.global_batch_size={batch} does not split over mesh.data={sizes['data']} x "
            f"mesh.fsdp={sizes['fsdp']}; nearest that do: {batch // shards * shards or shards} and "
            f"{-(-batch // shards) * shards}."
        )
    share = batch // shards
    if micro and share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        raise UserError(
            f"train.microbatch_size={micro} does not divide a device's share of the batch, "
            f"{batch} / {shards} = {share} sequences; {nearest} does."
        )
    for field in ("num_attention_heads", "intermediate_size"):
        value = getattr(config.model, field)
        if value % sizes["tensor"]:
            raise UserError(f"mesh.tensor={sizes['tensor']} does not divide model.{field}={value}.")
    return mesh


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices (or tensor-parallel groups of them) the batch is shared out."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


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


def param_sharding(mesh: Mesh, names: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """By the table; a dimension that its mesh axis does not divide stays whole.

    (30,000 pieces do not divide over 64 chips, say.)
    """
    spec = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip((RULES[name] for name in names), shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


@contextlib.contextmanager
def constraints(mesh: Mesh) -> Iterator[None]:
    """A context in which the model's named activations are placed by the table."""
    with mesh, nn.logical_axis_rules(tuple(RULES.items())):
        yield


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

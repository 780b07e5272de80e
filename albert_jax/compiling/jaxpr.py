"""Counts the work of a traced program, exactly, before any compiler touches it.

In:  the jaxpr of a traced function (`jitted.trace(...).jaxpr`).
Out: `Work`: operations of its matrix products on all devices together, a scan's body as often as it
     runs, and its Pallas kernels, which compilers do not look into.

Inside a `shard_map` shapes are those of one device, so its body counts once for each device of the
mesh. A `while` of unknown turns counts once, every branch of a `cond` as if it ran.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas kernel; figures are of one call on one device.

    Attributes:
        name: its function's.
        calls: on all devices together.
        flops: operations of its matrix products; as its author declares them, if at all, since a
            body may multiply by zeros to suit the matrix unit.
        mxu_flops: the same with the sides of each product rounded up to the matrix unit's.
        bytes: read and written in the main memory, if each block is fetched when its turn comes.
        turns: of its grid.
    """

    name: str
    calls: int
    flops: int
    mxu_flops: int
    bytes: int
    turns: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program does, on all devices together.

    Attributes:
        flops: operations of its matrix products, kernels included; two a multiply-add.
        kernels: its Pallas kernels.
    """

    flops: int
    kernels: tuple[Kernel, ...]

    @property
    def kernel_flops(self) -> int:
        """The part of `flops` that is inside kernels."""
        return sum(kernel.calls * kernel.flops for kernel in self.kernels)


def work(jaxpr: Any, mxu_width: int = 128) -> Work:
    """The work of a (closed) jaxpr, for kernels on a matrix unit of that many rows and columns."""
    flops = 0
    kernels: collections.Counter[Kernel] = collections.Counter()
    for equation, times in _equations(_open(jaxpr), 1):
        if equation.primitive.name == "dot_general":
            flops += times * _product(equation, mxu_width)[0]
        elif equation.primitive.name == "pallas_call":
            kernel = _kernel(equation, mxu_width)
            flops += times * kernel.flops
            kernels[kernel] += times
    return Work(flops, tuple(dataclasses.replace(kernel, calls=n) for kernel, n in kernels.items()))


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """Every equation, however deep, with how often it runs; a kernel's inside is left out."""
    for equation in jaxpr.eqns:
        yield equation, times
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            continue
        inner = times
        if name == "scan":
            inner *= params["length"]
        elif name == "shard_map":
            manual = params["newly_manual_axes"]
            inner *= math.prod(
                size for axis, size in params["mesh"].shape.items() if axis in manual
            )
        for value in params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                if isinstance(body, core.ClosedJaxpr | core.Jaxpr):
                    yield from _equations(_open(body), inner)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _product(equation: Any, mxu_width: int) -> tuple[int, int]:
    """Operations of a `dot_general`, as they are and as the matrix unit has them."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    (summed, _), (batch, right_batch) = equation.params["dimension_numbers"]
    right_summed = equation.params["dimension_numbers"][0][1]
    deep = math.prod(left[axis] for axis in summed)
    rows = math.prod(n for axis, n in enumerate(left) if axis not in (*summed, *batch))
    columns = math.prod(
        n for axis, n in enumerate(right) if axis not in (*right_summed, *right_batch)
    )
    many = 2 * math.prod(left[axis] for axis in batch)
    whole_deep, whole_columns = (-(-size // mxu_width) * mxu_width for size in (deep, columns))
    return many * rows * deep * columns, many * rows * whole_deep * whole_columns


def _kernel(equation: Any, mxu_width: int) -> Kernel:
    params = equation.params
    mapping = params["grid_mapping"]
    turns = math.prod(size for size in mapping.grid if isinstance(size, int))
    flops = mxu_flops = 0
    for inner, times in _equations(_open(params["jaxpr"]), turns):
        if inner.primitive.name == "dot_general":
            plain, whole = _product(inner, mxu_width)
            flops, mxu_flops = flops + times * plain, mxu_flops + times * whole
    estimate = params.get("cost_estimate")
    if estimate is not None and estimate.bytes_accessed:
        moved = int(estimate.bytes_accessed)
    else:
        moved = turns * sum(
            math.prod(_block_size(size) for size in block.block_shape)
            * block.array_aval.dtype.itemsize
            for block in mapping.block_mappings
        )
    if estimate is not None and estimate.flops:
        flops = int(estimate.flops)
    name = str(params.get("name") or getattr(params.get("name_and_src_info"), "name", "kernel"))
    return Kernel(name, 0, flops, mxu_flops, moved, turns)


def _block_size(size: Any) -> int:
    """A block's extent along one axis; axes that the kernel does not see count one."""
    return size if isinstance(size, int) else getattr(size, "block_size", 1)

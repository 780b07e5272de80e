"""The collectives of a TPU program: what kind, over which mesh axes, how many bytes, how often.

In:  a parsed program and the mesh it was compiled for.
Out: one `Collective` for each that a step starts.

libtpu writes some of them in its own way. An asynchronous one is printed where it starts, in every
fusion that it overlaps and where it is waited for: it counts where it starts. A fusion called
`all-reduce-scatter` is a reduce-scatter. Across slices there are no collectives but `send`s to the
network's runtime ("megascale"), which adds up what the slices sent.

Time: a collective over n chips that gives (or takes) `bytes` on each moves bytes (n-1)/n past every
chip, an all-reduce twice that ("How to Scale Your Model", Austin et al. 2025, chapter 3), over one
link for each torus axis that the group spans, two where the group closes a ring.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from albert_jax.compiling import hlo
from albert_jax.compiling.topology import Slice

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
REDUCTIONS = ("all-reduce", "reduce-scatter")
LARGE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        kind: one of KINDS.
        axes: mesh axes along which chips take part.
        bytes: on one chip, of the whole array: what goes in or comes out, whichever is more.
        dtype: of the largest array.
        times_per_step: how often it runs.
        in_loop: whether a loop repeats it.
        across_slices: over the data-center network.
        seconds: of all its runs in a step, if nothing overlaps it.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    dtype: str
    times_per_step: int
    in_loop: bool
    across_slices: bool
    seconds: float


def collectives(module: hlo.Module, mesh: Mesh, on: Slice) -> list[Collective]:
    """Every collective of a program, in the order of the text."""
    found = []
    for execution in module.executions:
        for instruction in execution.computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS and _starts_here(instruction, execution):
                found.append(_inside_slice(kind, instruction, execution, mesh, on))
            elif instruction.opcode == "send" and "_xla_megascale" in instruction.attributes:
                found.append(_across_slices(instruction, execution, mesh, on))
    return found


def large_in_loops(found: Iterable[Collective], at_least: int = LARGE) -> list[Collective]:
    """Those of `at_least` bytes that a loop repeats."""
    return [c for c in found if c.in_loop and c.bytes >= at_least]


def large_at_top(
    found: Iterable[Collective], kinds: Sequence[str], at_least: int = LARGE
) -> list[Collective]:
    """Those of these kinds and `at_least` bytes that run once a step."""
    return [c for c in found if not c.in_loop and c.kind in kinds and c.bytes >= at_least]


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of an instruction's attributes: lists of places in the flattened mesh.

    Four ways of writing them: `{{0,1},{2,3}}`, `{}` for all, `[2,2]<=[2,2]T(1,0)` (an array of
    groups, cut out of a transposed count), and `mesh['a'=2,'b'=2] {'b'}` (along named axes of a
    mesh of the compiler's own; `'b':(1)2` is a part of an axis).

    Raises:
        hlo.UnreadableError: none of these.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _braced(pairs[1])
    text = attributes.partition("replica_groups=")[2]
    if text.startswith("{}"):
        return [list(range(devices))]
    if text.startswith("{{"):
        return _braced(text[1 : text.index("}}") + 1])
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return (
            _counted(_numbers(iota[2]), _numbers(iota[3] or "")).reshape(_numbers(iota[1])).tolist()
        )
    if named := re.match(
        r"@?mesh\[([^\]]*)\](?:,? ?device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}", text
    ):
        return _along_axes(named[1], named[2] or "", named[3])
    raise hlo.UnreadableError(f"replica groups not understood: {text[:60]}")


def _starts_here(instruction: hlo.Instruction, execution: hlo.Execution) -> bool:
    if execution.fusion is None:
        return True
    if re.search(r'"flag_start":"\d', instruction.attributes):  # overlapped or awaited, not begun
        return False
    inside = execution.computation.instructions.values()
    return not any("AsyncCollectiveDone" in other.attributes for other in inside)


def _inside_slice(
    kind: str, instruction: hlo.Instruction, execution: hlo.Execution, mesh: Mesh, on: Slice
) -> Collective:
    known = execution.computation.instructions
    arrays = [array for name in instruction.operands for array in known[name].arrays]
    if execution.computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
        parameters = [i for i in known.values() if i.opcode == "parameter"]
        arrays = [array for parameter in parameters for array in parameter.arrays]
    size = sum(array.bytes for array in arrays)
    if not instruction.opcode.endswith("-start"):  # whose result repeats the operands
        size = max(size, instruction.bytes) if kind == "all-gather" else size
    elif kind == "all-gather":
        size = max(size, instruction.bytes - size)
    groups = replica_groups(instruction.attributes, mesh.size)
    group = max(groups, key=len)
    bandwidth = _ici_bandwidth(group, kind, mesh, on)
    return Collective(
        kind=kind,
        axes=_axes(groups, mesh),
        bytes=size,
        dtype=max(arrays, key=lambda array: array.bytes).dtype,
        times_per_step=execution.times,
        in_loop=execution.in_loop,
        across_slices=False,
        seconds=execution.times * _moved(kind, size, len(group)) / bandwidth,
    )


def _across_slices(
    send: hlo.Instruction, execution: hlo.Execution, mesh: Mesh, on: Slice
) -> Collective:
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    kind = transfer[1].lower().replace("_", "-") if transfer else "send"
    array = send.arrays[0]
    first = [getattr(d, "slice_index", 0) for d in mesh.devices.flat]
    groups = [[first.index(number) for number in sorted(set(first))]]
    return Collective(
        kind=kind,
        axes=_axes(groups, mesh),
        bytes=array.bytes,
        dtype=array.dtype,
        times_per_step=execution.times,
        in_loop=execution.in_loop,
        across_slices=True,
        seconds=execution.times * _moved(kind, array.bytes, on.slices) / on.chip.dcn_bandwidth,
    )


def _moved(kind: str, size: int, members: int) -> float:
    """Bytes that pass each chip."""
    if kind in ("collective-permute", "collective-broadcast", "send"):
        return size
    return (2 if kind == "all-reduce" else 1) * size * (members - 1) / members


def _axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    shape = tuple(mesh.shape.values())
    varying = np.zeros(len(shape), bool)
    for group in groups[:64]:  # all are alike
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        varying |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(mesh.axis_names, varying, strict=True) if varies)


def _ici_bandwidth(group: Sequence[int], kind: str, mesh: Mesh, on: Slice) -> float:
    devices = mesh.devices.flat
    coordinates = np.asarray([devices[place].coords for place in group])
    links = 0
    for axis in range(len(on.extents)):
        spanned = len(set(coordinates[:, axis]))
        if spanned > 1:
            links += 2 if spanned == on.extents[axis] and on.wraps(axis) else 1
    if kind == "collective-permute":
        links = 1
    return max(links, 1) * on.chip.link_bandwidth


def _braced(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _counted(sizes: Sequence[int], order: Sequence[int]) -> np.ndarray:
    places = np.arange(math.prod(sizes)).reshape(tuple(sizes))
    return places.transpose(tuple(order)) if order else places


def _along_axes(mesh: str, device_ids: str, axes: str) -> list[list[int]]:
    """Groups along axes, or parts of axes, of a mesh that the compiler names itself.

    An axis of size n that is used in part, `axis:(p)s`, is cut into p x s x the rest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
    if ids := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids):
        flat = _counted(_numbers(ids[1]), _numbers(ids[2] or "")).reshape(-1)
    elif device_ids:
        flat = np.asarray(_numbers(device_ids))
    else:
        flat = np.arange(math.prod(sizes.values()))
    used = list(_axis_parts(axes))
    shape: list[int] = []
    kept, grouped = [], []
    for name, size in sizes.items():
        cuts = sorted(
            {1, size}
            | {
                edge
                for axis, start, part in used
                if axis == name
                for edge in (start, start * (part or size))
            }
        )
        for low, high in itertools.pairwise(cuts):
            inside = any(
                axis == name and start <= low and high <= start * (part or size)
                for axis, start, part in used
            )
            (grouped if inside else kept).append(len(shape))
            shape.append(high // low)
    members = math.prod(shape[axis] for axis in grouped)
    return flat.reshape(shape).transpose((*kept, *grouped)).reshape(-1, members).tolist()


def _axis_parts(axes: str) -> Iterator[tuple[str, int, int]]:
    """(axis, size of what is before the part, size of the part; 0 for the whole axis)."""
    for name, start, part in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?'?", axes):
        yield name, int(start or 1), int(part or 0)

"""TPU chips and the slices they come in, as the ahead-of-time compiler knows them.

In:  a name such as "v5e:16x16", and a number of slices.
Out: a `Slice`: its chip's figures and device descriptions that programs compile for.

libtpu gives the descriptions on any x86-64 Linux machine; no TPU is looked for or needed. Call
`quiet_libtpu` before jax is imported.

Sources: memory: what the compiler itself says it has ("exceeds available HBM (15.75G)"). HBM
bandwidth, chips a pod, network cards: Cloud TPU documentation, system architecture of each
generation. Link bandwidth: "How to Scale Your Model" (Austin et al. 2025), chapter 2. Clocks: those
at which the compiler's cycle model puts its best matrix products at 73 to 97 % of the peak.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from albert_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU; figures are of one chip.

    Attributes:
        name: as in a topology's name.
        hbm_bytes: memory that a program can use.
        hbm_bandwidth: bytes/s.
        clock: of the cycles in which the compiler estimates, Hz.
        mxu_width: rows and columns of one matrix unit.
        link_bandwidth: of one link to a neighbour, bytes/s in one direction.
        dcn_bandwidth: a chip's part of its host's network cards, bytes/s in one direction.
        torus_axes: 2 or 3; a slice has that many extents.
        pod_chips: the largest slice.
        usual: slices that Cloud TPU offers.
        options: what the compiler must be told besides the name.
        note: for the list.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    clock: float
    mxu_width: int
    link_bandwidth: float
    dcn_bandwidth: float
    torus_axes: int
    pod_chips: int
    usual: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            hbm_bytes=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            clock=1.5e9,
            mxu_width=128,
            link_bandwidth=45e9,
            dcn_bandwidth=3.125e9,
            torus_axes=2,
            pod_chips=256,
            usual=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        ),
        Chip(
            name="v6e",
            hbm_bytes=int(31.24 * GIB),
            hbm_bandwidth=1640e9,
            clock=1.75e9,
            mxu_width=256,
            link_bandwidth=90e9,
            dcn_bandwidth=12.5e9,
            torus_axes=2,
            pod_chips=256,
            usual=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        ),
        Chip(
            name="v4",
            hbm_bytes=int(30.75 * GIB),
            hbm_bandwidth=1228e9,
            clock=1.05e9,
            mxu_width=128,
            link_bandwidth=45e9,
            dcn_bandwidth=6.25e9,
            torus_axes=3,
            pod_chips=4096,
            usual=(
                "2x2x1",
                "2x2x2",
                "2x2x4",
                "2x4x4",
                "4x4x4",
                "4x4x8",
                "4x8x8",
                "8x8x8",
                "8x8x16",
            ),
            # Without it each chip comes as two devices of half the memory.
            options={"chip_config_name": "megacore"},
            note="two cores work as one device (megacore)",
        ),
        Chip(
            name="v5p",
            hbm_bytes=int(95.73 * GIB),
            hbm_bandwidth=2765e9,
            clock=1.75e9,
            mxu_width=128,
            link_bandwidth=90e9,
            dcn_bandwidth=6.25e9,
            torus_axes=3,
            pod_chips=6144,
            usual=(
                *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
                *("8x8x16", "8x16x16", "16x16x16"),
            ),
            note="some programs give no text to count in; memory and FLOPs are there",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """`slices` equal slices of one kind of chip, joined by the data-center network where there are
    more than one.

    Attributes:
        name: "v5e:16x16".
        extents: chips along each axis of one slice's torus.
        devices: descriptions, one a chip, in the compiler's order; `device_kind`, `coords`,
            `process_index`, and `slice_index` where there are several slices.
    """

    name: str
    chip: Chip
    extents: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def hosts(self) -> int:
        """Virtual machines."""
        return len({device.process_index for device in self.devices})

    def wraps(self, axis: int) -> bool:
        """Whether the last chip of a torus axis is a neighbour of the first.

        A 2D pod closes only axes that run through all of its 16; a 3D slice made of whole 4x4x4
        cubes closes all of its axes.
        """
        if self.chip.torus_axes == 2:
            return self.extents[axis] == 16
        return all(extent % 4 == 0 for extent in self.extents)


def quiet_libtpu() -> None:
    """Keeps libtpu from looking for a TPU, from locking others out, and from talking.

    To be called before jax is imported. The user's own values win.
    """
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # what this "machine" is; any known name will do
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def libtpu_installed() -> bool:
    """Whether there is a TPU compiler here."""
    return importlib.util.find_spec("libtpu") is not None


def get(name: str, slices: int = 1) -> Slice:
    """The slice called `name`, `slices` times.

    Raises:
        UserError: no such chip or shape, or no libtpu.
    """
    chip_name, _, shape = name.partition(":")
    if chip_name not in CHIPS:
        raise UserError(
            f"--topology={name}: no chip {chip_name!r}; there are "
            f"{', '.join(CHIPS)}, for example {_example(CHIPS['v5e'])}. --list shows them."
        )
    chip = CHIPS[chip_name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != chip.torus_axes - 1:
        raise UserError(
            f"--topology={name}: {chip_name} slices have {chip.torus_axes} extents, for example "
            f"{_example(chip)}; --list shows the usual ones."
        )
    extents = tuple(map(int, shape.split("x")))
    if math.prod(extents) > chip.pod_chips:
        raise UserError(
            f"--topology={name}: {math.prod(extents):,} chips; the largest {chip_name} slice has "
            f"{chip.pod_chips:,}. Take --slices for more."
        )
    if slices < 1:
        raise UserError(f"--slices={slices} is no number of slices; give 1 or more.")
    if not libtpu_installed():
        raise UserError(
            "the TPU compiler is not installed (package libtpu, for Linux on x86-64); "
            "`make setup` or `pip install 'albert-jax[tpu]'` brings it."
        )
    import jax
    from jax.experimental import topologies

    options = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if chip.torus_axes == 2 and math.prod(extents) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={name}: the compiler knows no such slice ({reason}); the usual ones are "
            f"{', '.join(f'{chip_name}:{usual}' for usual in chip.usual)}."
        ) from None
    return Slice(name, chip, extents, slices, tuple(described.devices))


def _example(chip: Chip) -> str:
    return f"{chip.name}:{chip.usual[-1]}"

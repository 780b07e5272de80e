"""All that can be known of a training step before it runs on a slice that nobody has rented yet.

In:  a compiled step (`training.fitting`) and the slice it is compiled for.
Out: `Analysis`: memory, operations, collectives, and an estimate of the step's time.

The estimate adds up three things that nothing here lets overlap: the compiler's own cycle estimate
of every instruction, the collectives by the bandwidth of the links, and the Pallas kernels, which
the compiler does not estimate. It was never measured; use it to compare settings.
"""

import dataclasses
import math

import jax

from albert_jax.compiling import collectives, hlo, jaxpr, topology
from albert_jax.compiling.collectives import Collective
from albert_jax.compiling.jaxpr import Kernel
from albert_jax.config import Config
from albert_jax.training import fitting, telemetry

OPTIMIZER_SCOPE = "optimizer"  # the jax.named_scope of clipping and update

# What one turn of a kernel's grid costs beside its work, by JAX's Pallas documentation.
_KERNEL_TURN_SECONDS = 0.35e-6

# The share of a chip's peak that our own kernels reach, forward and backward, at 512 tokens and
# heads of 64: their operations / (cycles of libtpu's static schedule x peak / clock). For 128 lanes
# of a row that schedule (libtpu 0.0.51, --xla_jf_dump_static_llo_profile_to) has 2,345 and 4,553
# cycles on v5e, 1,221 and 2,373 on v5p (and, taken over, on v4), 1,426 and 3,012 on v6e.
_KERNEL_EFFICIENCY = {
    "flash_forward": {"v5e": 0.437, "v4": 0.419, "v5p": 0.419, "v6e": 0.179},
    "flash_backward": {"v5e": 0.561, "v4": 0.539, "v5p": 0.539, "v6e": 0.212},
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on every chip, by part.

    Attributes:
        compute: the compiler's cycles / clock.
        collectives: inside the slice, by the links' bandwidth.
        network: across slices, by the hosts' network cards.
        kernels: see `kernel_seconds`.
        optimizer: the part of `compute` that clips and updates.
        matrix_unit: the program's products at the chip's peak.
        memory: bytes moved at the memory's bandwidth.
    """

    compute: float
    collectives: float
    network: float
    kernels: float
    optimizer: float
    matrix_unit: float
    memory: float

    @property
    def step(self) -> float:
        """Of the whole step, nothing overlapping."""
        return self.compute + self.collectives + self.network + self.kernels


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of one step.

    Attributes:
        config: without `auto`.
        on: the slice.
        mesh: axis sizes.
        parameters: how many.
        parameter_bytes, state_bytes: on one chip; the state includes the parameters.
        memory: on one chip.
        model_flops: by formula, of the global batch.
        program_flops: of the traced program, all chips together, kernels included.
        attention: the implementation in the step.
        kernels: the Pallas kernels of all chips.
        hlo_flops: as the compiler left it, all chips together, kernels as traced; None without
            text.
        hbm_bytes_moved: on one chip; None without text.
        collectives: None without text.
        estimate: None without text.
        unreadable: why there is no text to count in; empty where there is.
        compile_seconds: of tracing, lowering and compiling.
    """

    config: Config
    on: topology.Slice
    mesh: dict[str, int]
    parameters: int
    parameter_bytes: int
    state_bytes: int
    memory: fitting.Memory
    model_flops: float
    program_flops: int
    attention: str
    kernels: tuple[Kernel, ...]
    hlo_flops: int | None
    hbm_bytes_moved: int | None
    collectives: tuple[Collective, ...] | None
    estimate: Estimate | None
    unreadable: str
    compile_seconds: float

    @property
    def chips(self) -> int:
        """In all slices."""
        return len(self.on.devices)

    @property
    def model_flops_utilization(self) -> float | None:
        """The model's operations in the estimated step, of what the chips could do in it."""
        if self.estimate is None:
            return None
        return self.model_flops / (self.estimate.step * peak_flops(self.on) * self.chips)


def analyse(fitted: fitting.Fitted, on: topology.Slice, text: str | None = None) -> Analysis:
    """Counts and estimates a compiled step, out of its text where that was kept (`hlo.dumped`)."""
    run, config = fitted.run, fitted.run.config
    assert fitted.memory is not None, "TPU programs say what memory they need"
    chips = len(on.devices)
    work = jaxpr.work(fitted.traced.jaxpr, on.chip.mxu_width)
    module, unreadable = None, ""
    try:
        module = hlo.Module(text or fitted.compiled.as_text() or "")
        found = tuple(collectives.collectives(module, run.mesh, on))
        work = _as_called(work, module, chips)
    # Some programs crash the compiler's printer after a successful compilation.
    except (jax.errors.JaxRuntimeError, hlo.UnreadableError) as error:
        module, found = None, None
        unreadable = str(error).splitlines()[0]
    batch = config.train.global_batch_size
    return Analysis(
        config=config,
        on=on,
        mesh=dict(run.mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params)),
        parameter_bytes=fitting.device_bytes(run.abstract_state.params),
        state_bytes=fitting.device_bytes(run.abstract_state),
        memory=fitted.memory,
        model_flops=batch
        * telemetry.model_flops_per_sequence(
            config.model, config.data, run.teacher.model.config if run.teacher else None
        ),
        program_flops=work.flops,
        attention=run.attention,
        kernels=work.kernels,
        hlo_flops=module.flops() * chips + work.kernel_flops if module else None,
        hbm_bytes_moved=module.hbm_bytes() if module else None,
        collectives=found,
        estimate=_estimate(module, found, work, on) if module and found is not None else None,
        unreadable=unreadable,
        compile_seconds=fitted.seconds,
    )


def peak_flops(on: topology.Slice) -> float:
    """Dense bf16 operations a second of one chip."""
    peak = telemetry.peak_flops(on.devices[0])
    assert peak is not None, f"{on.devices[0].device_kind} has no peak in telemetry"
    return peak


def kernel_seconds(kernel: Kernel, on: topology.Slice) -> float:
    """What one call of a Pallas kernel takes: the slower of its products and its traffic.

    Of our own kernels the compiler's schedule of the products is known. Of others it is not: their
    products run at the chip's peak, with sides rounded up to the matrix unit's, and each turn of
    the grid has its price.
    """
    traffic = kernel.bytes / on.chip.hbm_bandwidth
    if kernel.name in _KERNEL_EFFICIENCY:
        efficiency = _KERNEL_EFFICIENCY[kernel.name][on.chip.name]
        return max(kernel.flops / (efficiency * peak_flops(on)), traffic)
    products = kernel.mxu_flops / peak_flops(on)
    return max(products, traffic) + kernel.turns * _KERNEL_TURN_SECONDS


def _as_called(work: jaxpr.Work, module: hlo.Module, chips: int) -> jaxpr.Work:
    """The work with kernels called as often as the compiled program does: a trace still has those
    whose result a rematerialised layer turns out not to need.
    """
    calls = module.kernel_calls()
    kernels = tuple(
        dataclasses.replace(kernel, calls=calls[kernel.name] * chips or kernel.calls)
        for kernel in work.kernels
    )
    called = jaxpr.Work(0, kernels).kernel_flops
    return jaxpr.Work(work.flops - work.kernel_flops + called, kernels)


def _estimate(
    module: hlo.Module, found: tuple[Collective, ...], work: jaxpr.Work, on: topology.Slice
) -> Estimate:
    chips, chip = len(on.devices), on.chip
    return Estimate(
        compute=module.cycles() / chip.clock,
        collectives=math.fsum(c.seconds for c in found if not c.across_slices),
        network=math.fsum(c.seconds for c in found if c.across_slices),
        kernels=math.fsum(k.calls / chips * kernel_seconds(k, on) for k in work.kernels),
        optimizer=module.cycles(OPTIMIZER_SCOPE, outside_loops=True) / chip.clock,
        matrix_unit=work.flops / chips / peak_flops(on),
        memory=module.hbm_bytes() / chip.hbm_bandwidth,
    )

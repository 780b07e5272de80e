"""An analysis as a person reads it, and as JSON."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from albert_jax.compiling import analysis, topology
from albert_jax.compiling.analysis import Analysis
from albert_jax.compiling.collectives import LARGE
from albert_jax.config import Config
from albert_jax.errors import UserError
from albert_jax.training.fitting import DoesNotFitError


def text(
    found: Analysis,
    price_per_chip_hour: float | None = None,
    watts_per_chip: float | None = None,
    steps: int | None = None,
) -> str:
    """The whole report.

    Args:
        found: what was found out.
        price_per_chip_hour: in the user's currency.
        watts_per_chip: at work.
        steps: that the run makes of these; all of them by default.
    """
    steps = steps or found.config.train.steps
    parts = [_memory(found), _flops(found)]
    if found.unreadable:
        parts.append(
            "the compiler gave no text to count collectives and cycles in: " + found.unreadable
        )
    else:
        parts += [_collectives(found), _time(found, steps, price_per_chip_hour, watts_per_chip)]
    return "\n\n".join(parts)


def as_json(found: Analysis) -> dict[str, Any]:
    """The report's figures; those that could not be had are None. Bytes are of one chip, FLOPs of
    one step on all chips.
    """
    return {
        "fits": True,
        "topology": found.on.name,
        "slices": found.on.slices,
        "chips": found.chips,
        "hosts": found.on.hosts,
        "mesh": found.mesh,
        "microbatch_size": found.config.train.microbatch_size,
        "remat": found.config.model.remat,
        "attention": found.attention,
        "hbm_bytes_per_chip": found.on.chip.hbm_bytes,
        "memory_bytes_per_chip": found.memory.total,
        "memory": dataclasses.asdict(found.memory),
        "parameters": found.parameters,
        "parameter_bytes_per_chip": found.parameter_bytes,
        "state_bytes_per_chip": found.state_bytes,
        "model_flops": found.model_flops,
        "program_flops": found.program_flops,
        "hlo_flops": found.hlo_flops,
        "hbm_bytes_moved_per_chip": found.hbm_bytes_moved,
        "collectives": None
        if found.collectives is None
        else [
            {**dataclasses.asdict(collective), "axes": list(collective.axes)}
            for collective in found.collectives
        ],
        "kernels": [dataclasses.asdict(kernel) for kernel in found.kernels],
        "modelled_step_seconds": found.estimate.step if found.estimate else None,
        "modelled_seconds": dataclasses.asdict(found.estimate) if found.estimate else None,
        "modelled_model_flops_utilization": found.model_flops_utilization,
        "modelled_examples_per_second": found.config.train.global_batch_size / found.estimate.step
        if found.estimate
        else None,
        "compile_seconds": found.compile_seconds,
    }


def miss_as_json(config: Config, on: topology.Slice, miss: DoesNotFitError) -> dict[str, Any]:
    """The same for a step that does not fit: what is known of it, the rest None."""
    unknown = (
        *("model_flops", "program_flops", "collectives", "modelled_step_seconds"),
        *("modelled_model_flops_utilization", "compile_seconds"),
    )
    return {
        "fits": False,
        "topology": on.name,
        "slices": on.slices,
        "chips": len(on.devices),
        "microbatch_size": config.train.microbatch_size,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "hbm_bytes_per_chip": miss.available,
        "memory_bytes_per_chip": miss.needed,
        **dict.fromkeys(unknown),
    }


def chips() -> str:
    """The slices that can be compiled for."""
    rows = [("topology", "chips", "hosts", "GiB a chip", "TFLOP/s a chip", "")]
    for chip in topology.CHIPS.values():
        for shape in chip.usual:
            on = topology.get(f"{chip.name}:{shape}")
            rows.append(
                (
                    on.name,
                    f"{len(on.devices):,}",
                    f"{on.hosts:,}",
                    f"{chip.hbm_bytes / topology.GIB:.2f}",
                    f"{analysis.peak_flops(on) / 1e12:.0f}",
                    chip.note,
                )
            )
    return (
        f"{table(rows)}\n\nOther shapes of these chips work too; --slices=N takes N of one. "
        "Memory is what a program can use; peak is dense bfloat16."
    )


def sweep(outcomes: Iterable[tuple[Config, Analysis | DoesNotFitError | UserError]]) -> str:
    """Settings and what became of each: the fastest first, then those without a time."""
    header = ("microbatch", "remat", "attention", "GiB", "FLOPs x", "step s", "MFU", "")
    rows = []
    for config, outcome in outcomes:
        seconds, figures = _sweep_figures(outcome)
        size = str(config.train.microbatch_size or "share")
        rows.append((seconds, (size, config.model.remat, config.model.attention, *figures)))
    return table([header, *(row for _, row in sorted(rows))])


def _sweep_figures(
    outcome: Analysis | DoesNotFitError | UserError,
) -> tuple[float, tuple[str, ...]]:
    """Seconds to sort by; GiB, FLOPs, step, MFU and a remark."""
    if isinstance(outcome, DoesNotFitError):
        return math.inf, (_gib(outcome.needed), "", "", "", "does not fit")
    if isinstance(outcome, UserError):
        return math.inf, ("", "", "", "", f"refused: {outcome}")
    memory = _gib(outcome.memory.total)
    ratio = f"{outcome.program_flops / outcome.model_flops:.3f}"
    if outcome.estimate is None:
        return math.inf, (memory, ratio, "", "", "no text to estimate from")
    utilization = f"{outcome.model_flops_utilization:.1%}"
    return outcome.estimate.step, (memory, ratio, f"{outcome.estimate.step:.4f}", utilization, "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; those that hold numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [
        all(row[column][:1].isdigit() or not row[column] for row in rows[1:])
        for column in range(len(rows[0]))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )


def _memory(found: Analysis) -> str:
    memory, available = found.memory, found.on.chip.hbm_bytes
    rows = [
        ("memory of a chip", "GiB"),
        ("state and batch (arguments)", _gib(memory.arguments)),
        ("  of it parameters", _gib(found.parameter_bytes)),
        ("  of it state with parameters", _gib(found.state_bytes)),
        ("new state (outputs)", _gib(memory.outputs)),
        ("  in place of the old (aliased)", f"-{_gib(memory.aliased)}"),
        ("activations, gradients, copies (temporaries)", _gib(memory.temporaries)),
        ("code", _gib(memory.code)),
        ("total", _gib(memory.total)),
        ("usable", _gib(available)),
    ]
    listed = "\n".join(f"{name:<46}{value:>8}" for name, value in rows)
    host = f"\nand {_gib(memory.host)} GiB on the host for each chip" if memory.host else ""
    return f"{listed}  ({memory.total / available:.0%} used){host}"


def _flops(found: Analysis) -> str:
    ratio = found.program_flops / found.model_flops
    lines = [
        "floating-point operations of a step, all chips",
        f"  model, by formula          {found.model_flops:.4e}",
        f"  program, as traced         {found.program_flops:.4e}  x {ratio:.4f}: the rest is "
        "computed a second time",
    ]
    if found.hlo_flops is not None:
        change = found.hlo_flops / found.program_flops
        lines.append(
            f"  program, as compiled       {found.hlo_flops:.4e}  x {change:.4f} of the traced"
        )
    if found.hbm_bytes_moved is not None:
        lines.append(f"bytes moved in a chip's memory: {found.hbm_bytes_moved / 1e9:.1f} GB a step")
    return "\n".join(lines)


def _collectives(found: Analysis) -> str:
    groups: dict[tuple[str, ...], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    seconds: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for collective in found.collectives or ():
        key = (
            collective.kind,
            "+".join(collective.axes) or "-",
            "network" if collective.across_slices else "links",
            "yes" if collective.in_loop else "no",
            f">= {LARGE >> 20} MiB" if collective.bytes >= LARGE else "small",
        )
        count = groups[key]
        count[0] += 1
        count[1] += collective.times_per_step
        count[2] += collective.times_per_step * collective.bytes
        seconds[key] += collective.seconds
    if not groups:
        return "collectives: none"
    header = ("collectives", "mesh axes", "over", "in a loop", "size", "how many")
    rows = [(*header, "runs a step", "GiB a step", "ms")]
    rows += [
        (*key, str(count), str(runs), f"{size / topology.GIB:.3f}", f"{1e3 * seconds[key]:.2f}")
        for key, (count, runs, size) in sorted(groups.items(), key=lambda item: -item[1][2])
    ]
    return table(rows)


def _time(
    found: Analysis, steps: int, price_per_chip_hour: float | None, watts_per_chip: float | None
) -> str:
    estimate, chip = found.estimate, found.on.chip
    assert estimate is not None, "there is an estimate wherever there is text"
    examples = found.config.train.global_batch_size / estimate.step
    whole_run = steps == found.config.train.steps
    named = f"train.steps={steps:,}" if whole_run else f"{steps:,} such steps"
    chip_hours = steps * estimate.step * found.chips / 3600
    parts = (
        ("compiler's cycles", estimate.compute, f"at {chip.clock / 1e9:g} GHz"),
        ("  of it clipping and update", estimate.optimizer, ""),
        (
            "collectives in a slice",
            estimate.collectives,
            f"at {chip.link_bandwidth / 1e9:g} GB/s a link and direction",
        ),
        ("between slices", estimate.network, f"at {chip.dcn_bandwidth / 1e9:g} GB/s a chip"),
        (
            "Pallas kernels",
            estimate.kernels,
            "by the compiler's schedule of ours, the products and traffic of others",
        ),
        (
            "step",
            estimate.step,
            f"{examples:,.0f} examples/s, {found.model_flops_utilization:.1%} of the peak (MFU)",
        ),
        ("products alone, at the peak", estimate.matrix_unit, "a bound"),
        ("memory traffic alone", estimate.memory, f"a bound, {chip.hbm_bandwidth / 1e9:.0f} GB/s"),
    )
    lines = [
        "modelled step (an estimate, never measured)",
        *(f"  {name:<30}{1e3 * seconds:9.1f} ms  {note}".rstrip() for name, seconds, note in parts),
        "  assumed: nothing overlaps; the input pipeline keeps up; no checkpoints or evaluation",
        f"{named}: {steps * estimate.step / 3600:,.1f} hours, {chip_hours:,.0f} chip-hours",
    ]
    if price_per_chip_hour is not None:
        cost = chip_hours * price_per_chip_hour
        lines.append(f"  {cost:,.0f} at {price_per_chip_hour:g} a chip-hour")
    if watts_per_chip is not None:
        energy = chip_hours * watts_per_chip / 1e3
        lines.append(f"  {energy:,.0f} kWh at {watts_per_chip:g} W a chip (chips alone)")
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / topology.GIB:.2f}"


def setting(config: Config) -> str:
    """The settings that memory depends on, as the flags that make them."""
    return (
        f"--config.train.microbatch_size={config.train.microbatch_size} "
        f"--config.model.remat={config.model.remat} "
        f"--config.model.attention={config.model.attention}"
    )

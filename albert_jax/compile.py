r"""Compiles a run's training step for a TPU slice, without one: know before you pay.

  python -m albert_jax.compile --list
  python -m albert_jax.compile --config=configs/xxlarge.py --topology=v5e:16x16
  python -m albert_jax.compile --config=configs/xxlarge.py --topology=v5e:16x16 --slices=2 \
      --price_per_chip_hour=1.2 --json=step.json
  python -m albert_jax.compile --config=configs/base.py --topology=v5e:2x4 --sweep

The step is the very one that albert_jax.train runs, compiled by the real TPU compiler for the whole
slice: its memory, operations and collectives are what they will be; its time is modelled. One
compilation takes about half a minute. With --save=DIR the compiled step is kept, so
that a slice that looks there (see albert_jax/training/compilation_cache.py) need not compile. With
data.schedule the step of each stage is compiled; --json then has the figures of the one that needs
the most memory, and those of all as "stages".
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from albert_jax import cli, config, curriculum, storage
from albert_jax.compiling import hlo, topology
from albert_jax.config import Config
from albert_jax.errors import UserError
from albert_jax.progress import Progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from albert_jax.training import fitting

_SWEEP_ATTENTION = ("xla", "splash", "flash")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "compile")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a config file")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="a slice, such as v5e:16x16")
    parser.add_argument("--slices", type=int, default=1, help="how many of them; 1 by default")
    parser.add_argument("--list", action="store_true", help="show the slices, and stop")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the figures there; - for standard output"
    )
    parser.add_argument("--price_per_chip_hour", type=float, metavar="PRICE")
    parser.add_argument("--watts_per_chip", type=float, metavar="WATTS")
    parser.add_argument(
        "--sweep", action="store_true", help="compare microbatches, remat and attention"
    )
    parser.add_argument("--save", metavar="DIR", help="keep the compiled step there")
    args, overrides = cli.parse_with_overrides(parser, argv)
    topology.quiet_libtpu()
    if args.list:
        from albert_jax.compiling import report

        print(report.chips())
        return 0
    if args.config is None or args.topology is None:
        parser.error("--config and --topology are needed (or --list)")
    cfg = config.load(args.config, overrides)
    if cfg.model.vocab_size == 0:
        raise UserError(
            "model.vocab_size=0 means a token store's, and there is none here; give the number, "
            "for example --config.model.vocab_size=30000."
        )
    on = topology.get(args.topology, args.slices)

    from albert_jax.training import sharding
    from albert_jax.training.compiler_options import compiler_options

    mesh = sharding.make_mesh(cfg, on.devices)
    options: dict[str, Any] = dict(compiler_options(on.devices[0].device_kind))
    with tempfile.TemporaryDirectory() as folder:
        if args.save is None:  # what the compiler is asked to write becomes part of what is kept
            options |= hlo.dump_options(folder)
        if args.sweep:
            hardest = max(cfg.stages, key=lambda stage: stage.max_seq_length)
            if cfg.data.schedule:
                _say(_heading(hardest))
            _sweep(cfg.at(hardest), mesh, on, options, folder)
            return 0
        figures: list[dict[str, Any]] = []
        for stage, steps in curriculum.steps(cfg.stages, cfg.train.steps):
            if cfg.data.schedule and args.json != "-":
                print(("\n" if figures else "") + _heading(stage) + f": {steps:,} steps")
            figures.append(_compile(cfg.at(stage), mesh, on, options, folder, args, steps))
            if cfg.data.schedule:
                figures[-1] |= {**dataclasses.asdict(stage), "steps": steps}
        _write(args.json, figures[0] if len(figures) == 1 else _of_all(figures))
        if len(figures) > 1 and args.json != "-" and (seconds := _seconds(figures)):
            print(f"\nall {cfg.train.steps:,} steps: {seconds / 3600:,.1f} hours")
        return 0 if all(each["fits"] for each in figures) else 1


def _heading(stage: curriculum.Stage) -> str:
    return (
        f"from step {stage.first_batch:,} on, {stage.global_batch_size} sequences of "
        f"{stage.max_seq_length}"
    )


def _of_all(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a schedule: the figures of the stage that needs the most memory, and those of each."""
    hardest = max(figures, key=lambda each: each["memory_bytes_per_chip"])
    fits = all(each["fits"] for each in figures)
    return {**hardest, "fits": fits, "stages": figures, "modelled_run_seconds": _seconds(figures)}


def _seconds(figures: list[dict[str, Any]]) -> float | None:
    """Of all stages' steps; None where one is not known."""
    if any(each["modelled_step_seconds"] is None for each in figures):
        return None
    return sum(each["steps"] * each["modelled_step_seconds"] for each in figures)


def _compile(
    cfg: Config,
    mesh: "Mesh",
    on: topology.Slice,
    options: dict[str, Any],
    folder: str,
    args: argparse.Namespace,
    steps: int,
) -> dict[str, Any]:
    """Compiles one step, of which the run makes `steps`, and reports on it; returns its figures."""
    from albert_jax.compiling import analysis, report
    from albert_jax.training import compilation_cache, fitting, program

    _say(f"compiling for {len(on.devices):,} chips of {args.topology}")

    missed: list[Config] = []

    def tell(candidate: Config, miss: fitting.DoesNotFitError) -> None:
        missed.append(candidate)
        _say(f"  {report.setting(candidate)}: {miss}")

    cache = compilation_cache.Cache(args.save, described=True) if args.save else None
    try:
        fitted = fitting.fit(cfg, mesh, on.chip.hbm_bytes, options, cache, tell)
    except fitting.DoesNotFitError as miss:
        _explain(cfg, mesh, on, options, miss, missed)
        return report.miss_as_json(cfg, on, miss)
    if cache is not None:
        _say(cache.account(fitted.run.config, mesh))
    found = analysis.analyse(fitted, on, hlo.dumped(folder))
    if args.json != "-":
        print(program.describe(fitted.run), end="\n\n")
        print(report.text(found, args.price_per_chip_hour, args.watts_per_chip, steps))
        print(f"\ncompiled in {found.compile_seconds:.0f} s")
    return report.as_json(found)


def _explain(
    cfg: Config,
    mesh: "Mesh",
    on: topology.Slice,
    options: dict[str, Any],
    miss: "fitting.DoesNotFitError",
    missed: list[Config],
) -> None:
    """Says by how much a step does not fit, then looks for settings that do, beside those it
    `missed`: for each rematerialisation from the asked one on, the largest microbatch.
    """
    from albert_jax.compiling import report
    from albert_jax.training import fitting, sharding

    over = (miss.needed - miss.available) / topology.GIB
    _say(
        f"error: does not fit on {on.name}: a chip needs {miss.needed / topology.GIB:.2f} GiB and "
        f"has {miss.available / topology.GIB:.2f}; {over:.2f} GiB too much.\n"
        "looking for settings that fit:"
    )
    share = cfg.train.global_batch_size // sharding.batch_shards(mesh)
    tried = {(c.model.remat, c.train.microbatch_size or share) for c in missed}
    largest = max(size for _, size in tried)
    remats = fitting.REMAT_BY_COST
    fits = False
    for remat in remats[min(remats.index(remat) for remat, _ in tried) :]:
        for candidate in _microbatches(cfg, largest, remat):
            if (remat, candidate.train.microbatch_size) in tried:
                continue
            try:
                fitted = fitting.compile_step(candidate, mesh, on.chip.hbm_bytes, options)
            except fitting.DoesNotFitError:
                continue
            assert fitted.memory is not None
            needed = fitted.memory.total / topology.GIB
            _say(f"  {report.setting(candidate)}  fits: {needed:.2f} GiB")
            fits = True
            break
    if not fits:
        _say("  none; split the model with mesh.tensor, or take a larger slice or chip.")


def _microbatches(cfg: Config, largest: int, remat: str) -> Iterator[Config]:
    for size in range(largest, 0, -1):
        if largest % size == 0:
            yield dataclasses.replace(
                cfg,
                model=dataclasses.replace(cfg.model, remat=remat),
                train=dataclasses.replace(cfg.train, microbatch_size=size),
            )


def _sweep(
    cfg: Config, mesh: "Mesh", on: topology.Slice, options: dict[str, Any], folder: str
) -> None:
    """Compiles every combination and prints them, best first."""
    from albert_jax.compiling import analysis, report
    from albert_jax.training import fitting, sharding

    share = cfg.train.global_batch_size // sharding.batch_shards(mesh)
    # The smallest in which a matrix unit still has work, to the largest that ever fit.
    sizes = [size for size in range(min(share, 64), 0, -1) if share % size == 0 and size >= 4]
    variants = [
        dataclasses.replace(
            candidate, model=dataclasses.replace(candidate.model, attention=attention)
        )
        for attention in _SWEEP_ATTENTION
        for remat in fitting.REMAT_BY_COST
        for candidate in _microbatches(cfg, share, remat)
        if candidate.train.microbatch_size in (sizes or [share])
    ]
    outcomes: list[tuple[Config, Any]] = []
    with Progress("sweep", len(variants), "setting", plain_every_secs=0.0) as progress:
        for candidate in variants:
            try:
                fitted = fitting.compile_step(candidate, mesh, on.chip.hbm_bytes, options)
                outcome = analysis.analyse(fitted, on, hlo.dumped(folder))
            except (fitting.DoesNotFitError, UserError) as error:
                outcome = error
            outcomes.append((candidate, outcome))
            progress.advance(1, report.setting(candidate))
    print(report.sweep(outcomes))


def _write(path: str | None, figures: dict[str, Any]) -> None:
    if path == "-":
        print(json.dumps(figures))
    elif path is not None:
        storage.save(path, (json.dumps(figures, indent=2) + "\n").encode())


def _say(line: str) -> None:
    """Tells the person; standard output stays the report's."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)

"""Pretrains an encoder on a token store.

  python -m albert_jax.train --config=configs/tiny.py --workdir=runs/tiny \\
      --config.data.path=stores/mine
  python -m albert_jax.train --config=configs/base.py --workdir=runs/base \\
      --config.data.path=stores/mine --config.train.global_batch_size=256 \\
      --config.optimizer.learning_rate=4.4e-4
  python -m albert_jax.train --config=configs/base.py --workdir=runs/on --init=albert-base-v2 \\
      --config.data.path=stores/mine

A store, a run and a model may also be in a bucket: gs://BUCKET/FOLDER (pip install
'albert-jax[gcs]').

The same command again continues where the run stopped, however it stopped. The workdir gets
config.json, checkpoints/, metrics.jsonl, tensorboard/ and report/*.png. Every field of a config can
be set with --config.SECTION.FIELD=VALUE; the fields and what they mean stand in
albert_jax/config.py.

On several machines start the same command on each of them, the workdir being on storage that all
of them share. Cloud TPU, GKE and Slurm are recognised; elsewhere say which process is which:

  python -m albert_jax.train ... --coordinator_address=host0:8476 --num_processes=4 --process_id=0
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from albert_jax import cli, config
from albert_jax.data import store
from albert_jax.errors import UserError

if TYPE_CHECKING:
    from albert_jax.training import hosts
    from albert_jax.training.step import TrainState


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    started = time.monotonic()
    parser = cli.parser(__doc__ or "", "train")
    parser.add_argument(
        "--init",
        type=pathlib.Path,
        metavar="MODEL",
        help="start from a run, a folder of Transformers or a checkpoint of Google's",
    )
    parser.add_argument(
        "--slots", action="store_true", help="--init also gives the optimizer's moments and step"
    )
    cli.add_run_flags(parser)
    args, overrides = cli.parse_with_overrides(parser, argv)
    if args.slots and not args.init:
        parser.error("--slots goes with --init")

    from albert_jax.training import hosts  # and JAX: after what needs none

    with hosts.join(args.coordinator_address, args.num_processes, args.process_id) as processes:
        return _train(args, overrides, processes, started)


def _train(
    args: argparse.Namespace, overrides: list[str], processes: "hosts.Hosts", started: float
) -> int:
    cfg = config.load(args.config, overrides)
    if not cfg.data.path:
        raise UserError("data.path is empty; name a token store with --config.data.path=STORE.")
    if args.profile and args.profile[1] > cfg.train.steps:
        raise UserError(
            f"--profile={args.profile[0]}:{args.profile[1]} ends after "
            f"train.steps={cfg.train.steps}."
        )
    data = store.open_store(cfg.data.path)

    import jax

    from albert_jax.training import loop, pretraining, program, run_folder, sharding

    cfg = pretraining.resolve(cfg, data)
    start = _start(args, cfg, data, processes) if args.init else None
    mesh = sharding.make_mesh(cfg, jax.devices())
    run = program.build(cfg, mesh)
    if processes.leader:
        print(program.describe(run))
        for warning in config.recipe_warnings(cfg):
            print(f"warning: {warning}", file=sys.stderr)
    course = pretraining.Course(run, data)
    with run_folder.opened(args.workdir) as workdir:
        if not loop.train(run, course, workdir, processes, args.profile, started, start):
            return 1
        place = run_folder.named(workdir)
    if processes.leader:
        print(
            f"done: checkpoints, metrics.jsonl and report/ are in {place}\n"
            f"next: python -m albert_jax.evaluate --workdir={place}"
        )
    return 0


def _start(
    args: argparse.Namespace,
    cfg: config.Config,
    data: store.Store,
    processes: "hosts.Hosts",
) -> "Callable[[TrainState], TrainState]":
    """What makes of a new state one that starts from the model of --init."""
    from albert_jax.interop import initial, models
    from albert_jax.training import run_folder

    path = run_folder.fetched(args.init)
    model = models.read(path, slots=args.slots)
    theirs = models.read_tokenizer(path, model)
    initial.check(model, cfg.model, str(args.init), theirs, data.tokenizer())

    def start(state: "TrainState") -> "TrainState":
        if processes.leader:
            anew = ", ".join(initial.fresh(model, state))
            print(f"starts from {args.init}" + (f"; from nothing: {anew}" if anew else ""))
        return initial.started(state, model, args.slots)

    return start


if __name__ == "__main__":
    cli.run(main)

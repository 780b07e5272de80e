"""Pretrains an encoder on a token store.

  python -m albert_jax.train --config=configs/tiny.py --workdir=runs/tiny
  --config.data.path=stores/mine
  python -m albert_jax.train --config=configs/base.py --workdir=runs/base
  --config.data.path=stores/mine \\
      --config.train.global_batch_size=256 --config.optimizer.learning_rate=4.4e-4
  python -m albert_jax.train --config=configs/xxlarge.py:v1 --workdir=runs/xx
  --config.data.path=stores/wiki

The same command again continues where the run stopped, however it stopped. The workdir gets
config.json, checkpoints/, metrics.jsonl, tensorboard/ and report/*.png. Every field of a config can
be set with --config.SECTION.FIELD=VALUE; the fields and what they mean stand in
albert_jax/config.py.
"""

import pathlib
import sys
from collections.abc import Sequence

from albert_jax import cli, config
from albert_jax.data import store
from albert_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "train")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="the run's folder")
    args, overrides = cli.parse_with_overrides(parser, argv)
    cfg = config.load(args.config, overrides)
    if not cfg.data.path:
        raise UserError("data.path is empty; name a token store with --config.data.path=STORE.")
    data = store.open_store(cfg.data.path)

    import jax  # after the checks that need no device

    from albert_jax.training import loop, program, sharding

    cfg = loop.resolve(cfg, data)
    mesh = sharding.make_mesh(cfg, jax.devices())
    run = program.build(cfg, mesh)
    print(program.describe(run))
    for warning in config.recipe_warnings(cfg):
        print(f"warning: {warning}", file=sys.stderr)
    if not loop.train(run, data, args.workdir):
        return 1
    print(
        f"done: checkpoints, metrics.jsonl and report/ are in {args.workdir}\n"
        f"next: python -m albert_jax.evaluate --workdir={args.workdir}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

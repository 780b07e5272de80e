"""Fine-tunes a model on a task, evaluates it and writes its predictions.

  python -m albert_jax.finetune --config=configs/glue.py:mrpc --workdir=runs/mrpc \\
      --init=runs/base --data=glue_data
  python -m albert_jax.finetune --config=configs/squad.py:v1 --workdir=runs/squad \\
      --init=albert-base-v2 --data=squad --config.train.epochs=2
  python -m albert_jax.finetune --config=configs/glue.py:rte --workdir=runs/rte --init=runs/mnli \\
      --data=glue_data --seeds=5 --config.sweep.learning_rate=1e-5,3e-5
  python -m albert_jax.finetune --config=configs/table.py --workdir=runs/mine --init=runs/base \\
      --data=mine --config.task.train=rows.csv --config.task.text=body --config.task.label=topic

--init is a run of albert_jax.train or of this command, a folder of Hugging Face Transformers, or a
checkpoint of Google's; its size and tokenizer are taken over. Configs: glue, squad, race, xnli,
ner, retrieval, table. The same command again goes on where the run stopped. The workdir gets
config.json, checkpoints/ (the best and the newest), metrics.jsonl, tensorboard/, report/*.png,
evaluation.json with the best checkpoint's figures, and predictions/. Several seeds, or a grid
(config.sweep), get a folder each, and summary.json and summary.png above them.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from albert_jax import cli, config
from albert_jax.errors import UserError

if TYPE_CHECKING:
    from albert_jax.training import hosts


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    started = time.monotonic()
    parser = cli.parser(__doc__ or "", "finetune")
    parser.add_argument("--init", required=True, type=pathlib.Path, metavar="MODEL")
    parser.add_argument("--data", metavar="FOLDER", help="the task's files (data.path)")
    parser.add_argument(
        "--fresh", action="store_true", help="random weights: the size and tokenizer of --init"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="if the model of --init has none")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs that differ in it")
    cli.add_run_flags(parser)
    args, overrides = cli.parse_with_overrides(parser, argv)
    if args.seeds < 1:
        raise UserError(f"--seeds={args.seeds} must be at least 1.")

    from albert_jax.training import cpu_memory, hosts  # and JAX: after what needs none

    cpu_memory.keep_freed()
    with hosts.join(args.coordinator_address, args.num_processes, args.process_id) as processes:
        return _finetune(args, overrides, processes, started)


def _finetune(
    args: argparse.Namespace, overrides: list[str], processes: "hosts.Hosts", started: float
) -> int:
    cfg = config.load(args.config, overrides)
    if args.data:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=args.data))

    from albert_jax.tasks import course, finetuning
    from albert_jax.training import run_folder

    def say(text: str) -> None:
        if processes.leader:
            print(run_folder.spoken(text), flush=True)

    start = finetuning.origin(run_folder.fetched(args.init), args.tokenizer, args.fresh)
    cfg, notes = finetuning.adapted(cfg, start)
    task = course.read(cfg, start.tokenizer)
    for note in (*start.model.notes, *notes, *task.notes):
        if processes.leader:
            print(f"note: {run_folder.spoken(note)}", file=sys.stderr)
    counts = ", ".join(f"{split.name} {len(split.features):,}" for split in task.splits)
    say(f"{cfg.task.name}: rows to learn from {len(task.train):,}; {counts}")
    found = {}
    fixed = {override.partition("=")[0] for override in overrides}
    several = list(finetuning.variants(cfg, args.seeds))
    with run_folder.opened(args.workdir) as workdir:
        for name, variant in several:
            if name:
                say(f"== {name}")
            figures = finetuning.run(
                variant, start, workdir / name, processes, say, task, fixed, args.profile, started
            )
            if figures is None:
                return 1
            found[name] = figures
        if len(several) > 1 and processes.leader:
            print(finetuning.summarise(workdir, task.best_by, found))
        place = run_folder.named(workdir)
    say(
        f"done: checkpoints, report/, evaluation.json and predictions/ are in {place}\n"
        f"next: python -m albert_jax.predict --help"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)

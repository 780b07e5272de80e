"""Held-out losses, accuracies and perplexity of a checkpoint, over the whole validation split.

  python -m albert_jax.evaluate --workdir=runs/tiny
  python -m albert_jax.evaluate --workdir=runs/tiny --step=4000 --json=figures.json
  python -m albert_jax.evaluate --workdir=runs/mnli --data=glue_data

Every masked word and every pair counts once and equally, the last part of a batch included. The
masks are the same for every run of one sequence length (15 %), so figures of different runs
compare. Of a run on several stores: their figures in the mix's proportion, and those of each. Of a
fine-tuning: the figures of its task, and its predictions anew.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from albert_jax import cli, config, storage
from albert_jax.data import corpus
from albert_jax.errors import UserError
from albert_jax.progress import Progress
from albert_jax.training import run_folder


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "evaluate")
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a run of albert_jax.train"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument(
        "--data",
        help="another token store of the same tokenizer, or several with commas; of a run on "
        "Google's examples, other files",
    )
    parser.add_argument("--batch_size", type=int, help="sequences at once; the run's by default")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the figures there; - for standard output"
    )
    args = parser.parse_args(argv)
    with run_folder.opened(args.workdir) as args.workdir:
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    cfg = config.read_workdir(args.workdir)
    if cfg.task.name:
        return _evaluate_task(cfg, args)
    if not (args.data or cfg.data.path):
        raise UserError(
            f"{run_folder.named(args.workdir)} has no data of its own; name a token store with "
            "--data."
        )
    data = corpus.open_corpus(corpus.other(cfg.data, args.data) if args.data else cfg.data)

    from albert_jax.data import pipeline
    from albert_jax.training import inference, pretraining, sharding

    run, params, number = inference.load(args.workdir, args.step, args.batch_size)
    pretraining.resolve(run.config, data)
    batch_size = run.config.train.global_batch_size
    held_out = pretraining.HeldOut(run.config, data)
    rows = sharding.local_rows(run.batch_sharding, batch_size)
    with Progress("evaluate", held_out.batches, "batch") as progress:
        batches = pipeline.evaluation_batches(held_out, batch_size, rows)
        found = held_out.evaluate(run, params, progress.over(batches))
    metrics: dict[str, Any] = {"step": number, **found.pop("validation")}
    metrics["unigram_loss"] = data.unigram_loss
    stores = {split.partition("/")[2]: figures for split, figures in found.items()}
    if stores:
        metrics["stores"] = stores
    if args.json == "-":
        print(json.dumps(metrics))
        return 0
    if args.json:
        storage.save(args.json, (json.dumps(metrics, indent=2) + "\n").encode())
    print(
        f"step {number}, {metrics['examples']:.0f} held-out examples, "
        f"{metrics['masked_words']:.0f} masked pieces\n"
        f"{pretraining.summary(metrics, run.config)}"
    )
    for name, figures in stores.items():
        print(f"  {name}: {pretraining.summary(figures, run.config)}")
    print(
        "for comparison: a model that knows only how frequent each piece is has "
        f"{data.unigram_loss:.3f} nats"
    )
    return 0


def _evaluate_task(cfg: config.Config, args: argparse.Namespace) -> int:
    """Figures of a fine-tuning's splits, and its predictions."""
    from albert_jax.tasks import course
    from albert_jax.training import inference, workdir

    if args.data:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=args.data))
    tokenizer = workdir.load_tokenizer(args.workdir)
    unchanged = dataclasses.replace(cfg, augmentation=config.AugmentationConfig())
    task = course.read(unchanged, tokenizer)
    for note in task.notes:
        print(f"note: {run_folder.spoken(note)}", file=sys.stderr)
    run, params, number = inference.load(args.workdir, args.step, args.batch_size)
    found = course.judge(run, params, task, tokenizer, args.workdir / "predictions")
    record = {"step": number, "judged_by": task.best_by, "splits": found}
    if args.json == "-":
        print(json.dumps(record))
        return 0
    if args.json:
        storage.save(args.json, (json.dumps(record, indent=2) + "\n").encode())
    for name, figures in found.items():
        print(f"step {number}, {name}: {course.described(figures)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

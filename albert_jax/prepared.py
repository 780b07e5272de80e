"""What `albert_jax.prepare` does with data that is there: `--show` and `--export`.

  a look at a store: examples as a person reads them, statistics, histograms
    python -m albert_jax.prepare --show=stores/mine
    python -m albert_jax.prepare --show=stores/mine --examples=3 --first=100 \\
      --config.data.max_seq_length=128 --config.model.sentence_objective=nsp

  at what Google's script made
    python -m albert_jax.prepare --show='examples/*.tfrecord' --config.data.tokenizer=spiece.model

  a store as TFRecords for google-research/albert's run_pretraining.py, ten copies with masks each
    python -m albert_jax.prepare --export=google_tfrecord --input=stores/mine --output=examples \\
      --epochs=10 --config=configs/base.py --config.data.max_predictions_per_seq=77

The examples are those that a run with this config would see, in its order: --config=FILE and
--config.SECTION.FIELD=VALUE are those of albert_jax.train (default: those of ALBERT base).
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax import cli, config, storage
from albert_jax.data import corpus, google_examples, store
from albert_jax.errors import UserError

_AT_ONCE = 256  # examples


def job(argv: Sequence[str]) -> Callable[[Sequence[str]], None] | None:
    """The job that a command line of `prepare` asks for, if it is one of these."""
    for flag, wanted in (("--show", show), ("--export", export)):
        if any(word == flag or word.startswith(f"{flag}=") for word in argv):
            return wanted
    return None


def show(argv: Sequence[str]) -> None:
    """Prints examples and statistics, and draws histograms."""
    parser = cli.parser(__doc__ or "", "prepare")
    add = parser.add_argument
    add("--show", required=True, metavar="STORE", help="a token store, or Google's examples")
    add("--examples", type=_count, default=5, metavar="N", help="to print (default: 5)")
    add("--first", type=_count, default=0, metavar="I", help="of the run's examples (default: 0)")
    add(
        "--sample",
        type=_count,
        default=4096,
        metavar="N",
        help="examples that are counted for the statistics; at most an epoch (default: 4096)",
    )
    add("--split", choices=store.SPLITS, default="train", help="default: train")
    add(
        "--output",
        type=_folder,
        metavar="FOLDER",
        help="of the histograms (default: NAME_examples in the current folder)",
    )
    flags, overrides = _parsed(parser, argv)
    path = flags.show
    if google_examples.are_records(path):
        length, predictions = google_examples.shape(path)
        shape = [f"data.max_seq_length={length}", f"data.max_predictions_per_seq={predictions}"]
        overrides = [f"data.format={google_examples.FORMAT}", *shape, *overrides]
    cfg = _config(flags.config, [f"data.path={path}", *overrides])
    cfg, data = _opened(cfg)

    from albert_jax.data import examples, statistics, viewing
    from albert_jax.training import pretraining

    builder = pretraining.example_builder(cfg, data, flags.split)
    spoken = data.tokenizer()
    N = builder.examples_per_epoch
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{path}, {flags.split}: {N:,} examples an epoch\n\n{viewing.LEGEND}")
    batch = builder.rows(np.arange(flags.first, flags.first + flags.examples))
    for row in range(flags.examples):
        labels = batch.get("sentence_order_labels")
        label = viewing.describe_label(
            None if labels is None else int(labels[row]),
            cfg.model.sentence_objective,
            cfg.data.single_sentence,
        )
        text = viewing.example(
            batch,
            row,
            spoken,
            f"example {flags.first + row}, {label}",
            colours=colours,
            width=min(shutil.get_terminal_size().columns, 120),
        )
        print(f"\n{text}")
    sample = min(flags.sample, N) or 1
    found = statistics.of(
        (
            builder.rows(np.arange(first, min(first + _AT_ONCE, sample)))
            for first in range(0, sample, _AT_ONCE)
        ),
        examples.Vocabulary.of(spoken),
        cfg.data.masked_lm_prob,
    )
    print(f"\nstatistics of {found.examples:,} examples\n{viewing.summary(found, spoken)}")
    name = Path(path).parent.name if "*" in Path(path).name else Path(path).stem
    folder = flags.output or Path(f"{name}_examples")
    overview = viewing.draw(found, folder, cfg.data.masked_lm_prob, cfg.data.ngram)
    print(f"{'histograms':<20} {overview}, and each for itself")


def export(argv: Sequence[str]) -> None:
    """Writes a store's examples as TFRecords."""
    parser = cli.parser(__doc__ or "", "prepare")
    add = parser.add_argument
    add("--export", required=True, choices=(google_examples.FORMAT,), help="the format")
    add("--input", required=True, metavar="STORE", help="a token store")
    add("--output", required=True, type=_folder, metavar="FOLDER", help="the folder to make")
    add(
        "--epochs",
        type=_count,
        default=1,
        metavar="N",
        help="copies of the text, with other masks each (default: 1; the script's dupe_factor)",
    )
    flags, overrides = _parsed(parser, argv)
    cfg, data = _opened(_config(flags.config, [f"data.path={flags.input}", *overrides]))
    if not isinstance(data, store.Store):
        raise UserError(f"--input={flags.input} is no token store; only a store is exported.")

    from albert_jax.data import google_export
    from albert_jax.training import pretraining

    # One number of slots for all files, as the script has it; else as a run evaluates.
    slots = cfg.data.max_predictions_per_seq
    held_out = dataclasses.replace(pretraining.held_out(cfg.data), max_predictions_per_seq=slots)
    train = pretraining.example_builder(cfg, data, "train")
    splits = [google_export.Split("train", train, flags.epochs)]
    if data.manifest["splits"]["validation"]["tokens"]:
        builder = pretraining.example_builder(cfg, data, "validation", held_out)
        splits.append(google_export.Split("validation", builder, 1))
    google_export.export(splits, data.tokenizer(), flags.output)
    for split in splits:
        files = len(list(split.files()))
        print(f"{split.name:<12}{split.examples:>14,} examples in {files:,} files")
    shape = {"max_seq_length": cfg.data.max_seq_length, "max_predictions_per_seq": slots}
    here = ["python", "-m", "albert_jax.train", f"--config={flags.config or 'configs/base.py'}"]
    here += [f"--config.data.format={google_examples.FORMAT}"]
    here += [f"--config.data.path={flags.output}/train-*"]
    here += [f"--config.data.validation_path={flags.output}/validation-*"] * (len(splits) > 1)
    here += [f"--config.data.{name}={value}" for name, value in shape.items()]
    there = ["python", "-m", "albert.run_pretraining", f"--input_file={flags.output}/train-*"]
    there += [f"--{name}={value}" for name, value in shape.items()]
    print(f"read them with\n  {shlex.join(here)}\nor\n  {shlex.join(there)}")


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a config file of a run")
    return cli.parse_with_overrides(parser, argv)


def _config(file: str | None, overrides: Sequence[str]) -> config.Config:
    return config.load(file, overrides) if file else config.load_default(overrides)


def _opened(cfg: config.Config) -> tuple[config.Config, Any]:
    """The config with the data's vocabulary and a pair a row, and the data."""
    data = corpus.open_corpus(cfg.data)
    model = dataclasses.replace(cfg.model, vocab_size=data.vocab_size)
    pairs = dataclasses.replace(cfg.data, packing=False, schedule="")
    return dataclasses.replace(cfg, model=model, data=pairs), data


def _folder(text: str) -> Path:
    if storage.is_remote(text):
        raise argparse.ArgumentTypeError(
            f"{text}: this is written to a disk; gcloud storage cp --recursive copies it on"
        )
    return Path(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return int(text)

"""Every fine-tuning task by its one command: from a pretrained encoder, from random weights of the
same shape, and two baselines that know no language, in one table.

The majority baseline says the most frequent label of the training rows. The bag baseline is
scikit-learn's TF-IDF over the pieces of each segment and the pairs of neighbouring pieces, with a
logistic regression (a ridge regression for numbers; the bare cosine for retrieval), on the very
pieces that the encoder reads. Both are scored by the task's own figures.

Without --init, the encoder is one that is pretrained first, on the novels, in OUTPUT/encoder. All
of it goes on where it was stopped, by the same command.

  python benchmarks/tasks.py --data=DATA --output=runs/tasks
  python benchmarks/tasks.py --init=runs/mine --data=DATA --output=runs/tasks --tasks sst-2 mrpc
  python benchmarks/tasks.py --init=runs/mine --data=DATA --output=runs/grid --tasks sst-2 qnli \
      --rows=300 --learning_rate 1e-4 5e-4 --seeds=3

DATA holds `glue/` (the TSV folders), `squad/`, `race/RACE/`, `xnli/`, `ner/`, `retrieval/` and
`corpus/en_novels/`; a task whose folder is missing is left out. QNLI is trained on a part of its
validation rows and scored on the others, for its training set may be only a sample; `authors` is a
table of paragraphs of ten novels, made here. Of several rates, each start has the one that is best
for it; of several seeds, the mean is given, and how far they lie apart.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
from typing import IO, Any, NamedTuple

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, Ridge

from albert_jax import config as config_lib
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.interop import models
from albert_jax.tasks import course
from albert_jax.tasks.task import Features, Outputs, Task
from albert_jax.training import telemetry

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADS_OF_TEXTS = ("sequence_classification", "embedding")  # which a bag of pieces can do
COLUMNS, WIDTHS = ("majority", "bag", "random", "pretrained"), (10, 10, 18, 18)
QNLI_TRAIN = 4463  # of its 5,463 validation rows
ENCODER = (  # over an hour on two cores
    "model.hidden_size=192",
    "model.embedding_size=192",
    "model.num_hidden_groups=2",
    "model.num_attention_heads=3",
    "model.intermediate_size=768",
    "model.max_position_embeddings=128",
    "model.sentence_objective=nsp",
    "data.max_seq_length=128",
    "data.max_predictions_per_seq=39",
    "data.masked_lm_prob=0.3",
    "data.ngram=1",
    "data.schedule=0:64:64,10500:128:32",
    "train.steps=12000",
    "optimizer.learning_rate=1.5e-3",
    "eval.every_steps=2000",
    "checkpoint.every_steps=500",
)


class Run(NamedTuple):
    """What a task is trained with, small enough for a laptop.

    Attributes:
        config: file and argument.
        folder: of its files, under DATA; {scratch} is where files are made.
        epochs: passes over the training rows.
        length: pieces of a row at most.
        rows: about how many are trained on, for the steps between evaluations.
        more: other overrides.
    """

    config: str
    folder: str
    epochs: int
    length: int
    rows: int
    more: tuple[str, ...] = ()


TASKS = {
    "cola": Run("glue.py:cola", "glue", 2, 64, 8551),
    "sst-2": Run("glue.py:sst-2", "glue", 5, 64, 3000),
    "mrpc": Run("glue.py:mrpc", "glue", 4, 112, 3668),
    "sts-b": Run("glue.py:sts-b", "glue", 4, 64, 5749),
    "qqp": Run("glue.py:qqp", "glue", 4, 64, 3000),
    "mnli": Run("glue.py:mnli", "glue", 5, 80, 2820),
    "qnli": Run("glue.py:qnli", "{scratch}", 5, 96, QNLI_TRAIN),
    "rte": Run("glue.py:rte", "glue", 3, 112, 2490),
    "wnli": Run("glue.py:wnli", "glue", 3, 64, 635),
    "squad 1.1": Run(
        "squad.py:v1",
        "squad",
        1,
        128,
        9000,
        ("task.train=train-v1.1.json", "task.validation=dev-v1.1.json", "task.max_query_length=24"),
    ),
    "squad 2.0": Run("squad.py:v2", "squad", 1, 128, 9000, ("task.max_query_length=24",)),
    "race": Run(
        "race.py:v2",
        "race",
        2,
        128,
        1636,
        ("task.train=RACE/dev", "task.validation=RACE/test", "task.max_query_length=48"),
    ),
    "xnli": Run("xnli.py", "xnli", 5, 80, 2820, ("task.train=../glue/MNLI/train.tsv",)),
    "ner wikiann": Run("ner.py", "ner/wikiann/en", 4, 64, 5000),
    "ner conll": Run("ner.py", "ner/conll2003_subset", 8, 64, 1200),
    "cranfield": Run("retrieval.py", "retrieval/cranfield", 8, 96, 960),
    "authors": Run("table.py", "{scratch}", 5, 64, 2000, ("task.train=train.csv",)),
}


def main() -> None:
    """Makes the runs that are not there yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", type=pathlib.Path, metavar="MODEL")
    parser.add_argument("--data", required=True, type=pathlib.Path, metavar="DATA")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--learning_rate", nargs="+", type=float, default=[5e-4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, help="of GLUE: learn from so many, in as many steps")
    parser.add_argument("--more", nargs="*", default=(), metavar="FIELD=VALUE", help="of all runs")
    args = parser.parse_args()
    scratch = args.output / "files"
    scratch.mkdir(parents=True, exist_ok=True)
    resplit_qnli(args.data / "glue" / "QNLI" / "dev.tsv", scratch / "QNLI")
    authors(args.data / "corpus" / "en_novels", scratch)
    args.init = args.init or pretrained(args.data / "corpus" / "en_novels", args.output / "encoder")
    model = models.read(args.init)
    tokenizer = models.read_tokenizer(args.init, model)
    if tokenizer is None:
        raise SystemExit(f"--init={args.init} has no tokenizer")
    head = "".join(f"{title:>{wide}}" for title, wide in zip(COLUMNS, WIDTHS, strict=True))
    print(f"{'task':14}{'figure':22}{head}  steps")
    for name in args.tasks:
        run = TASKS[name]
        folder = args.data / run.folder.format(scratch=scratch.resolve())
        if args.rows and run.config.startswith("glue.py"):
            folder = fewer(folder, scratch / f"first_{args.rows}", name, args.rows)
            run = run._replace(epochs=run.epochs * run.rows // args.rows, rows=args.rows)
        if folder.exists():
            print(line(name, run, folder, tokenizer, args), flush=True)


def pretrained(novels: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The run of an encoder that has read the novels; made first, or finished."""
    store, run = folder / "store", folder / "run"
    if not store.exists():
        made_of = (f"--input={novels}/*.txt", "--document=file", "--vocab_size=8000")
        command("prepare", *made_of, "--train_tokenizer", f"--output={store}", "--resume")
    flags = [f"--config.{flag}" for flag in (f"data.path={store}", *ENCODER)]
    command("train", f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={run}", *flags)
    return run


def command(name: str, *flags: str, log: IO[str] | None = None) -> None:
    """Runs a command of this project, its output to `log` or the terminal; ends where it fails."""
    arguments = [sys.executable, "-m", f"albert_jax.{name}", *flags]
    if subprocess.run(arguments, stdout=log, stderr=log).returncode:
        raise SystemExit(f"albert_jax.{name} failed; see {log.name if log else 'above'}")


def line(
    name: str, run: Run, folder: pathlib.Path, tokenizer: Tokenizer, args: argparse.Namespace
) -> str:
    """One line of the table."""
    flags = overrides(run, folder, args)
    config = config_lib.load(f"{ROOT / 'configs' / run.config}", flags)
    task = course.read(config, tokenizer)
    split = next(split for split in task.splits if split.score is not None)
    cells = [""] * 2
    if task.head in HEADS_OF_TEXTS:
        guesses = (majority(task, split.features), bag(task, split.features, tokenizer.vocab_size))
        for place, outputs in enumerate(guesses):
            if outputs and split.score:
                cells[place] = f"{split.score(outputs)[task.best_by]:.4f}"
    for start in ("random", "pretrained"):
        workdir = args.output / name.replace(" ", "_") / start
        if not any((workdir / f"{kind}.json").exists() for kind in ("evaluation", "summary")):
            fresh = ("--fresh",) if start == "random" else ()
            finetune(run, workdir, args, [*fresh, *(f"--config.{flag}" for flag in flags)])
        cells.append(reached(workdir, split.name))
    metrics = next(workdir.rglob("metrics.jsonl"))
    steps = max(row["step"] for row in telemetry.read_metrics(metrics))
    row = "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, WIDTHS, strict=True))
    return f"{name:14}{task.best_by:22}{row}  {steps}"


def reached(workdir: pathlib.Path, split: str) -> str:
    """What a run has come to, or the best group of several that differ in the seed alone."""
    summary = workdir / "summary.json"
    if not summary.exists():
        found = json.loads((workdir / "evaluation.json").read_text())
        return f"{found['splits'][split][found['judged_by']]:.4f}"
    groups = json.loads(summary.read_text())["summary"]
    best = max(groups.values(), key=lambda group: group["mean"])
    return f"{best['mean']:.4f} ± {best['deviation']:.4f}"


def overrides(run: Run, folder: pathlib.Path, args: argparse.Namespace) -> list[str]:
    """What a laptop's run sets."""
    rates = args.learning_rate
    steps = run.epochs * -(-run.rows // 32)
    return [
        f"data.path={folder}",
        f"data.max_seq_length={run.length}",
        f"train.epochs={run.epochs}",
        "train.global_batch_size=32",
        f"optimizer.learning_rate={rates[0]}",
        f"sweep.learning_rate={','.join(map(str, rates)) if len(rates) > 1 else ''}",
        f"optimizer.warmup_steps={max(steps // 10, 1)}",
        f"eval.every_steps={max(steps // 3, 1)}",
        f"checkpoint.every_steps={max(steps // 3, 1)}",
        "checkpoint.keep=1",
        "model.hidden_dropout_prob=0.1",
        "model.attention_probs_dropout_prob=0",
        "model.dtype=float32",
        *run.more,
        *args.more,
    ]


def finetune(run: Run, workdir: pathlib.Path, args: argparse.Namespace, flags: list[str]) -> None:
    """Runs the command, or goes on with it; its output goes to a file beside the run."""
    common = (f"--init={args.init}", f"--workdir={workdir}", f"--seeds={args.seeds}")
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_suffix(".log").open("a") as log:
        command("finetune", *common, f"--config={ROOT / 'configs' / run.config}", *flags, log=log)


def majority(task: Task, features: Features) -> Outputs | None:
    """The most frequent label of the training rows, for every row; None for numbers and vectors."""
    labels = task.train.targets.get("labels")
    if labels is None or labels.dtype != np.int32:
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(task.labels))
    logits = np.eye(len(task.labels), dtype=np.float32)[counts.argmax()]
    return {"logits": [logits] * len(features)}


def bag(task: Task, features: Features, vocab_size: int) -> Outputs:
    """What a linear model on TF-IDF of pieces says; for retrieval the vectors themselves."""
    columns = 2 * (vocab_size + _PAIRS)
    if task.head == "embedding":
        found = TfidfTransformer(sublinear_tf=True).fit_transform(counts(features, vocab_size))
        return {"logits": list(found.toarray().astype(np.float32))}
    weigh = TfidfTransformer(sublinear_tf=True)
    train = weigh.fit_transform(counts(task.train, vocab_size))
    held_out: Any = weigh.transform(counts(features, vocab_size))
    assert train.shape[1] == columns
    labels = task.train.targets["labels"]
    if labels.dtype == np.int32:
        known = labels >= 0
        linear: Any = LogisticRegression(max_iter=1000, C=10).fit(train[known], labels[known])
        logits = np.full((len(features), len(task.labels)), -1e9, np.float32)
        logits[:, linear.classes_] = linear.predict_log_proba(held_out)
        return {"logits": list(logits)}
    known = ~np.isnan(labels)
    numbers = Ridge(alpha=1.0).fit(train[known], labels[known]).predict(held_out)
    return {"logits": list(numbers.astype(np.float32)[:, None])}


_PAIRS = 1 << 16  # columns that neighbouring pieces are hashed to


def counts(features: Features, vocab_size: int) -> scipy.sparse.csr_matrix:
    """How often each row has each piece, and each pair of neighbours, in its first segment and in
    its others; only the first sequence of a row is counted.
    """
    rows, columns = [], []
    for row in range(len(features)):
        begin, end = features.offsets[row * features.choices : row * features.choices + 2]
        ids, types = features.ids[begin:end].astype(np.int64), features.types[begin:end] > 0
        pairs = vocab_size + (ids[:-1] * 31_337 + ids[1:]) % _PAIRS
        found = np.concatenate([ids, pairs])
        second = np.concatenate([types, types[1:]])
        columns.append(found + second * (vocab_size + _PAIRS))
        rows.append(np.full(len(found), row))
    place = np.concatenate(rows), np.concatenate(columns)
    shape = (len(features), 2 * (vocab_size + _PAIRS))
    return scipy.sparse.csr_matrix((np.ones(len(place[0])), place), shape)


def resplit_qnli(source: pathlib.Path, target: pathlib.Path) -> None:
    """The first rows of QNLI's validation set to train on, the rest to be scored."""
    if source.exists():
        target.mkdir(exist_ok=True)
        header, *lines = source.read_text(encoding="utf-8").splitlines()
        for name, part in (("train", lines[:QNLI_TRAIN]), ("dev", lines[QNLI_TRAIN:])):
            (target / f"{name}.tsv").write_text("\n".join([header, *part, ""]), encoding="utf-8")


def fewer(source: pathlib.Path, target: pathlib.Path, task: str, rows: int) -> pathlib.Path:
    """A folder with a copy of one of GLUE's tasks that has the first training rows alone."""
    for path in source.glob("*/*.tsv"):
        if path.parent.name.lower() == task:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = lines[: rows + 1] if path.name == "train.tsv" else lines  # with the header
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            (target / path.parent.name / path.name).write_text("".join(kept), encoding="utf-8")
    return target


def authors(novels: pathlib.Path, target: pathlib.Path) -> None:
    """A table of paragraphs and who wrote them, ten novels of which a paragraph is a line."""
    rows: dict[str, list[str]] = {}
    for path in sorted(novels.glob("*.txt")):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        long = [line.strip() for line in lines if 200 <= len(line) <= 1000]
        author = path.stem.split("_")[0]
        if len(long) >= 250 and author not in rows:
            rows[author] = long[:250]
    for name, part in (("train", slice(0, 200)), ("validation", slice(200, 250))):
        with (target / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for author, paragraphs in list(rows.items())[:10]:
                writer.writerows([text, author] for text in paragraphs[part])


if __name__ == "__main__":
    main()

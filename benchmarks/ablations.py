"""The ALBERT paper's ablations at small scale, all on the same text, as one table.

Each line is one run of configs/ablation.py, made with the project's own commands. Every model is
scored on both sentence tasks, whatever it was trained on, by a linear probe: a logistic regression
on its frozen pooled output (Lan et al. 2020, arXiv:1909.11942, tables 3 to 5, asked the same of
models a hundred times as large). Without --data the text is the documentation of the installed
Python packages.

  python benchmarks/ablations.py --output=runs/ablations
  python benchmarks/ablations.py --output=runs/ablations --data=stores/mine --steps=5000 \\
      --width=256 --depth=6 --ablations ALBERT sharing=none objective=nsp,embedding=64
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from albert_jax.data import examples, store
from albert_jax.training import inference, program, telemetry

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = "ALBERT"  # the line with nothing changed
ABLATIONS = (
    BASE,
    *("embedding=32", "embedding=128"),
    *("sharing=attention", "sharing=ffn", "sharing=none"),
    *("objective=nsp", "objective=none"),
    *("depth=2", "depth=8", "width=64", "dropout=0.1"),
)
TASKS = ("sop", "nsp")
ROWS = 256  # of a probe's batches


def main() -> None:
    """Trains what is not trained yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--data", type=pathlib.Path, metavar="STORE", help="a token store")
    parser.add_argument("--ablations", nargs="+", default=ABLATIONS, metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--probe_pairs", type=int, default=4000, help="to learn from")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = store.open_store(args.data or python_docs(args.output / "store"))
    lines = []
    for ablation in args.ablations:
        workdir = args.output / ablation.replace("=", "_").replace(",", "-")
        command(
            "train",
            *small(ablation, args),
            f"--config.data.path={data.path}",
            f"--workdir={workdir}",
        )
        figures = workdir / "evaluation.json"
        command("evaluate", f"--workdir={workdir}", f"--json={figures}")
        lines.append(line(ablation, workdir, json.loads(figures.read_text()), data, args))
    print(
        f"\n{args.steps} steps of {args.batch} x {args.length}; {BASE}: width {args.width}, depth "
        f"{args.depth}, embedding {args.embedding}, all shared, sop, no dropout"
    )
    print(f"{'':32}{'parameters':>12}{'examples/s':>12}{'words':>8}{'own task':>10}", end="")
    print("".join(f"{f'{task} probe':>12}" for task in TASKS))
    print("\n".join(lines))
    print(
        "words: held-out masked pieces guessed; own task: the model's own sentence head, held out"
    )


def small(ablation: str, args: argparse.Namespace) -> list[str]:
    """The flags of a run small enough for a laptop."""
    asked = {"width": args.width, "depth": args.depth, "embedding": args.embedding, "dropout": 0}
    if ablation != BASE:
        asked |= dict(change.split("=", 1) for change in ablation.split(","))
    changes = ",".join(f"{name}={value}" for name, value in asked.items())
    values: dict[str, Any] = {
        "model.vocab_size": 0,
        "model.max_position_embeddings": args.length,
        "model.initializer_range": 0.1,
        "model.dtype": "float32",
        "data.max_seq_length": args.length,
        "data.max_predictions_per_seq": max(1, round(0.15 * args.length)),
        "train.steps": args.steps,
        "train.global_batch_size": args.batch,
        "train.microbatch_size": 0,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "optimizer.beta2": 0.98,
        "optimizer.warmup_steps": max(1, args.steps // 12),
        "eval.every_steps": 0,
        "log.every_steps": max(1, args.steps // 20),
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [f"--config={ROOT / 'configs' / 'ablation.py'}:{changes}", *flags]


def line(
    ablation: str,
    workdir: pathlib.Path,
    held_out: dict[str, float],
    data: store.Store,
    args: argparse.Namespace,
) -> str:
    """One line of the table."""
    run, params, _ = inference.load(workdir, batch_size=ROWS)
    rows = list(telemetry.read_metrics(workdir / "metrics.jsonl"))
    speeds = [row["examples_per_second"] for row in rows if "examples_per_second" in row][1:]
    own = run.config.model.sentence_objective
    own_task = f"{held_out['sentence_order_accuracy']:.1%}" if own != "none" else ""
    probes = [probe(run, params, data, task, args.probe_pairs) for task in TASKS]
    return (
        f"{ablation:32}{sum(program.parameter_counts(run).values()):>12,}"
        f"{statistics.median(speeds):>12.0f}{held_out['masked_lm_accuracy']:>8.1%}{own_task:>10}"
        + "".join(f"{accuracy:>12.1%}" for accuracy in probes)
    )


def probe(
    run: program.Program, params: Any, data: store.Store, task: str, train_pairs: int
) -> float:
    """How often a logistic regression on the frozen pooled output is right about held-out pairs of
    `task`, after `train_pairs` pairs of the train split.
    """
    apply = jax.jit(run.model.apply)
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    length = run.config.data.max_seq_length
    options = examples.ExampleOptions(length, 1, 0.15, 1, 0.0, 0, task, "split")

    def pooled(split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        builder = examples.ExampleBuilder(data.split(split), vocabulary, options)
        vectors, labels = [], []
        for first in range(0, min(most, builder.examples_per_epoch) // ROWS * ROWS, ROWS):
            batch = builder.batch(first, first + ROWS)
            output: Any = apply(
                {"params": params},
                batch["input_ids"],
                batch["token_type_ids"],
                batch["attention_mask"],
                batch["masked_lm_positions"],
            )
            vectors.append(np.asarray(output.pooled_BD))
            labels.append(batch["sentence_order_labels"])
        return np.concatenate(vectors), np.concatenate(labels)

    classifier = LogisticRegression(max_iter=1000).fit(*pooled("train", train_pairs))
    return float(classifier.score(*pooled("validation", 4 * train_pairs)))


def python_docs(path: pathlib.Path) -> pathlib.Path:
    """A store of the installed packages' documentation, made where it is not there yet."""
    if not path.exists():
        flags = ("--train_tokenizer", "--vocab_size=8000", "--validation_fraction=0.1")
        command("prepare", "--input=python-docs", f"--output={path}", *flags)
    return path


def command(name: str, *arguments: str) -> None:
    """Runs one of our commands; ends here where it fails."""
    subprocess.run([sys.executable, "-m", f"albert_jax.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()

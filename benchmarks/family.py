"""A short, small run of each family on the same text, in one picture; and a student with a teacher
beside the same student without one, begun as layers of the teacher and from fresh values.

Every run is made with the project's own commands and the family's own config, shrunk; ALBERT reads
SentencePiece, BERT and DistilBERT WordPiece, RoBERTa byte-level BPE, each vocabulary made of the
text. Vocabularies differ, so that their losses do not compare; how far each is below a model that
only knows how frequent its pieces are, does.

  python benchmarks/family.py --input='novels/*.txt' --output=runs/family
"""

import argparse
import pathlib
import subprocess
import sys
from typing import Any

from matplotlib.figure import Figure

from albert_jax.data import store
from albert_jax.training import telemetry

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of each family: the config, the kind of vocabulary, and what is shrunk in its own way.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ALBERT": ("base.py", "unigram", {}),
    "BERT": ("bert_base.py", "wordpiece", {}),
    "RoBERTa": ("roberta_base.py", "bpe", {}),
    "DistilBERT": ("distilbert_base.py", "wordpiece", {"distillation.student_layers": "0,2"}),
}
# The same student with a teacher, and which of the teacher's layers it starts from.
TAUGHT = {"DistilBERT, taught": "0,2", "DistilBERT, taught, from fresh values": ""}
COLORS = {
    "ALBERT": "#3b6ea5",
    "BERT": "#d1603d",
    "RoBERTa": "#5a9367",
    "DistilBERT": "#7a7a7a",
    "DistilBERT, taught": "#8d5a97",
    "DistilBERT, taught, from fresh values": "#c9a227",
}


def main() -> None:
    """Makes the stores and the runs that are not there yet, prints figures, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, metavar="GLOB", help="text, a document a file")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher_steps", type=int, default=1500)
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.output
    for kind in ("unigram", "wordpiece", "bpe"):
        if not (folder / kind).exists():
            command(
                "prepare",
                f"--input={args.input}",
                "--document=file",
                f"--output={folder / kind}",
                f"--train_tokenizer={kind}",
                f"--vocab_size={args.vocab_size}",
                "--validation_fraction=0.15",
            )
    for name in FAMILIES:
        train(name, folder / name, args, {"train.steps": args.steps})
    # At the rate of the others four layers stay at the unigram level, and have nothing to teach.
    deep = {
        "model.num_hidden_layers": 4,
        "model.num_hidden_groups": 4,
        "optimizer.learning_rate": 1e-3,
    }
    train("BERT", folder / "teacher", args, {"train.steps": args.teacher_steps, **deep})
    taught = {"train.steps": args.steps, "distillation.teacher": folder / "teacher"}
    for name, started in TAUGHT.items():
        changes = {**taught, "distillation.student_layers": started}
        train("DistilBERT", folder / name, args, changes)
    for name in (*FAMILIES, "teacher", *TAUGHT):
        kind = FAMILIES[name][1] if name in FAMILIES else "wordpiece"
        *_, last = curve(folder / name, "validation")
        unigram = store.open_store(folder / kind).unigram_loss
        print(
            f"{name:40} step {last[0]}: held-out masked words {last[1]:.3f} nats; a unigram model "
            f"has {unigram:.3f}"
        )
    print(f"picture: {draw(folder)}")


def train(
    family: str, workdir: pathlib.Path, args: argparse.Namespace, changes: dict[str, Any]
) -> None:
    """One run of a family's config, shrunk for a laptop, with `changes`."""
    config, kind, shrunk = FAMILIES[family]
    steps = changes["train.steps"]
    values: dict[str, Any] = {
        "model.vocab_size": 0,
        "model.embedding_size": args.width // 2 if family == "ALBERT" else args.width,
        "model.hidden_size": args.width,
        "model.num_hidden_layers": 2,
        "model.num_hidden_groups": 1 if family == "ALBERT" else 2,
        "model.num_attention_heads": 2,
        "model.intermediate_size": 4 * args.width,
        "model.max_position_embeddings": args.length + (2 if family == "RoBERTa" else 0),
        "model.hidden_dropout_prob": 0.0,
        "model.attention_probs_dropout_prob": 0.0,
        "model.initializer_range": 0.1,
        "model.dtype": "float32",
        "data.path": args.output / kind,
        "data.max_seq_length": args.length,
        "data.max_predictions_per_seq": round(0.15 * args.length),
        "train.global_batch_size": args.batch,
        "train.microbatch_size": 0,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "optimizer.beta2": 0.98,
        "optimizer.warmup_steps": steps // 10,
        "log.every_steps": 10,
        "eval.every_steps": max(1, steps // 6),
        **shrunk,
        **changes,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    command("train", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *flags)


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Training curves of the families beside held-out ones of the student with and without."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (_, kind, _) in FAMILIES.items():
        unigram = store.open_store(folder / kind).unigram_loss
        points = [(step, loss - unigram) for step, loss in curve(folder / name, "train")]
        left.plot(*zip(*points, strict=True), color=COLORS[name], label=name, lw=1.5)
    left.axhline(0, color="#7a7a7a", ls="--", lw=1, label="unigram model")
    left.set(title="Masked words, training: nats from a unigram model", xlabel="step")
    for name in ("DistilBERT", *TAUGHT):
        points = curve(folder / name, "validation")
        right.plot(*zip(*points, strict=True), color=COLORS[name], label=name, lw=1.5, marker="o")
    right.set(title="The same student with and without a teacher: held-out nats", xlabel="step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    path = folder / "family.png"
    figure.savefig(path, dpi=110)
    return path


def curve(workdir: pathlib.Path, split: str) -> list[tuple[int, float]]:
    """(step, masked-word loss) of a run, as it was logged."""
    rows = telemetry.read_metrics(workdir / "metrics.jsonl")
    return [
        (row["step"], row["masked_lm_loss"]) for row in rows if row.get("split", "train") == split
    ]


def command(name: str, *arguments: str) -> None:
    """Runs one of our commands; ends here where it fails."""
    subprocess.run([sys.executable, "-m", f"albert_jax.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()

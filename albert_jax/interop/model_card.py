"""The README.md of an exported model: what it is, what it was trained on and how, what it reached,
and what it cannot do; filled in from the run.

Source of the form: Mitchell et al. 2019, arXiv:1810.03993; the header is what the Hub reads.
"""

import json
import pathlib
from typing import Any

import jax

from albert_jax import config as config_lib
from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.interop.tensors import Model

_PIPELINES = {
    "pretraining": "fill-mask",
    "encoder": "feature-extraction",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
    "embedding": "sentence-similarity",
}
_OBJECTIVES = {
    "sop": "masked n-grams and sentence order",
    "nsp": "masked words and next sentence",
    "none": "masked words",
}


def text(source: pathlib.Path, model: Model, spoken: Tokenizer | None) -> str:
    """The card, Markdown.

    Args:
        source: the folder that the model was read from; a run of ours tells of its training.
        model: the model.
        spoken: its tokenizer.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    cfg = model.config
    head = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINES[model.head.kind]}",
        "tags:",
        f"- {cfg.model_type}",
        "- albert_jax",
        "---",
        "",
        f"# {source.name}",
        "",
        f"{cfg.model_type}, {model.head.kind.replace('_', ' ')}: {count:,} parameters, "
        f"{cfg.num_hidden_layers} layers of {cfg.hidden_size}, {cfg.num_attention_heads} heads, "
        f"{cfg.vocab_size:,} pieces, texts of up to "
        f"{cfg.max_position_embeddings - cfg.position_offset} tokens.",
    ]
    if model.head.labels:
        head += ["", "Labels: " + ", ".join(model.head.labels) + "."]
    run = config_lib.read_workdir(source) if (source / "checkpoints").is_dir() else None
    trained = run is not None and bool(run.data.store_fingerprint)
    parts = [*head, "", "## Training", ""]
    if run is not None and trained:
        parts += _training(run, model.step)
        parts += ["", "## Held-out text", "", *_metrics(source, model.step, run)]
    else:
        parts += [f"Converted from {source.name}; how it was trained, its origin says."]
    parts += ["", "## Text", "", *_text(spoken), "", "## Limits", "", *_limits(run, trained)]
    return "\n".join(parts) + "\n"


def _training(run: Config, step: int) -> list[str]:
    train, recipe = run.train, run.optimizer
    shares = ", then ".join(dict.fromkeys(f"{stage.masked_lm_prob:.0%}" for stage in run.stages))
    learnt = (
        f"{_OBJECTIVES[run.model.sentence_objective]}, {shares} of the pieces, new masks every "
        "epoch"
    )
    store = "token stores in a mix" if "," in run.data.path else "a token store"
    data = f"{store} with fingerprint `{run.data.store_fingerprint[:16]}`"
    if run.task.name:
        learnt = f"{run.task.name}, fine-tuned from a model that was there"
        data = f"labelled rows with fingerprint `{run.data.store_fingerprint}`"
    return [
        f"- objective: {learnt}",
        f"- data: {data}",
        f"- {step:,} of {train.steps:,} steps of {_batches(run)}, seeds {train.seed} (model) and "
        f"{run.data.seed} (data)",
        f"- {recipe.name}, learning rate {recipe.learning_rate:g}, {recipe.warmup_steps:,} steps "
        f"of warm-up, weight decay {recipe.weight_decay:g}, products in {run.model.dtype}",
        f"- dropout {run.model.hidden_dropout_prob:g} and "
        f"{run.model.attention_probs_dropout_prob:g} (attention)",
    ]


def _batches(run: Config) -> str:
    each = [
        f"{stage.global_batch_size:,} sequences of {stage.max_seq_length} tokens"
        + (f" (from step {stage.first_batch:,} on)" if run.data.schedule else "")
        for stage in run.stages
    ]
    return ", then ".join(each)


def _metrics(source: pathlib.Path, step: int, run: Config) -> list[str]:
    rows = []
    path = source / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(_parsed, lines) if row.get("split") and row["step"] == step]
    if not rows:
        return [f"Not measured at step {step:,}."]
    if run.task.name:
        return ["| | |", "|---|---|", *_task_metrics(rows)]
    # Beside it there may be rows of each store of a mixture.
    row = [row for row in rows if row["split"] == "validation"][-1]
    found = [
        "| | |",
        "|---|---|",
        f"| masked words, nats | {row['masked_lm_loss']:.3f} |",
        f"| masked words right | {row['masked_lm_accuracy']:.1%} |",
    ]
    if row.get("sentence_order_loss"):
        found.append(f"| sentences right | {row['sentence_order_accuracy']:.1%} |")
    return found


def _task_metrics(rows: list[dict[str, Any]]) -> list[str]:
    """The figures of each split, without what the run says of itself."""
    found = []
    for row in rows:
        names = list(row)[2 : list(row).index("skipped_batches")]
        found += [
            f"| {row['split']}, {name.replace('_', ' ')} | {row[name]:.4f} |"
            for name in names
            if name != "score"
        ]
    return found


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # a line that was cut off
        return {}


def _text(spoken: Tokenizer | None) -> list[str]:
    if spoken is None:
        return ["No tokenizer came with the model; text must be cut with the one it was made for."]
    options = spoken.normalization
    case = "lower-cased" if options.lower_case else "cased"
    accents = "kept" if options.keep_accents else "removed"
    return [
        f"{spoken.family} tokenizer, {spoken.vocab_size:,} pieces, {case}, accents {accents}, ids "
        f"as {options.compatible_with} has them. sha256 of its file: `{spoken.sha256}`."
    ]


def _limits(run: Config | None, trained: bool) -> list[str]:
    lines = [
        "- It has learnt what its text says, errors and prejudices included; nothing was filtered "
        "out of its answers.",
        "- Figures above are of held-out text of the same kind; other text will do worse.",
    ]
    if run is not None and trained and run.data.max_seq_length < run.model.max_position_embeddings:
        lines.append(
            f"- It saw sequences of {run.data.max_seq_length} tokens; positions beyond are "
            "untrained."
        )
    return lines

"""Where all fine-tuning configs begin; no config of its own.

AdamW as published: epsilon 1e-6, moments not corrected, weight decay 0.01, gradients clipped at
1.0, linear decay. Sizes of the encoder are left alone, as they come with --init.
"""

from typing import Any

from albert_jax import config


def finetuned(
    task: str,
    *,
    learning_rate: float,
    batch: int,
    steps: int,
    warmup: int,
    dropout: float = 0.0,
    length: int = 512,
) -> Any:
    """What all tasks share.

    Args:
        task: its name.
        learning_rate: peak.
        batch: rows a step.
        steps: rows are gone through as often as that takes.
        warmup: steps to the peak.
        dropout: in the encoder; before the head it is 0.1 for all.
        length: pieces of a sequence.
    """
    c = config.default_config()
    c.task.name = task
    c.model.remat = "auto"  # short rows: mostly nothing has to be computed twice
    c.data.max_seq_length = length
    c.data.max_predictions_per_seq = 1  # nothing is masked
    c.model.hidden_dropout_prob = dropout
    c.model.attention_probs_dropout_prob = dropout
    c.model.classifier_dropout_prob = 0.1
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = learning_rate
    c.optimizer.warmup_steps = warmup
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0
    c.train.global_batch_size = batch
    c.train.steps = steps
    c.log.every_steps = 10
    # Some twenty looks a run, for the best of them is kept.
    c.eval.every_steps = max(steps // 20, 50)
    c.checkpoint.every_steps = c.eval.every_steps
    return c


def chosen(table: dict[str, Any], arg: str, default: str = "") -> str:
    """The key of `table` that a config's argument names."""
    arg = (arg or default).lower()
    if arg not in table:
        raise ValueError(f"no recipe {arg!r}; there are {', '.join(table)}.")
    return arg

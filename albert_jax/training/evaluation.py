"""Held-out losses of a set of parameters, exact: sums over all batches, divided once at the end."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from albert_jax.config import DataConfig
from albert_jax.errors import UserError
from albert_jax.training import losses, sharding
from albert_jax.training.program import Program


def held_out(data: DataConfig) -> DataConfig:
    """How validation text is cut and masked: the same in every run of one sequence length, so that runs compare.

    15 % of each sequence, always the same masks, no sequences cut short, whatever the run trains on.
    """
    return dataclasses.replace(
        data,
        masked_lm_prob=0.15,
        max_predictions_per_seq=max(1, round(0.15 * data.max_seq_length)),
        short_seq_prob=0.0,
        seed=0,
    )


def evaluate(
    program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Losses and accuracies over `batches`; rows that only fill up the last batch count nothing.

    Returns:
        loss, masked_lm_loss (nats a masked piece), masked_lm_accuracy, perplexity, sentence_order_loss and
        sentence_order_accuracy (0 without a sentence objective), masked_words and examples counted.

    Raises:
        UserError: nothing to evaluate on.
    """
    rows = program.config.train.global_batch_size
    sums = []
    for batch in batches:
        arrays = sharding.to_global(batch, program.batch_sharding, rows)
        examples = np.count_nonzero(batch["attention_mask"][:, 0])
        sums.append((program.eval_step(params, arrays), examples))
    # float64 on the host: a split may have more masked words than float32 can count.
    totals = [(jax.device_get(pair), examples) for pair, examples in sums]
    masked_lm = _total([pair[0] for pair, _ in totals])
    sentence = _total([pair[1] for pair, _ in totals])
    if masked_lm.count == 0:
        raise UserError("the validation split has no examples; prepare the store with more text.")
    masked_lm_loss = masked_lm.loss / masked_lm.count
    sentence_loss = sentence.loss / max(sentence.count, 1)
    return {
        "loss": masked_lm_loss + sentence_loss,
        "masked_lm_loss": masked_lm_loss,
        "masked_lm_accuracy": masked_lm.correct / masked_lm.count,
        "perplexity": math.exp(min(masked_lm_loss, 700.0)),
        "sentence_order_loss": sentence_loss,
        "sentence_order_accuracy": sentence.correct / max(sentence.count, 1),
        "masked_words": masked_lm.count,
        "examples": float(sum(examples for _, examples in totals)),
    }


def _total(parts: list[losses.Sums]) -> Any:
    return losses.Sums(*(float(np.sum(np.asarray(column, np.float64))) for column in zip(*parts, strict=True)))

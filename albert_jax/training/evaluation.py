"""Held-out losses of a set of parameters, exact: sums over all batches, divided once at the end."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from albert_jax.config import DataConfig
from albert_jax.errors import UserError
from albert_jax.training import sharding
from albert_jax.training.program import Program

_BATCHES_AHEAD = 3


def held_out(data: DataConfig) -> DataConfig:
    """How validation text is cut and masked: the same in every run of one sequence length, so that
    runs compare.

    15 % of each sequence, always the same masks, no sequences cut short, whatever the run trains
    on.
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
        loss, masked_lm_loss (nats a masked piece), masked_lm_accuracy, perplexity,
        sentence_order_loss and sentence_order_accuracy (0 without a sentence objective),
        masked_words and examples counted.

    Raises:
        UserError: nothing to evaluate on.
    """
    rows = program.config.train.global_batch_size
    sums = []
    for batch in batches:
        whole = sharding.to_global(batch, program.batch_sharding, rows)
        sums.append(program.eval_step(params, whole))
        # The host stays near the device, so that it can break off and no batches pile up there.
        jax.block_until_ready(sums[-_BATCHES_AHEAD:][0])
    # Added up in float64 here: a split may have more masked words than float32 can count.
    if not sums:
        raise UserError("the validation split has no examples; prepare the store with more text.")
    totals = jax.tree.map(
        lambda *parts: float(np.sum(np.asarray(parts, np.float64))), *jax.device_get(sums)
    )
    masked_lm, sentence, examples = totals
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
        "examples": examples,
    }

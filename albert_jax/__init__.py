"""Pretraining of bidirectional encoders (ALBERT first) on your own text with JAX and Flax."""

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from albert_jax.tasks.predictor import Predictor


def load(path: str | pathlib.Path, step: int | None = None, batch_size: int = 32) -> "Predictor":
    """A model ready for use: a run, a folder of Transformers or a checkpoint of Google's.

    Args:
        path: of the model.
        step: which checkpoint of a run; by default the newest, or a fine-tuning's best.
        batch_size: texts at once.

    Raises:
        UserError: no model there, or one without a tokenizer.
    """
    # Here, not above: the commands look at their flags before JAX is imported.
    from albert_jax.tasks.predictor import Predictor

    return Predictor(path, step, batch_size)

"""Your own table: classification (default), multi_label or regression; CSV, TSV or JSON Lines.

Of the grid that Devlin et al. 2019 (arXiv:1810.04805), section A.3, searched: batch 32, rate 2e-5,
3 epochs. task.text, task.text_pair and task.label name the columns.

--config=configs/table.py:regression --config.data.path=reviews.csv --config.task.label=stars
"""

from typing import Any

import finetuning

from albert_jax.config import TABLE_KINDS


def get_config(arg: str = "classification") -> Any:
    """A table whose label is of the kind `arg`."""
    kind = finetuning.chosen(dict.fromkeys(TABLE_KINDS), arg, "classification")
    c = finetuning.finetuned(
        "table", learning_rate=2e-5, batch=32, steps=1000, warmup=20, length=256
    )
    c.train.epochs = 3.0  # these hold, not the steps: tables are of any size
    c.task.kind = kind
    return c

"""XNLI: zero-shot transfer from English MultiNLI, or with task.train=multinli.train.XX.tsv from a
translation.

ALBERT was published for English alone, so there is no recipe: these are MNLI's (Lan et al. 2020,
arXiv:1909.11942, table 14), at the length of 128 that XNLI's single sentences fit into.

--config=configs/xnli.py --config.data.path=XNLI-1.0 --config.task.train=MNLI/train.tsv
"""

from typing import Any

import finetuning


def get_config(arg: str = "") -> Any:
    """`arg` is not used."""
    del arg
    return finetuning.finetuned(
        "xnli", learning_rate=3e-5, batch=128, steps=10000, warmup=1000, length=128
    )

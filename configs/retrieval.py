"""Retrieval: a query finds its passage by the cosine of their vectors; pairs in JSON Lines, or a
collection in BEIR's layout.

A row's wrong passages are those of the other rows of its batch, so a larger batch is a harder, and
usually better, lesson. The rate is the usual one of sentence encoders (Reimers and Gurevych 2019,
arXiv:1908.10084, section 3.1, with warm-up over a tenth of the run).

--config=configs/retrieval.py --config.data.path=scifact
"""

from typing import Any

import finetuning


def get_config(arg: str = "") -> Any:
    """`arg` is not used."""
    del arg
    return finetuning.finetuned(
        "retrieval", learning_rate=2e-5, batch=32, steps=1000, warmup=100, length=256
    )

"""ALBERT base: 12 layers of 768, 11.8 M parameters with both heads.

v2 (default): no dropout, 10 M steps. v1: dropout 0.1, 125 k steps (the paper's ablation setting).
LAMB, batch 4096 x 512, as published (Lan et al. 2020, arXiv:1909.11942, section 4.1;
google-research/albert README). Dev-set average of the released models (GLUE, SQuAD, RACE): v2 82.3,
v1 80.1.

--config=configs/base.py, --config=configs/base.py:v1
"""

from typing import Any

import ml_collections

from albert_jax import config


def get_config(arg: str = "v2") -> ml_collections.ConfigDict:
    """The recipe `arg`: v1 or v2."""
    return published(arg, steps_v2=10_000_000)


def published(recipe: str, steps_v2: int, dropout_v1: float = 0.1) -> Any:
    """What all four published sizes share, sized as base."""
    c = config.default_config()
    c.train.microbatch_size = 32  # more at once is no faster, and takes memory
    if recipe == "v1":
        c.model.hidden_dropout_prob = dropout_v1
        c.model.attention_probs_dropout_prob = dropout_v1
    elif recipe in ("", "v2"):
        c.train.steps = steps_v2
    else:
        raise ValueError(f"no recipe {recipe!r}; there are v1 and v2.")
    return c

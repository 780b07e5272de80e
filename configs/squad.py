"""SQuAD v1 (1.1, default) or v2 (2.0, with questions that have no answer).

The hyper-parameters of Lan et al. 2020 (arXiv:1909.11942), table 14. v2 has the head of
google-research/albert `run_squad_v2.py`, XLNet's: the end is looked for given the start, and
whether there is an answer is predicted of its own.

--config=configs/squad.py:v2 --config.data.path=squad
"""

from typing import Any

import finetuning

RECIPES: dict[str, dict[str, Any]] = {
    "v1": dict(learning_rate=5e-5, batch=48, steps=3649, warmup=365, length=384),
    "v2": dict(learning_rate=3e-5, batch=48, steps=8144, warmup=814, length=512),
}


def get_config(arg: str = "v1") -> Any:
    """The recipe `arg`: v1 or v2."""
    recipe = finetuning.chosen(RECIPES, arg, "v1")
    c = finetuning.finetuned("squad", **RECIPES[recipe])
    c.task.answer_head = "conditional" if recipe == "v2" else "plain"
    if recipe == "v2":
        c.task.train, c.task.validation = "train-v2.0.json", "dev-v2.0.json"
    return c

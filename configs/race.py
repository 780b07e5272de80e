"""RACE for ALBERT v2 (default) or v1, and SWAG: multiple choice.

RACE's hyper-parameters are those of Lan et al. 2020 (arXiv:1909.11942), table 14, and for v2 those
of google-research/albert's README: v1's rate and dropout diverge there. SWAG's are of Devlin et al.
2019 (arXiv:1810.04805), section 4.4: 3 epochs of 73,546 questions.

--config=configs/race.py:v2 --config.data.path=RACE
"""

from typing import Any

import finetuning

RECIPES: dict[str, dict[str, Any]] = {
    "v1": dict(learning_rate=2e-5, batch=32, steps=12000, warmup=1000, dropout=0.1),
    "v2": dict(learning_rate=1e-5, batch=32, steps=12000, warmup=1000, dropout=0.0),
    "swag": dict(learning_rate=2e-5, batch=16, steps=13790, warmup=1379, length=128),
}


def get_config(arg: str = "v2") -> Any:
    """The recipe `arg`: v1, v2 or swag."""
    recipe = finetuning.chosen(RECIPES, arg, "v2")
    c = finetuning.finetuned("swag" if recipe == "swag" else "race", **RECIPES[recipe])
    if recipe != "swag":
        c.task.max_query_length = 128  # of question and option together
    return c

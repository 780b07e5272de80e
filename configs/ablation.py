"""The ablations of the ALBERT paper: ALBERT base, its v1 recipe, and one thing or more changed.

The starting point is base.py:v1: 12 shared layers of 768, embeddings of 128, sentence order,
dropout 0.1, LAMB, 125,000 steps of 4096 x 512 (Lan et al. 2020, arXiv:1909.11942, section 4).

--config=configs/ablation.py:embedding=64
--config=configs/ablation.py:sharing=attention,embedding=768

    embedding=64|128|256|768     size of the word embeddings (any whole number)
    sharing=all|attention|ffn|none   what all layers share
    objective=sop|nsp|none       of sentences
    depth=24                     layers
    width=1024                   hidden size; heads of 64 and feed-forward 4 times as wide follow
    dropout=0.0                  of hidden states and of attention
"""

from collections.abc import Callable
from typing import Any

import base
import ml_collections

from albert_jax.errors import UserError

SHARING = ("all", "attention", "ffn", "none")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The base with every NAME=VALUE of `arg` applied.

    Raises:
        UserError: a name that is none, twice the same, or a value that it cannot take.
    """
    c = base.published("v1", steps_v2=0)
    asked: dict[str, str] = {}
    for part in filter(None, arg.split(",")):
        name, _, value = part.partition("=")
        if name not in CHANGES:
            raise UserError(
                f"configs/ablation.py:{arg}: no ablation {name!r}; there are: "
                f"{', '.join(f'{known}=' for known in CHANGES)} with commas between."
            )
        if name in asked:
            raise UserError(f"configs/ablation.py:{arg}: {name} is given twice.")
        asked[name] = value
    # In the table's order, whatever the order they were written in: sharing follows the depth.
    for name, change in CHANGES.items():
        if name in asked:
            try:
                change(c.model, asked[name])
            except ValueError:
                raise UserError(
                    f"configs/ablation.py:{arg}: {name}={asked[name]!r} is not possible; it takes "
                    f"{_TAKES[name]}."
                ) from None
    return c


def _embedding(model: Any, value: str) -> None:
    model.embedding_size = int(value)


def _depth(model: Any, value: str) -> None:
    model.num_hidden_layers = int(value)


def _width(model: Any, value: str) -> None:
    width = int(value)
    if width < 64 or width % 64:
        raise ValueError
    model.hidden_size, model.num_attention_heads = width, width // 64
    model.intermediate_size = 4 * width


def _sharing(model: Any, value: str) -> None:
    if value not in SHARING:
        raise ValueError
    model.attention_groups = 1 if value in ("all", "attention") else model.num_hidden_layers
    model.ffn_groups = 1 if value in ("all", "ffn") else model.num_hidden_layers


def _objective(model: Any, value: str) -> None:
    model.sentence_objective = value


def _dropout(model: Any, value: str) -> None:
    model.hidden_dropout_prob = model.attention_probs_dropout_prob = float(value)


CHANGES: dict[str, Callable[[Any, str], None]] = {
    "embedding": _embedding,
    "depth": _depth,
    "width": _width,
    "sharing": _sharing,
    "objective": _objective,
    "dropout": _dropout,
}
_TAKES = {
    "embedding": "a whole number",
    "depth": "a whole number",
    "width": "a multiple of 64",
    "sharing": " | ".join(SHARING),
    "objective": "sop | nsp | none",
    "dropout": "a number",
}

"""A training that starts from a model that is there: its parameters, and, where asked for, the
optimizer's moments and the step they are of.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from albert_jax.config import ModelConfig
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.interop.tensors import Model
from albert_jax.training import optimizer
from albert_jax.training.step import TrainState

# Where two models may differ and one still go on as the other: what no parameter and no output
# depends on.
_FREE = frozenset(
    {
        "model_type",
        "num_hidden_groups",  # attention_groups and ffn_groups say it
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout_prob",
        "initializer_range",
        "sentence_objective",
        "pooler",
        "pad_token_id",
        "dtype",
        "remat",
        "attention",
    }
)


def check(
    model: Model, config: ModelConfig, source: str, theirs: Tokenizer | None, ours: Tokenizer
) -> None:
    """Refuses a model that computes something else than the config's, or reads other pieces.

    Args:
        model: to start from.
        config: of the run; its vocabulary size is known.
        source: what the person called the model.
        theirs, ours: the tokenizers of the model, if it has one, and of the store.

    Raises:
        UserError: every difference at once.
    """
    given, wanted = dataclasses.asdict(model.config), dataclasses.asdict(config)
    differing = [
        f"model.{name}: {given[name]!r} there, {value!r} in the config"
        for name, value in wanted.items()
        if name not in _FREE and given[name] != value
    ]
    if differing:
        raise UserError(
            f"--init={source} is another model than the config's:\n  " + "\n  ".join(differing)
        )
    if theirs is not None and not _same_pieces(theirs, ours):
        raise UserError(
            f"--init={source} was trained on other pieces than the token store's; prepare the text "
            "with its own tokenizer (--tokenizer of albert_jax.prepare)."
        )


def fresh(model: Model, state: TrainState) -> list[str]:
    """The parts of a state that the model does not have, and that therefore start anew."""
    return [name for name in state.params if name not in model.params]


def started(state: TrainState, model: Model, slots: bool) -> TrainState:
    """The state with the model's parameters where it has them.

    Args:
        state: a new one, on its devices.
        model: checked to fit.
        slots: also its moments, and its step, which is the position in the data.

    Raises:
        UserError: `slots`, and there are none or they do not cover every parameter.
    """
    params = _placed(state.params, model.params)
    if not slots:
        return dataclasses.replace(state, params=params)
    if model.moments is None or fresh(model, state):
        raise UserError(
            "--slots: the model of --init has no moments of an optimizer for all its parameters."
        )
    old = optimizer.moments(state.opt_state)
    mu, nu = (_placed(tree, values) for tree, values in zip(old, model.moments, strict=True))
    return dataclasses.replace(
        state,
        params=params,
        opt_state=optimizer.with_moments(state.opt_state, mu, nu, model.step),
        step=jnp.asarray(model.step, jnp.int32, device=state.step.sharding),
    )


def _same_pieces(theirs: Tokenizer, ours: Tokenizer) -> bool:
    if theirs.sha256 == ours.sha256:
        return True
    return theirs.vocab_size == ours.vocab_size and all(
        theirs.piece(number) == ours.piece(number) for number in range(ours.vocab_size)
    )


def placed(part: Any, values: Any) -> Any:
    """`values`, NumPy arrays, float32 on the devices of `part`, whose leaves have a shape and a
    sharding; each device gets its part of them.
    """

    def place(leaf: Any, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.asarray(value[index], np.float32)
        )

    return jax.tree.map(place, part, values)


def _placed(tree: Any, values: Any) -> Any:
    """`values` where there are any for a part of `tree`; the other parts stay."""
    return {
        name: placed(part, values[name]) if name in values else part for name, part in tree.items()
    }

"""One training step: a pure function of state and batch; no files, no logging, no mesh.

`gradients` is one device's part: it sees its rows of the batch and sums what must be summed over
the objective's `batch_axes`, the mesh axes that share out the batch (none on a single device).

Letters: B batch (one device's rows of it).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from albert_jax.config import ModelConfig
from albert_jax.model import encoder
from albert_jax.training.objectives import Batch, Objective

_IN_FLOAT32 = frozenset({"sentence_order", "classifier"})  # few scores, which would tie


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; the step is also the position in the data.

    Attributes:
        step: int32, how many steps are done.
        params, opt_state: float32.
        window: sums of the metrics over the steps since the last logged one, float32.
        window_steps: how many those are, int32.
        bad_step: int32, the first step whose loss or gradient was not finite; -1 while all were.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    window: dict[str, jax.Array]
    window_steps: jax.Array
    bad_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the step is compiled for.

    Attributes:
        objective: what is learnt.
        optimizer: gradients to updates.
        dropout: whether there is any.
        microbatches: how many parts a device's rows are handled in, one after the other.
        log_every_steps: after so many steps the window starts anew.
        gradient_weights: of a step, what the gradient through each depth counts; None: all alike.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    dropout: bool
    microbatches: int
    log_every_steps: int
    gradient_weights: Callable[[jax.Array], encoder.GradientWeights] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all figures of a step."""
        return ("loss", *self.objective.metrics, "grad_norm")


def init_state(params: Any, recipe: Recipe) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=recipe.optimizer.init(params),
        window={name: jnp.zeros((), jnp.float32) for name in recipe.metrics},
        window_steps=jnp.zeros((), jnp.int32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    recipe: Recipe,
    gradients: Callable[[Any, jax.Array, Batch], tuple[Any, dict[str, jax.Array]]],
) -> TrainState:
    """The state after one update by `gradients` of (params, step, batch).

    A step whose loss or gradient is not finite changes no parameter and is remembered in
    `bad_step`.
    """
    grads, metrics = gradients(state.params, state.step, batch)
    with jax.named_scope("optimizer"):
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
    first = state.step % recipe.log_every_steps == 0
    return TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        window={
            name: jnp.where(first, 0.0, state.window[name]) + metrics[name] for name in state.window
        },
        window_steps=jnp.where(first, 0, state.window_steps) + 1,
        bad_step=jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step),
    )


def gradients(
    params: Any,
    step: jax.Array,
    seed: jax.Array | int,
    batch: Batch,
    first_row: jax.Array | int,
    recipe: Recipe,
    frozen: Any = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """This device's part of the gradients of the whole batch's loss, and the metrics but the norm.

    The parts of all devices add up to the gradients, whatever the number of devices and
    microbatches. The metrics are summed already.

    Args:
        params: whole, float32.
        step, seed: which step of which run; dropout depends on them.
        batch: this device's rows.
        first_row: the number of its first row in the whole batch.
        recipe: see there.
        frozen: whole, what the objective wants besides; there is no gradient of it.
    """
    objective = recipe.objective
    # The denominators are those of the whole batch, so that parts can simply be added.
    counts = jax.lax.psum(objective.counts(batch), objective.batch_axes)
    keys = jax.random.fold_in(jax.random.key(seed), step)
    gradient_weights = recipe.gradient_weights(step) if recipe.gradient_weights else None

    def loss(params: Any, batch: Batch, rows: jax.Array) -> tuple[jax.Array, Any]:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(keys, rows) if recipe.dropout else None
        return objective.loss(params, batch, counts, keys_B, gradient_weights, frozen)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    rows = first_row + jnp.arange(batch["input_ids"].shape[0], dtype=jnp.int32)
    if recipe.microbatches == 1:
        (total, sums), grads = value_and_grad(params, batch, rows)
    else:
        parts = jax.tree.map(
            lambda x_B: x_B.reshape(recipe.microbatches, -1, *x_B.shape[1:]), (dict(batch), rows)
        )
        first_part = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(value_and_grad, params, *first_part),
        )

        def add(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(params, *part)), None

        ((total, sums), grads), _ = jax.lax.scan(add, zero, parts)
    total, sums = jax.lax.psum((total, sums), objective.batch_axes)
    return grads, {"loss": total, **objective.means(sums, counts)}


def compute_dtype(path: Any, model: ModelConfig) -> jnp.dtype:
    """The dtype in which the model uses the parameter at `path`: kernels in its own, the rest in
    float32.
    """
    names = [getattr(entry, "key", None) for entry in path]
    rounded = names[-1] == "kernel" and _IN_FLOAT32.isdisjoint(names)
    return jnp.dtype(model.dtype if rounded else jnp.float32)

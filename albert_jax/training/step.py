"""One training step and one evaluation step: pure functions of state and batch; no files, no
logging, no mesh.

`gradients` and `eval_sums` are one device's part: they see its rows of the batch and sum what must
be summed over `batch_axes`, the mesh axes that share out the batch (none on a single device).

Letters: B batch (one device's rows of it), P masked slots.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from albert_jax.config import DistillationConfig, ModelConfig
from albert_jax.model import pretraining
from albert_jax.training import losses

Batch = Mapping[str, jax.Array]
METRICS = (
    "loss",
    "masked_lm_loss",
    "masked_lm_accuracy",
    "sentence_order_loss",
    "sentence_order_accuracy",
    "grad_norm",
)
# Beside these where there is a teacher: how far from it, without the weights of the loss.
TEACHER_METRICS = ("teacher_divergence", "teacher_cosine_distance")


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; the step is also the position in the data.

    Attributes:
        step: int32, how many steps are done.
        params, opt_state: float32.
        window: sums of METRICS (and TEACHER_METRICS) over the steps since the last logged one,
            float32.
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
        model: the model.
        optimizer: gradients to updates.
        seed: of the dropout.
        dropout: whether there is any.
        microbatches: how many parts a device's rows are handled in, one after the other.
        log_every_steps: after so many steps the window starts anew.
        batch_axes: the mesh axes over which the batch is shared out.
        teacher: whose answers the model learns too, if any; `distillation` says how much.
    """

    model: pretraining.PretrainingModel
    optimizer: optax.GradientTransformation
    seed: int
    dropout: bool
    microbatches: int
    log_every_steps: int
    batch_axes: tuple[str, ...] = ()
    teacher: pretraining.PretrainingModel | None = None
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)


def init_params(model: pretraining.PretrainingModel, seed: int) -> Any:
    """Fresh parameters, boxed with their logical axis names."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return model.init(jax.random.key(seed), ids, ids, ids, ids[:, :1])["params"]


def init_state(
    params: Any, optimizer: optax.GradientTransformation, metrics: Sequence[str] = METRICS
) -> TrainState:
    """The state before the first step, with room for sums of `metrics`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        window={name: jnp.zeros((), jnp.float32) for name in metrics},
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
    batch: Batch,
    first_row: jax.Array | int,
    recipe: Recipe,
    teacher_params: Any = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """This device's part of the gradients of the whole batch's loss, and METRICS but the norm.

    With a teacher the masked-word loss is weighted, and beside it stand the divergence from the
    teacher's answers at the masked positions and the cosine distance of the last hidden states
    (Sanh et al. 2019, arXiv:1910.01108, section 3, where both are means over a batch too).

    The parts of all devices add up to the gradients, whatever the number of devices and
    microbatches. The metrics are summed already.

    Args:
        params: whole, float32.
        step: which step; dropout depends on it.
        batch: this device's rows.
        first_row: the number of its first row in the whole batch.
        recipe: see there.
        teacher_params: whole, where the recipe has a teacher; there is no gradient of them.
    """
    # The denominators are those of the whole batch, so that parts can simply be added.
    masked_count, row_count = jax.lax.psum(
        (jnp.sum(batch["masked_lm_weights"]), jnp.sum(row_weights(batch))), recipe.batch_axes
    )
    masked_count += losses.MASKED_LM_COUNT_EPSILON
    token_count = jnp.zeros((), jnp.float32)
    if recipe.teacher:
        token_count = jax.lax.psum(jnp.sum(token_weights(batch)), recipe.batch_axes)
    weights = recipe.distillation
    keys = jax.random.fold_in(jax.random.key(recipe.seed), step)

    def loss(params: Any, batch: Batch, rows: jax.Array) -> tuple[jax.Array, Any]:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(keys, rows) if recipe.dropout else None
        output = forward(recipe.model, params, batch, keys_B)
        masked_lm, sentence = prediction_sums(output, batch)
        if recipe.teacher is None:
            total = masked_lm.loss / masked_count + sentence.loss / row_count
            return total, (masked_lm, sentence, None)
        with jax.named_scope("teacher"):
            taught = forward(recipe.teacher, teacher_params, batch, None)
        apart = teacher_sums(output, taught, batch, weights)
        softened = weights.kl_weight * weights.temperature**2 * apart[0]
        total = (
            (softened + weights.masked_lm_weight * masked_lm.loss) / masked_count
            + weights.cosine_weight * apart[1] / token_count
            + sentence.loss / row_count
        )
        return total, (masked_lm, sentence, apart)

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
    total, (masked_lm, sentence, apart) = jax.lax.psum((total, sums), recipe.batch_axes)
    metrics = {
        "loss": total,
        "masked_lm_loss": masked_lm.loss / masked_count,
        "masked_lm_accuracy": masked_lm.correct / masked_count,
        "sentence_order_loss": sentence.loss / row_count,
        "sentence_order_accuracy": sentence.correct / row_count,
    }
    if recipe.teacher:
        values = (apart[0] / masked_count, apart[1] / token_count)
        metrics |= dict(zip(TEACHER_METRICS, values, strict=True))
    return grads, metrics


def eval_sums(
    params: Any,
    batch: Batch,
    model: pretraining.PretrainingModel,
    batch_axes: tuple[str, ...] = (),
) -> tuple[losses.Sums, losses.Sums, jax.Array]:
    """Sums of masked words and of sentences, and how many rows, of one batch, without dropout.

    Rows of padding count nothing.
    """
    output = forward(model, params, batch, None)
    sums = (*prediction_sums(output, batch), jnp.sum(row_weights(batch)))
    return jax.lax.psum(sums, batch_axes)


def forward(
    model: pretraining.PretrainingModel, params: Any, batch: Batch, keys_B: jax.Array | None
) -> pretraining.PretrainingOutput:
    """Runs the model, with dropout where there are keys."""
    output: Any = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["masked_lm_positions"],
        keys_B,
    )
    return output


def prediction_sums(
    output: pretraining.PretrainingOutput, batch: Batch
) -> tuple[losses.Sums, losses.Sums]:
    """Sums of both losses; without a sentence objective the second is all zeros."""
    masked_lm = losses.cross_entropy(
        output.masked_lm_logits_BPV, batch["masked_lm_ids"], batch["masked_lm_weights"]
    )
    if output.sentence_order_logits_B2 is None:
        zero = jnp.zeros((), jnp.float32)
        return masked_lm, losses.Sums(zero, zero, zero)
    sentence = losses.cross_entropy(
        output.sentence_order_logits_B2, batch["sentence_order_labels"], row_weights(batch)
    )
    return masked_lm, sentence


def teacher_sums(
    student: pretraining.PretrainingOutput,
    teacher: pretraining.PretrainingOutput,
    batch: Batch,
    options: DistillationConfig,
) -> tuple[jax.Array, jax.Array]:
    """Sums of the divergence over the masked slots, and of the cosine distance over the tokens.

    The second is 0 where its weight is: the hidden sizes may then differ.
    """
    divergence = losses.divergence(
        student.masked_lm_logits_BPV,
        teacher.masked_lm_logits_BPV,
        batch["masked_lm_weights"],
        options.temperature,
    )
    if not options.cosine_weight:
        return divergence, jnp.zeros((), jnp.float32)
    return divergence, losses.cosine_distance(
        student.encoder.sequence_BLD, teacher.encoder.sequence_BLD, token_weights(batch)
    )


def token_weights(batch: Batch) -> jax.Array:
    """1 for a real token, 0 for padding. float32 [B, L]."""
    return batch["attention_mask"].astype(jnp.float32)


def row_weights(batch: Batch) -> jax.Array:
    """1 for a real row, 0 for one that only fills up the last batch: its [CLS] is masked out too.
    float32 [B].
    """
    return batch["attention_mask"][:, 0].astype(jnp.float32)


def compute_dtype(path: Any, model: ModelConfig) -> jnp.dtype:
    """The dtype in which the model uses the parameter at `path`: kernels in its own, the rest in
    float32.
    """
    names = [getattr(entry, "key", None) for entry in path]
    rounded = names[-1] == "kernel" and "sentence_order" not in names
    return jnp.dtype(model.dtype if rounded else jnp.float32)

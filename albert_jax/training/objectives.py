"""What a run learns: the loss of a batch as sums that add up over devices and microbatches.

`Pretraining` fills in masked words and orders sentences, taught by another model where there is
one; `Finetuning` has one head on labelled rows. Both are an `Objective`, all that the step knows of
either.

Letters: B batch (one device's rows of it), C choices, L sequence length, P masked slots, K labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from albert_jax.config import DistillationConfig
from albert_jax.model import encoder, finetuning, pretraining
from albert_jax.training import losses

Batch = Mapping[str, jax.Array]

MASKED_LM_METRICS = (
    "masked_lm_loss",
    "masked_lm_accuracy",
    "sentence_order_loss",
    "sentence_order_accuracy",
)
# Beside these where there is a teacher: how far from it, without the weights of the loss.
TEACHER_METRICS = ("teacher_divergence", "teacher_cosine_distance")
_NEVER = -1e30  # a score that no softmax gives a share
_SCALE = 20.0  # of cosines before their softmax [sentence-transformers, MultipleNegativesRanking]


class Objective(Protocol):
    """What the training step asks of an objective; `gradients` in training.step says how."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `means` returns."""
        ...

    @property
    def model(self) -> Any:
        """The module whose parameters are learnt."""
        ...

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the batch is shared out; none on a single device."""
        ...

    def init_params(self, seed: jax.Array | int) -> Any:
        """Fresh parameters, boxed with their logical axis names."""
        ...

    def counts(self, batch: Batch) -> Any:
        """What the loss is divided by, summed over this device's rows."""
        ...

    def loss(
        self,
        params: Any,
        batch: Batch,
        counts: Any,
        dropout_keys_B: jax.Array | None,
        gradient_weights: encoder.GradientWeights | None,
        frozen: Any,
    ) -> tuple[jax.Array, Any]:
        """These rows' part of the loss of the whole batch, whose counts are given; and sums."""
        ...

    def means(self, sums: Any, counts: Any) -> dict[str, jax.Array]:
        """`metrics` out of the sums and counts of a whole batch."""
        ...

    def outputs(self, params: Any, batch: Batch) -> Any:
        """What an evaluation wants of a batch, the same on all devices, without dropout."""
        ...


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Masked words, and the sentence objective where the model has one.

    With a teacher the masked-word loss is weighted, and beside it stand the divergence from the
    teacher's answers at the masked positions and the cosine distance of the last hidden states
    (Sanh et al. 2019, arXiv:1910.01108, section 3, where both are means over a batch too). Its
    parameters, whole, are what is `frozen`; there is no gradient of them.
    """

    model: pretraining.PretrainingModel
    batch_axes: tuple[str, ...] = ()
    teacher: pretraining.PretrainingModel | None = None
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Objective`."""
        return MASKED_LM_METRICS + (TEACHER_METRICS if self.teacher else ())

    def init_params(self, seed: jax.Array | int) -> Any:
        """See `Objective`."""
        ids = jnp.zeros((1, 8), jnp.int32)
        return self.model.init(jax.random.key(seed), ids, ids, ids, ids[:, :1])["params"]

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Masked slots, pairs, and with a teacher tokens."""
        tokens = jnp.zeros((), jnp.float32)
        if self.teacher:
            tokens = jnp.sum(token_weights(batch))
        return jnp.sum(batch["masked_lm_weights"]), jnp.sum(sentence_weights(batch)), tokens

    def loss(
        self,
        params: Any,
        batch: Batch,
        counts: Any,
        dropout_keys_B: jax.Array | None,
        gradient_weights: encoder.GradientWeights | None,
        frozen: Any,
    ) -> tuple[jax.Array, Any]:
        """See `Objective`; `frozen` is the teacher."""
        masked_count, sentence_count, token_count = counts
        masked_count += losses.MASKED_LM_COUNT_EPSILON
        output = forward(self.model, params, batch, dropout_keys_B, gradient_weights)
        masked_lm, sentence = prediction_sums(output, batch)
        if self.teacher is None:
            total = masked_lm.loss / masked_count + sentence.loss / sentence_count
            return total, (masked_lm, sentence, None)
        weights = self.distillation
        with jax.named_scope("teacher"):
            taught = forward(self.teacher, frozen, batch, None)
        apart = teacher_sums(output, taught, batch, weights)
        softened = weights.kl_weight * weights.temperature**2 * apart[0]
        total = (
            (softened + weights.masked_lm_weight * masked_lm.loss) / masked_count
            + weights.cosine_weight * apart[1] / token_count
            + sentence.loss / sentence_count
        )
        return total, (masked_lm, sentence, apart)

    def means(self, sums: Any, counts: Any) -> dict[str, jax.Array]:
        """See `Objective`."""
        masked_lm, sentence, apart = sums
        masked_count, sentence_count, token_count = counts
        masked_count += losses.MASKED_LM_COUNT_EPSILON
        values = [
            masked_lm.loss / masked_count,
            masked_lm.correct / masked_count,
            sentence.loss / sentence_count,
            sentence.correct / sentence_count,
        ]
        if apart is not None:
            values += [apart[0] / masked_count, apart[1] / token_count]
        return dict(zip(self.metrics, values, strict=True))

    def outputs(self, params: Any, batch: Batch) -> Any:
        """Sums of masked words and of sentences, and how many rows; padding counts nothing."""
        output = forward(self.model, params, batch, None)
        sums = (*prediction_sums(output, batch), jnp.sum(row_weights(batch)))
        return jax.lax.psum(sums, self.batch_axes)


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """One head on labelled rows.

    The loss is the mean over the labels of a batch: cross-entropy of classes, choices and pieces;
    squared error of a number; of several labels at once the cross-entropy of each; of a span the
    mean of begin and end, and with the conditional head half that of whether there is an answer
    [squad_utils.py, `v2_model_fn_builder`]; of vectors the cross-entropy of a query's own passage
    among all passages of the batch (its negatives and the other queries' passages).
    """

    model: finetuning.FinetuningModel
    batch_axes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("accuracy",)

    def init_params(self, seed: jax.Array | int) -> Any:
        """See `Objective`."""
        choices = (1, 1, 8) if _has_choices(self.model.head) else (1, 8)
        ids = jnp.zeros(choices, jnp.int32)
        return self.model.init(jax.random.key(seed), ids, ids, ids)["params"]

    def counts(self, batch: Batch) -> jax.Array:
        """Labels that count."""
        return jnp.sum(label_weights(batch, self.model.head))

    def loss(
        self,
        params: Any,
        batch: Batch,
        counts: Any,
        dropout_keys_B: jax.Array | None,
        gradient_weights: encoder.GradientWeights | None,
        frozen: Any,
    ) -> tuple[jax.Array, Any]:
        """See `Objective`; nothing is frozen."""
        del frozen
        output = self._forward(params, batch, dropout_keys_B, gradient_weights, training=True)
        if self.model.head == "embedding":
            sums = self._retrieval_sums(output.logits, batch)
        else:
            sums = head_sums(self.model.head, output.logits, batch)
        return sums.loss / jnp.maximum(counts, 1.0), sums

    def means(self, sums: Any, counts: Any) -> dict[str, jax.Array]:
        """See `Objective`."""
        return {"accuracy": sums.correct / jnp.maximum(counts, 1.0)}

    def outputs(self, params: Any, batch: Batch) -> Any:
        """The head's scores of every row of the whole batch, by name, and its row numbers."""
        logits = self._forward(params, batch, None, None, training=False).logits
        if isinstance(logits, finetuning.Spans):
            found = {
                "start_index": logits.top_start_BS,
                "start_log_probs": logits.top_start_log_probs_BS,
                "end_index": logits.top_end_BST,
                "end_log_probs": logits.top_end_log_probs_BST,
                "answer_logit": logits.answer_logit_B,
            }
        else:
            found = {"logits": logits}
        found["row"] = batch["row"]
        return self._whole(found)

    def _forward(
        self,
        params: Any,
        batch: Batch,
        dropout_keys_B: jax.Array | None,
        gradient_weights: encoder.GradientWeights | None,
        training: bool,
    ) -> finetuning.FinetuningOutput:
        given: dict[str, Any] = {}
        if _conditional(self.model.head):
            given["answerable_BL"] = batch["answerable"]
            if training:
                given["start_positions_B"] = batch["start_positions"]
        output: Any = self.model.apply(
            {"params": params},
            batch["input_ids"],
            batch["token_type_ids"],
            batch["attention_mask"],
            dropout_keys_B,
            gradient_weights=gradient_weights,
            **given,
        )
        return output

    def _retrieval_sums(self, vectors_BCD: Any, batch: Batch) -> losses.Sums:
        """Each row's first vector is a query, the second its passage, the others passages that are
        not its own. The passages of all rows of the whole batch stand for choice, but for those of
        other rows with the same query.
        """
        weights_B = row_weights(batch)
        queries_BD, passages_BND = vectors_BCD[:, 0], vectors_BCD[:, 1:]
        rows, each, width = passages_BND.shape
        all_passages, all_weights, all_queries = self._whole(
            (passages_BND, weights_B, batch["query"])
        )
        first = jax.lax.axis_index(self.batch_axes) * rows if self.batch_axes else 0
        scores_BQ = _SCALE * queries_BD @ all_passages.reshape(-1, width).T
        real_Q = jnp.repeat(all_weights, each)  # a row of padding has no passages
        rows_B = first + jnp.arange(rows)
        rows_Q = jnp.repeat(jnp.arange(all_queries.shape[0]), each)
        same_BQ = batch["query"][:, None] == jnp.repeat(all_queries, each)[None, :]
        others_BQ = same_BQ & (rows_B[:, None] != rows_Q[None, :])
        scores_BQ = jnp.where((real_Q[None, :] > 0) & ~others_BQ, scores_BQ, _NEVER)
        return losses.cross_entropy(scores_BQ, rows_B * each, weights_B)

    def _whole(self, tree: Any) -> Any:
        """Rows of all devices, in order."""
        if not self.batch_axes:
            return tree
        return jax.lax.all_gather(tree, self.batch_axes, axis=0, tiled=True)


def forward(
    model: pretraining.PretrainingModel,
    params: Any,
    batch: Batch,
    keys_B: jax.Array | None,
    gradient_weights: encoder.GradientWeights | None = None,
) -> pretraining.PretrainingOutput:
    """Runs a pretraining model, with dropout where there are keys."""
    output: Any = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["masked_lm_positions"],
        keys_B,
        gradient_weights=gradient_weights,
        segment_ids_BL=batch.get("segment_ids"),
        cls_positions_BS=batch.get("cls_positions"),
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
        output.sentence_order_logits_B2, batch["sentence_order_labels"], sentence_weights(batch)
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


def sentence_weights(batch: Batch) -> jax.Array:
    """1 for a pair whose sentence label counts. float32 [B], of packed rows [B, S]."""
    if "sentence_order_weights" in batch:
        return batch["sentence_order_weights"]
    return row_weights(batch)


def row_weights(batch: Batch) -> jax.Array:
    """1 for a real row, 0 for one that only fills up the last batch: its [CLS] is masked out too.
    float32 [B].
    """
    mask = batch["attention_mask"]
    return mask.reshape(mask.shape[0], -1)[:, 0].astype(jnp.float32)


def label_weights(batch: Batch, head: str) -> jax.Array:
    """1 for a label that counts, 0 for one that is none, of padding or not known. float32, [B],
    or [B, L] with labels of pieces.
    """
    if head in ("question_answering", "question_answering_conditional", "embedding"):
        return row_weights(batch)
    labels, rows_B = batch["labels"], row_weights(batch)
    if labels.dtype == jnp.int32:
        counted = (labels >= 0).astype(jnp.float32)
        return counted * (token_weights(batch) if labels.ndim == 2 else rows_B)
    if labels.ndim == 1:
        return rows_B * jnp.isfinite(labels).astype(jnp.float32)
    return rows_B


def head_sums(head: str, logits: Any, batch: Batch) -> losses.Sums:
    """Loss, hits and labels of a head's scores, summed; of every head but "embedding".

    A span may not begin or end in padding, which the released code leaves to the model: so losses
    do not depend on how far a row is padded.
    """
    weights = label_weights(batch, head)
    if head == "question_answering_conditional":
        begin, end = (
            -jnp.take_along_axis(log_probs_BL, batch[f"{which}_positions"][:, None], 1)[:, 0]
            for which, log_probs_BL in (
                ("start", logits.start_log_probs_BL),
                ("end", logits.end_log_probs_BL),
            )
        )
        none_B = batch["is_impossible"]
        answer_B = losses.binary_cross_entropy(logits.answer_logit_B, none_B)
        hits_B = (logits.answer_logit_B > 0) == (none_B > 0)
        loss = jnp.sum(0.5 * (begin + end + answer_B) * weights)
        return losses.Sums(loss, jnp.sum(hits_B * weights), jnp.sum(weights))
    if head == "question_answering":
        begin, end = (
            losses.cross_entropy(
                jnp.where(batch["attention_mask"] > 0, logits[..., which], _NEVER),
                batch[f"{name}_positions"],
                weights,
            )
            for which, name in enumerate(("start", "end"))
        )
        return losses.Sums(*(0.5 * (a + b) for a, b in zip(begin, end, strict=True)))
    labels = batch["labels"]
    if labels.dtype == jnp.int32:
        return losses.cross_entropy(logits, jnp.maximum(labels, 0), weights)
    if labels.ndim == 1:  # a number; its hit is to be within half a unit
        apart_B = jnp.where(weights > 0, logits[:, 0] - labels, 0.0)
        hits_B = (jnp.abs(apart_B) < 0.5).astype(jnp.float32) * weights
        return losses.Sums(jnp.sum(jnp.square(apart_B)), jnp.sum(hits_B), jnp.sum(weights))
    each_B = jnp.mean(losses.binary_cross_entropy(logits, labels), axis=-1)
    hits_B = jnp.mean(((logits > 0) == (labels > 0)).astype(jnp.float32), axis=-1)
    return losses.Sums(jnp.sum(each_B * weights), jnp.sum(hits_B * weights), jnp.sum(weights))


def _has_choices(head: str) -> bool:
    return head in ("multiple_choice", "embedding")


def _conditional(head: str) -> bool:
    return head == "question_answering_conditional"

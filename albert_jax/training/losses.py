"""Sums of losses and hits in float32.

Sums and counts stay apart: microbatches and hosts are added up before the one division, since the
    number of masked
slots differs between them and a mean of means would be another number.

Letters: B batch, P masked slots, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Added to the number of masked slots, as in the released code (run_pretraining.py), where it keeps
# 0/0 away.
MASKED_LM_COUNT_EPSILON = 1e-5
_SQUARE_EPSILON = 1e-12  # PyTorch's


class Sums(NamedTuple):
    """Cross-entropy (nats), hits, and how many weighted targets there were; float32 scalars."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    """Weighted sums of -log softmax(logits)[label].

    Args:
        logits: [..., C] of any float dtype; taken to float32 here.
        labels: int [...] in [0, C); where the weight is 0, any valid label.
        weights: float [...], 1 for what counts and 0 for padding.

    Raises:
        ValueError: the shapes disagree.
    """
    if not logits.shape[:-1] == labels.shape == weights.shape:
        raise ValueError(
            "cross_entropy wants logits (..., C), labels (...), weights (...); "
            f"got {logits.shape}, {labels.shape}, {weights.shape}."
        )
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    normalizers = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    # The best of the others, not argmax: a plain maximum is many times faster, and a tie is no hit.
    classes = jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    others = jnp.where(classes == labels[..., None], -jnp.inf, logits)
    hits = (label_logits > jnp.max(others, axis=-1)).astype(jnp.float32)
    return Sums(
        jnp.sum((normalizers - label_logits) * weights), jnp.sum(hits * weights), jnp.sum(weights)
    )


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log of sigmoid(logit) where the label is 1, and of its complement where it is 0; float32,
    elementwise; labels between are mixed.
    """
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * labels


def divergence(
    student_logits: jax.Array, teacher_logits: jax.Array, weights: jax.Array, temperature: float
) -> jax.Array:
    """Weighted sum of KL(softmax(teacher / temperature) || softmax(student / temperature)), nats.

    Args:
        student_logits, teacher_logits: [..., C] of any float dtype; taken to float32 here.
        weights: float [...].
        temperature: above 0.

    Raises:
        ValueError: the shapes disagree.
    """
    if (
        not student_logits.shape
        == teacher_logits.shape
        == (*weights.shape, teacher_logits.shape[-1])
    ):
        raise ValueError(
            "divergence wants two logits (..., C) and weights (...); "
            f"got {student_logits.shape}, {teacher_logits.shape}, {weights.shape}."
        )
    ours = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    theirs = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    return jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


def cosine_distance(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of 1 - cosine of two vectors each, as PyTorch's CosineEmbeddingLoss.

    Args:
        student, teacher: [..., D] of any float dtype; taken to float32 here.
        weights: float [...].

    Raises:
        ValueError: the shapes disagree.
    """
    if not student.shape == teacher.shape == (*weights.shape, teacher.shape[-1]):
        raise ValueError(
            "cosine_distance wants two times vectors (..., D) and weights (...); "
            f"got {student.shape}, {teacher.shape}, {weights.shape}."
        )
    ours, theirs = student.astype(jnp.float32), teacher.astype(jnp.float32)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=-1)

    squares = (product(ours, ours) + _SQUARE_EPSILON) * (product(theirs, theirs) + _SQUARE_EPSILON)
    return jnp.sum(weights * (1.0 - product(ours, theirs) * jax.lax.rsqrt(squares)))

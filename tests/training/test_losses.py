"""Sums of losses, against hand arithmetic and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from albert_jax.training import losses


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.9, 0.1]]]))
    sums = losses.cross_entropy(logits, jnp.array([[1, 0]]), jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(sums, [np.log(4 / 3), 1.0, 1.0], rtol=1e-6)


def test_cross_entropy_equals_pytorch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 11)).astype(np.float32) * 3
    labels = rng.integers(0, 11, (3, 4))
    weights = rng.integers(0, 2, (3, 4)).astype(np.float32)
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none"
    ).numpy()
    sums = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
    np.testing.assert_allclose(sums.loss, (theirs * weights.flatten()).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.correct, ((logits.argmax(-1) == labels) * weights).sum())


def test_bfloat16_scores_are_summed_in_float32():
    logits = jnp.zeros((1, 3000, 2), jnp.bfloat16)
    sums = losses.cross_entropy(logits, jnp.zeros((1, 3000), jnp.int32), jnp.ones((1, 3000)))
    np.testing.assert_allclose(sums.loss, 3000 * np.log(2), rtol=1e-5)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\), \(2, 4\), \(2, 3\)"):
        losses.cross_entropy(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 3)))


def test_divergence_from_a_teacher_and_its_gradient_equal_pytorch():
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(3, 4, 11)).astype(np.float32) * 3 for _ in range(2))
    kept = rng.integers(0, 2, (3, 4)).astype(bool)
    ours, gradient = jax.value_and_grad(losses.divergence)(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(kept, jnp.float32), 2.0
    )
    student_t = torch.from_numpy(student).requires_grad_()
    theirs = torch.nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(student_t[kept] / 2.0, -1),
        torch.softmax(torch.from_numpy(teacher)[kept] / 2.0, -1),
    )
    theirs.backward()
    np.testing.assert_allclose(ours / kept.sum(), theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient / kept.sum(), student_t.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_cosine_distance_from_a_teacher_and_its_gradient_equal_pytorch():
    rng = np.random.default_rng(2)
    student, teacher = (rng.normal(size=(3, 5, 7)).astype(np.float32) for _ in range(2))
    student[0, 0] = 0  # no direction at all
    kept = rng.integers(0, 2, (3, 5)).astype(bool)
    kept[0, 0] = True
    ours, gradient = jax.value_and_grad(losses.cosine_distance)(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(kept, jnp.float32)
    )
    student_t = torch.from_numpy(student).requires_grad_()
    theirs = torch.nn.CosineEmbeddingLoss(reduction="mean")(
        student_t[kept], torch.from_numpy(teacher)[kept], torch.ones(int(kept.sum()))
    )
    theirs.backward()
    np.testing.assert_allclose(ours / kept.sum(), theirs.item(), rtol=1e-5)
    expected = student_t.grad.numpy()
    np.testing.assert_allclose(gradient / kept.sum(), expected, rtol=1e-4, atol=1e-6)

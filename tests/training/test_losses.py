"""Sums of losses, against hand arithmetic and PyTorch."""

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

"""Pairs that share a row: to each of them it is as if it were alone, forward and backward."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from albert_jax import config
from albert_jax.model import pretraining
from albert_jax.training import objectives, step
from tests.data import packed_batches

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODEL = config.ModelConfig(
    vocab_size=packed_batches.VOCAB,
    embedding_size=12,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=packed_batches.LENGTH + 2,
    position_offset=2,
    initializer_range=0.3,
    dtype="float32",
)


def params_of(objective: objectives.Pretraining) -> dict:
    return meta.unbox(jax.jit(lambda: objective.init_params(4))())


@pytest.mark.parametrize("objective", ["sop", "nsp"])
def test_each_pair_gets_the_states_and_scores_that_it_gets_alone(objective: str):
    packed, alone, places = packed_batches.packed_and_alone(objective, rows=6)
    model = pretraining.PretrainingModel(dataclasses.replace(MODEL, sentence_objective=objective))
    params = params_of(objectives.Pretraining(model))
    forward = jax.jit(lambda params, batch: objectives.forward(model, params, batch, None))
    ours, theirs = forward(params, packed), forward(params, alone)
    assert len(places) > 2 * 6
    worst = 0.0
    for number, (row, at, begin, length, slot, slots) in enumerate(places):
        for mine, wanted in (
            (
                ours.encoder.sequence_BLD[row, begin : begin + length],
                theirs.encoder.sequence_BLD[number, :length],
            ),
            (
                ours.masked_lm_logits_BPV[row, slot : slot + slots],
                theirs.masked_lm_logits_BPV[number, :slots],
            ),
            (ours.sentence_order_logits_B2[row, at], theirs.sentence_order_logits_B2[number]),
            (ours.pooled_BD[row, at], theirs.pooled_BD[number]),
        ):
            assert mine.shape == wanted.shape
            worst = max(worst, float(jnp.max(jnp.abs(mine - wanted))))
    print(f"{len(places)} pairs in 6 rows: greatest difference {worst:.1e}")
    assert worst <= 1e-5


def test_losses_and_gradients_are_those_of_the_pairs_alone():
    packed, alone, places = packed_batches.packed_and_alone("sop", rows=6)
    objective = objectives.Pretraining(pretraining.PretrainingModel(MODEL))
    params = params_of(objective)

    def found(batch: dict, microbatches: int = 1) -> tuple[dict, dict]:
        recipe = step.Recipe(objective, None, False, microbatches, 1)  # pyright: ignore
        gradients = jax.jit(lambda batch: step.gradients(params, jnp.int32(0), 0, batch, 0, recipe))
        return gradients(batch)

    grads, metrics = found(packed)
    wanted, wanted_metrics = found(alone)
    assert float(objective.counts(packed)[1]) == len(places)
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # Of all, since some are zero but for rounding: no score depends on the bias of the keys.
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * scale, err_msg=where)
    # Rows of few and of many pairs fall into different microbatches; sums, not means, are added.
    in_parts, part_metrics = found(packed, microbatches=3)
    for name, value in metrics.items():
        np.testing.assert_allclose(part_metrics[name], value, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(in_parts), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * scale)

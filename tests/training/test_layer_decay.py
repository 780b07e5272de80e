"""Rates that differ from layer to layer: against an unshared model by plain arithmetic."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from albert_jax import config
from albert_jax.model import pretraining
from albert_jax.training import objectives, optimizer, program, sharding, step

DEPTHS, DECAY, STEPS = 4, 0.6, 40
MODEL = config.ModelConfig(
    vocab_size=23,
    embedding_size=6,
    hidden_size=8,
    num_hidden_layers=DEPTHS,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
    sentence_objective="none",
    initializer_range=0.3,
    dtype="float32",
    attention="xla",
)


def recipe(model: config.ModelConfig, decay: config.OptimizerConfig) -> step.Recipe:
    weights = None
    if optimizer.has_layer_decay(decay):
        weights = optimizer.gradient_weights(decay, STEPS, model)
    objective = objectives.Pretraining(pretraining.PretrainingModel(model))
    none: Any = None
    return step.Recipe(objective, none, False, 1, 1, weights)


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    integers = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    return {
        "input_ids": integers(23, 5, 11),
        "token_type_ids": integers(2, 5, 11),
        "attention_mask": jnp.ones((5, 11), jnp.int32),
        "masked_lm_positions": integers(11, 5, 3),
        "masked_lm_ids": integers(23, 5, 3),
        "masked_lm_weights": jnp.ones((5, 3), jnp.float32),
    }


def shared_params() -> Any:
    objective = objectives.Pretraining(pretraining.PretrainingModel(MODEL))
    return meta.unbox(objective.init_params(3))


def unshared(params: Any) -> Any:
    """The same model with a copy of the one set for each depth."""
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, DEPTHS, axis=0), params["encoder"])
    return {**params, "encoder": copies}


def gradients(model: config.ModelConfig, params: Any, decay: config.OptimizerConfig, number: int):
    made = recipe(model, decay)
    return jax.jit(lambda p: step.gradients(p, jnp.int32(number), 0, batch(), 0, made))(params)[0]


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize(("share", "number"), [(0.0, 7), (0.5, 0), (0.5, 10), (0.5, 30)])
def test_a_shared_update_is_the_sum_of_the_decayed_updates_of_an_unshared_model(end, share, number):
    decay = config.OptimizerConfig(layer_decay=DECAY, layer_decay_from=end, layer_decay_share=share)
    left = max(0.0, 1.0 - number / (share * STEPS)) if share else 1.0
    away = np.arange(DEPTHS) if end == "bottom" else np.arange(DEPTHS)[::-1]
    rates_N = (DECAY**left) ** away
    params = shared_params()
    plain = config.OptimizerConfig()
    wide = dataclasses.replace(MODEL, num_hidden_groups=DEPTHS, attention_groups=0, ffn_groups=0)
    each = gradients(wide, unshared(params), plain, number)["encoder"]
    ours = gradients(MODEL, params, decay, number)["encoder"]

    def check(shared: jax.Array, parts: jax.Array) -> None:
        summed = np.tensordot(rates_N / rates_N.mean(), np.asarray(parts), axes=(0, 0))
        np.testing.assert_allclose(shared[0], summed, rtol=2e-4, atol=2e-6)

    jax.tree.map(check, ours, each)
    if number < 30:  # later all rates are equal: then it has to be the plain gradient
        flat = gradients(MODEL, params, plain, number)["encoder"]
        apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), ours, flat)
        assert max(jax.tree.leaves(apart)) > 1e-3


def test_unshared_layers_embeddings_and_heads_learn_at_their_own_rates():
    model = dataclasses.replace(MODEL, num_hidden_groups=DEPTHS, attention_groups=0, ffn_groups=0)
    plain = config.OptimizerConfig(name="adamw", learning_rate=0.1, warmup_steps=0)
    rates = {"layer_decay": DECAY, "embedding_rate": 0.5, "head_rate": 3.0}
    params = unshared(shared_params())
    objective = objectives.Pretraining(pretraining.PretrainingModel(model))
    names = sharding.axis_names(jax.eval_shape(lambda: objective.init_params(0)))

    def updates(cfg: config.OptimizerConfig) -> Any:
        grads = gradients(model, params, cfg, 0)
        tx = optimizer.optimizer(cfg, STEPS, names, model)
        return tx.update(grads, tx.init(params), params)[0]

    one, other = updates(plain), updates(dataclasses.replace(plain, **rates))
    per_depth = DECAY ** np.arange(DEPTHS)[::-1]

    def factor(name: str) -> Any:
        if name == "encoder":
            return per_depth
        return 0.5 * DECAY**DEPTHS if name == "embeddings" else 3.0

    for name in one:
        expected = factor(name)

        def check(a: jax.Array, b: jax.Array, expected: Any = expected) -> None:
            scale = (
                np.reshape(expected, (-1, *[1] * (a.ndim - 1))) if np.ndim(expected) else expected
            )
            np.testing.assert_allclose(b, a * scale, rtol=1e-5, atol=1e-8)

        jax.tree.map(check, one[name], other[name])


def test_a_run_with_decay_goes_through_the_program_and_keeps_its_count():
    cfg = config.Config(
        model=MODEL,
        data=config.DataConfig(max_seq_length=11, max_predictions_per_seq=3),
        train=config.TrainConfig(steps=STEPS, global_batch_size=5),
        optimizer=config.OptimizerConfig(
            name="adamw",
            learning_rate=0.02,
            layer_decay=DECAY,
            layer_decay_share=0.2,
            warmup_steps=1,
        ),
        mesh=config.MeshConfig(data=1),
    )
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    state, losses = run.init(), []
    for _ in range(STEPS):
        rows = sharding.to_global(batch(), run.batch_sharding, 5)
        state = run.train_step(state, rows, *run.frozen())
        losses.append(float(state.window["loss"] / state.window_steps))
    assert losses[-1] < 0.85 * losses[0]

"""Equal to the original: forward pass, losses, gradients through LAMB, against what the released
code computed.
"""

import dataclasses
import pathlib
from typing import Any

import google_reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from albert_jax import config
from albert_jax.interop import google
from albert_jax.model import encoder, pretraining
from albert_jax.training import objectives, optimizer, sharding, step

BATCH_KEYS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "masked_lm_weights",
    "sentence_order_labels",
)


@pytest.fixture(scope="module")
def folder(shared_data: pathlib.Path) -> pathlib.Path:
    return shared_data / "reference" / "google_tf1"


def largest_relative(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|: relative to the array's scale, as entries pass through
    zero.
    """
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    worst = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    print(f"{name}: max relative difference {worst:.2e}")
    return worst


def reference_batch(expected: dict[str, np.ndarray], number: int) -> dict[str, jax.Array]:
    batch = {key: jnp.asarray(expected[f"batch{number}/{key}"]) for key in BATCH_KEYS}
    return {**batch, "sentence_order_labels": batch["sentence_order_labels"].reshape(-1)}


def test_forward_pass_equals_the_released_code(folder: pathlib.Path):
    loaded, expected = google.load(folder / "model.ckpt-0"), google_reference.expected(folder)
    cfg, params = loaded.config, loaded.params
    batch = reference_batch(expected, 0)
    model = pretraining.PretrainingModel(cfg)
    output = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["masked_lm_positions"],
        output_hidden_states=True,
    )
    embedded, _ = encoder.Embeddings(
        dataclasses.replace(cfg, hidden_size=cfg.embedding_size), jnp.dtype("float32")
    ).apply(
        {"params": {k: v for k, v in params["embeddings"].items() if k != "projection"}},
        batch["input_ids"],
        batch["token_type_ids"],
        None,
    )
    log_probs = jax.nn.log_softmax(output.masked_lm_logits_BPV)
    ours = {
        "embedding_output": embedded,
        "first_layer_output": output.encoder.hidden_states_NBLD[0],
        "sequence_output": output.encoder.sequence_BLD,
        "pooled_output": output.pooled_BD,
        "masked_lm_log_probs": log_probs.reshape(-1, cfg.vocab_size),
        "sentence_order_log_probs": jax.nn.log_softmax(output.sentence_order_logits_B2),
    }
    for name, array in ours.items():
        assert largest_relative(name, np.asarray(array), expected[name]) < 1e-5


def test_six_lamb_steps_and_a_checkpoint_equal_the_released_code(
    folder: pathlib.Path, tmp_path: pathlib.Path
):
    start, expected = google.load(folder / "model.ckpt-0"), google_reference.expected(folder)
    cfg, head = start.config, start.head
    model = pretraining.PretrainingModel(cfg)
    names = sharding.axis_names(
        jax.eval_shape(lambda: objectives.Pretraining(model).init_params(0))
    )
    # Clipping is done below, by the reference's own norm.
    unclipped = config.OptimizerConfig(warmup_steps=4, clip_norm=0.0)
    tx = optimizer.optimizer(unclipped, 1000, names)
    recipe = step.Recipe(objectives.Pretraining(model), tx, False, 1, 1)

    @jax.jit
    def update(params, opt_state, batch):
        grads, metrics = step.gradients(params, jnp.int32(0), 0, batch, 0, recipe)
        norm = norm_with_sparse_token_types(params, batch, cfg)
        clipped = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
        updates, opt_state = tx.update(clipped, opt_state, params)
        losses = [metrics[k] for k in ("loss", "masked_lm_loss", "sentence_order_loss")]
        return jax.tree.map(jnp.add, params, updates), opt_state, losses

    losses = []
    loaded = start
    # Two parts of three steps, with a checkpoint of Google's format between them and at the end.
    for part in (range(3), range(3, 6)):
        params = jax.tree.map(jnp.asarray, loaded.params)
        assert loaded.step == part.start
        opt_state = optimizer.with_moments(tx.init(params), *loaded.moments, loaded.step)
        for number in part:
            params, opt_state, row = update(params, opt_state, reference_batch(expected, number))
            losses.append([float(loss) for loss in row])
        slots = optimizer.moments(opt_state)
        google.save(tmp_path, cfg, head, jax.device_get(params), part.stop, slots)
        loaded = google.load(tmp_path)
    assert largest_relative("losses", np.asarray(losses), expected["losses"]) < 1e-5

    ours = google_reference.variables(tmp_path / "model.ckpt-6")
    theirs = google_reference.variables(folder / "model.ckpt-6")
    origin = google_reference.variables(folder / "model.ckpt-0")
    assert ours.keys() == theirs.keys()
    assert ours.pop("global_step") == theirs["global_step"] == 6
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        if "key/bias/adam" in name:
            continue  # it shifts all scores of a row alike: its gradient is rounding error
        assert largest_relative(name, array, theirs[name]) < 1e-5
        assert np.any(theirs[name] != origin[name])  # or equality would say nothing about it


def norm_with_sparse_token_types(
    params: Any, batch: dict[str, jax.Array], cfg: config.ModelConfig
) -> jax.Array:
    """The gradients' norm as TensorFlow took it for the reference, on a CPU.

    There the gradient of the token type table stayed a list of rows, one for each token looked up,
    and its norm was taken before rows of the same type were added up. A table with a row of its own
    for every token has just that gradient.
    """
    types = batch["token_type_ids"]
    rows = params["embeddings"]["token_type_embeddings"][types.reshape(-1)]
    wide = pretraining.PretrainingModel(dataclasses.replace(cfg, type_vocab_size=types.size))
    wide_params = {**params, "embeddings": {**params["embeddings"], "token_type_embeddings": rows}}
    wide_batch = {**batch, "token_type_ids": jnp.arange(types.size).reshape(types.shape)}
    recipe = step.Recipe(objectives.Pretraining(wide), None, False, 1, 1)
    grads, _ = step.gradients(wide_params, jnp.int32(0), 0, wide_batch, 0, recipe)
    return optax.tree.norm(grads)


def test_accumulated_gradients_equal_the_whole_batchs(folder: pathlib.Path):
    loaded, expected = google.load(folder / "model.ckpt-0"), google_reference.expected(folder)
    model = pretraining.PretrainingModel(
        dataclasses.replace(
            loaded.config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
        )
    )
    objective = objectives.Pretraining(model)
    params = jax.tree.map(jnp.asarray, loaded.params)
    batch = reference_batch(expected, 1)
    rows = batch["input_ids"].shape[0]

    def gradients(microbatches: int):
        recipe = step.Recipe(objective, None, True, microbatches, 1)
        return jax.jit(lambda: step.gradients(params, jnp.int32(3), 7, batch, 0, recipe))()

    whole, whole_metrics = gradients(1)
    for microbatches in (rows, 2):
        parts, metrics = gradients(microbatches)
        for key, value in whole_metrics.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole
        )
    without = step.gradients(
        params, jnp.int32(3), 7, batch, 0, step.Recipe(objective, None, False, 1, 1)
    )[1]
    assert abs(float(without["loss"] - whole_metrics["loss"])) > 1e-3  # there was dropout at all

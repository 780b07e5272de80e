"""A state saved under one mesh is restored under any other, to the bit."""

import jax
import numpy as np
import pytest

from albert_jax import config
from albert_jax.training import checkpoint, program, sharding

MESHES = {(1, 1, 1): 1, (8, 1, 1): 8, (2, 4, 1): 8, (2, 2, 2): 8}  # and on how many devices
CONFIG = config.Config(
    model=config.ModelConfig(
        vocab_size=72,
        embedding_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=12,
    ),
    data=config.DataConfig(max_seq_length=12, max_predictions_per_seq=3),
    train=config.TrainConfig(steps=20, global_batch_size=16),
)


def abstract_state(mesh: tuple[int, int, int]):
    cfg = config.Config(CONFIG.model, CONFIG.data, CONFIG.train, mesh=config.MeshConfig(*mesh))
    return program.build(cfg, sharding.make_mesh(cfg, jax.devices()[: MESHES[mesh]])).abstract_state


@pytest.fixture(scope="module")
def values():
    """A state of random numbers, every bit of which matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (1000 * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        abstract_state((1, 1, 1)),
    )


@pytest.mark.parametrize("saved_under", MESHES)
def test_saved_under_one_mesh_restored_under_every_other(tmp_path, values, saved_under):
    state = jax.tree.map(
        lambda value, leaf: jax.device_put(value, leaf.sharding),
        values,
        abstract_state(saved_under),
    )
    seconds = {"step": 1.5, "compile": 0.25}
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(state, 3, -1.0, seconds)
    assert checkpoint.newest_in(tmp_path) == 3
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.seconds(3) == seconds
        assert saved.best == (3, -1.0)
        for mesh in MESHES:
            like = abstract_state(mesh)
            restored = saved.restore(like, 3)
            jax.tree.map(np.testing.assert_array_equal, restored, values)
            for leaf, wanted in zip(*map(jax.tree.leaves, (restored, like)), strict=True):
                assert leaf.sharding == wanted.sharding

"""The same run on any mesh: eight pretend devices give the losses of one."""

import dataclasses

import jax
import numpy as np
import pytest

from albert_jax import config
from albert_jax.errors import UserError
from albert_jax.model import pretraining
from albert_jax.training import objectives, program, sharding
from tests.data import packed_batches

pytestmark = pytest.mark.usefixtures("compiles_fast")
ROWS, LENGTH, SLOTS, VOCAB = 16, 12, 4, 64


def small_config(mesh: config.MeshConfig, microbatch_size: int = 0) -> config.Config:
    return config.Config(
        model=config.ModelConfig(
            vocab_size=VOCAB,
            embedding_size=8,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=LENGTH,
            initializer_range=0.2,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            dtype="float32",
        ),
        data=config.DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=SLOTS),
        train=config.TrainConfig(steps=20, global_batch_size=ROWS, microbatch_size=microbatch_size),
        optimizer=config.OptimizerConfig(learning_rate=0.01, warmup_steps=3),
        log=config.LogConfig(every_steps=1),
        mesh=mesh,
    )


def random_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(6, LENGTH + 1, ROWS)
    mask_BL = (np.arange(LENGTH) < lengths_B[:, None]).astype(np.int32)
    integers = lambda high, *shape: rng.integers(0, high, shape).astype(np.int32)  # noqa: E731
    return {
        "input_ids": integers(VOCAB, ROWS, LENGTH) * mask_BL,
        "token_type_ids": integers(2, ROWS, LENGTH) * mask_BL,
        "attention_mask": mask_BL,
        "masked_lm_positions": integers(6, ROWS, SLOTS),
        "masked_lm_ids": integers(VOCAB, ROWS, SLOTS),
        "masked_lm_weights": rng.integers(0, 2, (ROWS, SLOTS)).astype(np.float32),
        "sentence_order_labels": integers(2, ROWS),
    }


def packed_config(mesh: config.MeshConfig, microbatch_size: int = 0) -> config.Config:
    cfg = small_config(mesh, microbatch_size)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, max_position_embeddings=packed_batches.LENGTH),
        data=config.DataConfig(
            max_seq_length=packed_batches.LENGTH,
            max_predictions_per_seq=packed_batches.SLOTS,
            max_pairs_per_seq=packed_batches.PAIRS,
            packing=True,
        ),
        train=dataclasses.replace(cfg.train, steps=3),
    )


def losses(cfg: config.Config, devices: int) -> np.ndarray:
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:devices]))
    state, result = run.init(), []
    for number in range(cfg.train.steps):
        made = random_batch(number)
        if cfg.data.packing:
            made = packed_batches.batch("sop", ROWS, seed=number)
        assert {name: array.shape for name, array in made.items()} == {
            name: array.shape for name, array in run.abstract_batch().items()
        }
        batch = sharding.to_global(made, run.batch_sharding, ROWS)
        state = run.train_step(state, batch, *run.frozen())
        result.append(float(state.window["loss"]))
    return np.asarray(result)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return losses(small_config(config.MeshConfig()), 1)


@pytest.mark.parametrize(
    ("mesh", "microbatch_size"),
    [((8, 1, 1), 0), ((4, 2, 1), 0), ((2, 2, 2), 0), ((1, 2, 4), 4), ((8, 1, 1), 1)],
)
def test_losses_on_eight_devices_are_those_of_one(one_device, mesh, microbatch_size):
    ours = losses(small_config(config.MeshConfig(*mesh), microbatch_size), 8)
    worst = np.max(np.abs(ours - one_device) / one_device)
    print(f"mesh {mesh}: max relative difference {worst:.2e}")
    assert worst < 1e-5
    assert one_device[-1] < one_device[0]


def test_losses_of_packed_rows_on_eight_devices_are_those_of_one():
    one = losses(packed_config(config.MeshConfig()), 1)
    ours = losses(packed_config(config.MeshConfig(2, 2, 2), microbatch_size=1), 8)
    np.testing.assert_allclose(ours, one, rtol=1e-5)


def test_masters_and_slots_are_split_over_all_that_share_the_batch_and_over_tensor():
    cfg = small_config(config.MeshConfig(data=2, fsdp=2, tensor=2))
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()))
    state = run.init()
    kernel = state.params["encoder"]["ffn"]["intermediate"]["kernel"]
    slots = jax.tree.leaves(state.opt_state[1].mu["encoder"]["ffn"]["intermediate"]["kernel"])[0]
    for array in (kernel, slots):
        assert array.shape == (1, 1, 32, 48)
        assert array.addressable_shards[0].data.shape == (1, 1, 8, 24)


def test_every_parameter_has_a_rule():
    boxed = jax.eval_shape(
        lambda: objectives.Pretraining(
            pretraining.PretrainingModel(small_config(config.MeshConfig()).model)
        ).init_params(0)
    )
    names = sharding.axis_names(boxed)
    assert all(name in sharding.RULES for name in jax.tree.leaves(names))
    strange = jax.tree.map(
        lambda box: box.replace(names=("colour",) * box.value.ndim),
        boxed,
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )
    with pytest.raises(ValueError, match="colour"):
        sharding.axis_names(strange)


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        ((3, 1, 1), {}, "mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not make 8 devices"),
        ((-1, 3, 1), {}, "mesh.fsdp=3"),
        ((1, 1, 8), {}, "mesh.tensor=8 does not divide model.num_attention_heads=4"),
        ((8, 1, 1), {"global_batch_size": 12}, "nearest that do: 8 and 16"),
        ((2, 1, 4), {"microbatch_size": 3}, "microbatch_size=3 does not divide"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_field(mesh, change, message):
    cfg = small_config(config.MeshConfig(*mesh))
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **change))
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(cfg, jax.devices())

"""What `auto` becomes, and what is refused for want of memory."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from albert_jax.config import AUTO, Config, DataConfig, ModelConfig, TrainConfig
from albert_jax.training import fitting, sharding

TINY = Config(
    model=ModelConfig(
        vocab_size=101,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        dtype="float32",
        remat="auto",
    ),
    data=DataConfig(max_seq_length=16, max_predictions_per_seq=4),
    train=TrainConfig(global_batch_size=16, microbatch_size=AUTO),
)


def tried(remat, microbatch_size, share):
    config = dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, remat=remat),
        train=dataclasses.replace(TINY.train, microbatch_size=microbatch_size),
    )
    return [
        (candidate.model.remat, candidate.train.microbatch_size)
        for candidate in fitting.settings(config, share)
    ]


def test_least_recomputation_first_then_the_largest_microbatch_small_ones_last():
    assert tried("auto", AUTO, 24) == [
        *[(remat, size) for remat in ("none", "dots", "full") for size in (24, 12, 8)],
        *[(remat, size) for remat in ("none", "dots", "full") for size in (6, 4, 3, 2, 1)],
    ]


def test_a_share_below_the_usual_microbatch_is_tried_whole_first():
    assert tried("dots", AUTO, 6) == [("dots", 6), ("dots", 3), ("dots", 2), ("dots", 1)]


def test_what_is_set_stays_as_it_is():
    assert tried("full", 4, 24) == [("full", 4)]
    assert tried("auto", 0, 24) == [("none", 0), ("dots", 0), ("full", 0)]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(TINY, jax.devices()[:2])


@pytest.fixture(scope="module")
def fitted(mesh):
    return fitting.fit(TINY, mesh, None)


def test_without_known_memory_auto_is_dots_and_the_whole_share(fitted):
    config = fitted.run.config
    assert (config.model.remat, config.train.microbatch_size) == ("dots", 0)
    state = fitted.compiled(fitted.run.init(), zeros(fitted.run), *fitted.run.frozen())
    assert int(state.step) == 1


def test_another_seed_has_other_numbers_and_compiles_nothing(mesh):
    another = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=7))
    compilations = []

    def count(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    embeddings, counts = [], []
    for seed in (1, 2):
        fitted = fitting.fit(another.with_seeds(seed, seed), mesh, None)
        run = fitted.run
        state = fitted.compiled(run.init(), zeros(run), *run.frozen())
        jax.block_until_ready(state)
        counts.append(len(compilations))
        embeddings.append(np.asarray(state.params["embeddings"]["word_embeddings"]))
    jax.monitoring.unregister_event_duration_listener(count)
    assert counts[0] == counts[1] > 0
    assert not np.allclose(*embeddings)


def test_state_and_batch_of_one_device_are_the_programs_arguments(fitted):
    assert fitted.memory.arguments == pytest.approx(fitting.argument_bytes(fitted.run), rel=0.01)


def test_a_step_that_needs_more_than_there_is_does_not_fit(mesh, fitted):
    config = dataclasses.replace(fitted.run.config)
    available = fitted.memory.total - 1
    missed = []
    with pytest.raises(fitting.DoesNotFitError) as error:
        fitting.fit(config, mesh, available, on_miss=lambda *miss: missed.append(miss))
    assert error.value.needed == fitted.memory.total
    assert [candidate for candidate, _ in missed] == [config]


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (29.81G) exceeds available HBM (15.75G).",
            (29.81 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 800.50M of 15.75G hbm.",
            (800.5 * 2**20, 15.75 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_refusals_are_read(message, found):
    assert fitting._out_of_memory(message) == (found and tuple(map(int, found)))


def test_devices_of_a_cpu_share_the_machines_memory():
    kilobytes = next(
        int(line.split()[1])
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    limit = fitting.memory_limit(jax.devices()[0])
    assert limit is not None
    assert limit * len(jax.devices()) == pytest.approx(kilobytes * 1024, rel=0.02)


def zeros(run):
    batch = {key: np.zeros(shape.shape, shape.dtype) for key, shape in run.abstract_batch().items()}
    return sharding.to_global(batch, run.batch_sharding, run.config.train.global_batch_size)

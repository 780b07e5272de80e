"""A student and its teacher: the loss beside PyTorch's, any mesh, whole runs of the commands."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store
import torch

from albert_jax import config
from albert_jax.errors import UserError
from albert_jax.model import pretraining
from albert_jax.training import checkpoint, distillation, objectives, program, sharding, step

pytestmark = pytest.mark.usefixtures("compiles_fast")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ROWS, LENGTH, SLOTS, VOCAB = 16, 12, 4, 64

STUDENT = config.ModelConfig(
    model_type="distilbert",
    vocab_size=VOCAB,
    embedding_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_hidden_groups=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=LENGTH,
    type_vocab_size=0,
    pooler=False,
    initializer_range=0.2,
    hidden_dropout_prob=0.1,
    sentence_objective="none",
    dtype="float32",
)
# A BERT, deeper than its student, with what the student lacks.
TEACHER = dataclasses.replace(
    STUDENT,
    model_type="bert",
    num_hidden_layers=4,
    num_hidden_groups=4,
    attention_groups=4,
    ffn_groups=4,
    type_vocab_size=2,
    pooler=True,
    sentence_objective="nsp",
    initializer_range=0.3,
)


def run_config(model: config.ModelConfig, **changes: object) -> config.Config:
    cfg = config.Config(
        model=model,
        data=config.DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=SLOTS),
        train=config.TrainConfig(steps=8, global_batch_size=ROWS),
        optimizer=config.OptimizerConfig(name="adamw", learning_rate=0.01, warmup_steps=3),
        log=config.LogConfig(every_steps=1),
    )
    return dataclasses.replace(cfg, **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run's folder, with a checkpoint of step 7."""
    workdir = tmp_path_factory.mktemp("teacher")
    cfg = run_config(TEACHER)
    (workdir / "config.json").write_text(cfg.to_json())
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    with checkpoint.Checkpoints(workdir) as saved:
        saved.save(run.init(), 7, None, {})
    return workdir


def taught(teacher: pathlib.Path, **changes: object) -> config.DistillationConfig:
    options = config.DistillationConfig(teacher=str(teacher), teacher_step=7)
    return dataclasses.replace(options, **changes)


def random_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(6, LENGTH + 1, ROWS)
    mask_BL = (np.arange(LENGTH) < lengths_B[:, None]).astype(np.int32)
    integers = lambda high, *shape: rng.integers(0, high, shape).astype(np.int32)  # noqa: E731
    return {
        "input_ids": integers(VOCAB, ROWS, LENGTH) * mask_BL,
        "token_type_ids": np.zeros((ROWS, LENGTH), np.int32),
        "attention_mask": mask_BL,
        "masked_lm_positions": integers(6, ROWS, SLOTS),
        "masked_lm_ids": integers(VOCAB, ROWS, SLOTS),
        "masked_lm_weights": rng.integers(0, 2, (ROWS, SLOTS)).astype(np.float32),
    }


def test_loss_and_gradient_are_those_of_the_formula_in_pytorch():
    models = [pretraining.PretrainingModel(cfg) for cfg in (STUDENT, TEACHER)]
    ours, theirs = (
        jax.tree.map(
            lambda box: box.value,
            objectives.Pretraining(model).init_params(3),
            is_leaf=lambda leaf: hasattr(leaf, "names"),
        )
        for model in models
    )
    batch = {key: jnp.asarray(value) for key, value in random_batch(0).items()}
    options = config.DistillationConfig(
        temperature=3.0, kl_weight=4.0, masked_lm_weight=0.7, cosine_weight=1.3
    )
    recipe = step.Recipe(
        objectives.Pretraining(models[0], (), models[1], options), None, False, 2, 1
    )
    grads, metrics = jax.jit(
        lambda ours, theirs: step.gradients(ours, jnp.int32(0), 0, batch, 0, recipe, theirs)
    )(ours, theirs)

    def outputs(params):
        output = objectives.forward(models[0], params, batch, None)
        return output.masked_lm_logits_BPV, output.encoder.sequence_BLD

    logits_BPV, hidden_BLD = jax.jit(outputs)(ours)
    answer = jax.jit(lambda params: objectives.forward(models[1], params, batch, None))(theirs)
    to_torch = lambda array: torch.from_numpy(np.array(array))  # noqa: E731
    logits, hidden = to_torch(logits_BPV).requires_grad_(), to_torch(hidden_BLD).requires_grad_()
    slots = to_torch(batch["masked_lm_weights"]) > 0
    real = to_torch(batch["attention_mask"]) > 0
    kl = torch.nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(logits[slots] / 3.0, -1),
        torch.softmax(to_torch(answer.masked_lm_logits_BPV)[slots] / 3.0, -1),
    )
    cosine = torch.nn.CosineEmbeddingLoss(reduction="mean")(
        hidden[real],
        to_torch(answer.encoder.sequence_BLD)[real],
        torch.ones(int(real.sum())),
    )
    masked_lm = torch.nn.functional.cross_entropy(
        logits[slots], to_torch(batch["masked_lm_ids"])[slots].long()
    )
    total = 4.0 * 3.0**2 * kl + 0.7 * masked_lm + 1.3 * cosine
    total.backward()
    for name, value in {
        "loss": total,
        "masked_lm_loss": masked_lm,
        "teacher_divergence": kl,
        "teacher_cosine_distance": cosine,
    }.items():
        np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-5)
    cotangents = (jnp.asarray(logits.grad.numpy()), jnp.asarray(hidden.grad.numpy()))
    (expected,) = jax.jit(lambda params: jax.vjp(outputs, params)[1](cotangents))(ours)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        wanted = expected
        for entry in path:
            wanted = wanted[entry.key]
        np.testing.assert_allclose(leaf, wanted, atol=1e-5 * scale, err_msg=str(path))


def windows(cfg: config.Config) -> list[dict[str, float]]:
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()))
    frozen, state, result = run.frozen(), run.init(), []
    for number in range(cfg.train.steps):
        batch = sharding.to_global(random_batch(number), run.batch_sharding, ROWS)
        state = run.train_step(state, batch, *frozen)
        result.append({name: float(value) for name, value in state.window.items()})
    return result


def test_a_taught_run_is_the_same_however_the_mesh_splits_it(teacher):
    def on(mesh: tuple[int, int, int], microbatch_size: int = 0) -> list[dict[str, float]]:
        cfg = run_config(STUDENT, distillation=taught(teacher), mesh=config.MeshConfig(*mesh))
        train = dataclasses.replace(cfg.train, microbatch_size=microbatch_size)
        return windows(dataclasses.replace(cfg, train=train))

    by_rows, by_all = on((8, 1, 1)), on((2, 2, 2), microbatch_size=2)
    assert by_rows[-1]["teacher_divergence"] < by_rows[0]["teacher_divergence"]
    for ours, theirs in zip(by_rows, by_all, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_teacher_is_split_as_its_student_and_kept_in_the_dtype_it_computes_in(teacher):
    mesh = config.MeshConfig(data=2, fsdp=2, tensor=2)
    model = dataclasses.replace(STUDENT, dtype="bfloat16")
    cfg = run_config(model, distillation=taught(teacher), mesh=mesh)
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()))
    params = run.teacher.params()
    kernel = params["encoder"]["ffn"]["intermediate"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.shape == (4, 1, 32, 48)
    assert kernel.addressable_shards[0].data.shape == (4, 1, 8, 24)
    # Values of the state alone are in a checkpoint; what is frozen is no part of it.
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state)) < 3 * whole


def test_a_student_begins_as_the_layers_it_names(teacher):
    cfg = run_config(STUDENT, distillation=taught(teacher, student_layers="3,1"))
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    theirs, fresh = run.teacher.params(), run.init().params
    kept = jax.tree.map(np.asarray, fresh)
    ours = run.teacher.started(fresh, cfg)
    for ours_leaf, leaf in zip(
        jax.tree.leaves(ours["encoder"]), jax.tree.leaves(theirs["encoder"]), strict=True
    ):
        np.testing.assert_array_equal(ours_leaf, leaf[np.array([3, 1])])
    for name in ("word_embeddings", "position_embeddings"):
        np.testing.assert_array_equal(ours["embeddings"][name], theirs["embeddings"][name])
    np.testing.assert_array_equal(
        ours["masked_lm"]["dense"]["kernel"], theirs["masked_lm"]["dense"]["kernel"]
    )
    assert jax.tree.structure(ours) == jax.tree.structure(kept)


def test_a_student_that_shares_begins_as_the_first_of_its_depths(teacher):
    # Depths 0, 1 | 2 of attention; one set of feed-forward.
    model = dataclasses.replace(
        STUDENT, num_hidden_layers=3, num_hidden_groups=1, attention_groups=2, ffn_groups=1
    )
    cfg = run_config(model, distillation=taught(teacher, student_layers="2,0,3"))
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    theirs, ours = run.teacher.params(), run.teacher.started(run.init().params, cfg)
    for half, sets in (("attention", [2, 3]), ("ffn", [2])):
        np.testing.assert_array_equal(
            ours["encoder"][half]["output"]["kernel"],
            theirs["encoder"][half]["output"]["kernel"][np.array(sets)],
        )


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"vocab_size": 65}, {}, "has 64 pieces, the student model.vocab_size=65"),
        (
            {"hidden_size": 16, "embedding_size": 16},
            {},
            "hidden states of 32, .* model.hidden_size=16.*distillation.cosine_weight=0",
        ),
        ({}, {"student_layers": "0,1,2"}, "names 3 layers, .* model.num_hidden_layers=2"),
        ({}, {"student_layers": "0,4"}, "student_layers=0,4: .* has layers 0 to 3"),
    ],
)
def test_a_teacher_that_does_not_suit_is_refused_by_field(teacher, model, options, message):
    cfg = run_config(dataclasses.replace(STUDENT, **model), distillation=taught(teacher, **options))
    mesh = sharding.make_mesh(cfg, jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        distillation.on_mesh(cfg, mesh)


def test_sizes_that_cannot_start_from_the_teacher_are_all_named(teacher):
    model = dataclasses.replace(STUDENT, intermediate_size=40, max_position_embeddings=20)
    cfg = run_config(model, distillation=taught(teacher, student_layers="0,2"))
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    with pytest.raises(UserError) as error:
        run.teacher.started(run.init().params, cfg)
    assert (
        "embeddings/position_embeddings: the student's is (20, 32), the teacher has (12, 32)"
        in (str(error.value))
    )
    assert "encoder/ffn/intermediate/kernel: the student's is (2, 1, 32, 40)" in str(error.value)


# What a line may differ in between two runs: how long things took.
UNTIMED = (
    "step",
    "loss",
    "masked_lm_loss",
    "masked_lm_accuracy",
    "grad_norm",
    *objectives.TEACHER_METRICS,
)
TINY = (
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    "--config.train.steps=24",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.model.hidden_dropout_prob=0.1",
    "--config.data.max_seq_length=32",
    "--config.data.max_predictions_per_seq=5",
    "--config.optimizer.warmup_steps=5",
    "--config.log.every_steps=1",
    "--config.eval.every_steps=12",
    "--config.checkpoint.every_steps=5",
)


def rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in UNTIMED if key in line} for line in lines]


def test_an_albert_teaches_an_albert_through_the_commands_and_a_kill_changes_nothing(tmp_path):
    store = small_store.make(tmp_path)
    data, teacher = f"--config.data.path={store}", tmp_path / "teacher"
    small_store.run_here(
        "train", *TINY, data, f"--workdir={teacher}", "--config.model.num_hidden_layers=3"
    )

    def student(name: str) -> tuple[str, ...]:
        return (
            *TINY,
            data,
            f"--workdir={tmp_path / name}",
            f"--config.distillation.teacher={teacher}",
            "--config.distillation.student_layers=0,1",
            "--config.train.seed=1",
        )

    small_store.run_here("train", *student("whole"))
    process = subprocess.Popen(
        small_store.command("train", *student("killed")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(rows(tmp_path / "killed")) < 13 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    small_store.run_here("train", *student("killed"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    (last,) = [row for row in rows(tmp_path / "whole") if row["step"] == 24 and "grad_norm" in row]
    assert last["teacher_divergence"] > 0
    # Trained, a student needs no teacher.
    shutil.move(teacher, tmp_path / "away")
    small_store.run_here("evaluate", f"--workdir={tmp_path / 'whole'}", "--json=-")
    done = small_store.run_here("train", *student("orphan"), expect=1)
    assert f"{teacher} holds no run" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_tokenizer_than_the_teachers_is_refused(teacher, tmp_path):
    store = small_store.make(tmp_path, documents=20)
    shutil.copy(store / "tokenizer.model", teacher / "tokenizer.model")
    (teacher / "normalization.json").write_text("{}")
    cfg = run_config(STUDENT, distillation=taught(teacher, teacher_step=0))
    with pytest.raises(UserError, match=r"distillation.teacher=.* reads with another tokenizer"):
        distillation.resolve(cfg, "0" * 64)

"""Twenty steps of fine-tuning, ours beside PyTorch Transformers' model and PyTorch's AdamW: the
same weights, rows and order, no dropout, on real MRPC and SQuAD.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from albert_jax import config
from albert_jax.interop import initial
from albert_jax.tasks import course as course_lib
from albert_jax.tasks import finetuning
from albert_jax.tasks.task import Features, Task
from albert_jax.training import program, sharding

STEPS, BATCH, LENGTH, RATE, WARMUP = 20, 8, 48, 2e-3, 5
CONFIGS = pathlib.Path(__file__).resolve().parent.parent.parent / "configs"
CASES = {
    "mrpc": ("glue.py:mrpc", "glue", "AlbertForSequenceClassification"),
    "squad": ("squad.py:v1", "squad", "AlbertForQuestionAnswering"),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_of_twenty_steps_equal_pytorch(name, shared_data, tmp_path):
    recipe, folder, kind = CASES[name]
    theirs = random_model(kind, shared_data, tmp_path / "model")
    start = finetuning.origin(tmp_path / "model")
    changes = {
        "data.path": shared_data / folder,
        "data.max_seq_length": LENGTH,
        "data.max_predictions_per_seq": 1,
        "train.steps": STEPS,
        "train.global_batch_size": BATCH,
        "model.dtype": "float32",
        "model.classifier_dropout_prob": 0.0,
        "optimizer.learning_rate": RATE,
        "optimizer.warmup_steps": WARMUP,
        "optimizer.bias_correction": True,
        "optimizer.decay_from_warmup": True,
        "log.every_steps": 1,
        "mesh.data": 1,
    }
    if name == "squad":
        changes["task.train"], changes["task.validation"] = "train-v1.1.json", "dev-v1.1.json"
    overrides = [f"{field}={value}" for field, value in changes.items()]
    cfg, _ = finetuning.adapted(config.load(str(CONFIGS / recipe), overrides), start)
    task = course_lib.read(cfg, start.tokenizer)
    if name == "squad":
        # Theirs lets an answer begin in padding; windows without any leave no such difference.
        task = dataclasses.replace(task, train=full_rows(task.train))
    cfg = course_lib.resolve(cfg, task, start.tokenizer)
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    ours = our_losses(run, start, task)
    expected = their_losses(theirs, run, task, start)
    worst = np.max(np.abs(ours - expected) / expected)
    print(f"{name}: {ours[0]:.4f} to {ours[-1]:.4f}, max relative difference {worst:.1e}")
    assert worst < 1e-4
    assert len(set(np.round(ours, 6))) == STEPS


def random_model(kind: str, shared_data: pathlib.Path, folder: pathlib.Path) -> Any:
    torch.manual_seed(1)
    cfg = transformers.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    model = getattr(transformers, kind)(cfg)
    model.save_pretrained(folder)
    shutil.copy(shared_data / "tokenizer" / "spiece.model", folder)
    return model.train()


def full_rows(features: Features) -> Features:
    lengths = np.diff(features.offsets)
    kept = np.flatnonzero(lengths == LENGTH)[:400]
    places = (features.offsets[kept][:, None] + np.arange(LENGTH)).reshape(-1)
    return dataclasses.replace(
        features,
        ids=features.ids[places],
        types=features.types[places],
        offsets=np.arange(len(kept) + 1, dtype=np.int64) * LENGTH,
        targets={key: values[kept] for key, values in features.targets.items()},
        token_targets={key: values[places] for key, values in features.token_targets.items()},
    )


def batches(run: program.Program, task: Task, start: finetuning.Origin) -> list[dict[str, Any]]:
    rows = course_lib.Course(run, task, start.tokenizer).builder(run.config.stages[0])
    return [rows.rows(np.arange(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)]


def our_losses(run: program.Program, start: finetuning.Origin, task: Task) -> np.ndarray:
    state = initial.started(run.init(), start.model, slots=False)
    losses = []
    for batch in batches(run, task, start):
        rows = sharding.to_global(batch, run.batch_sharding, BATCH)
        state = run.train_step(state, rows, *run.frozen())
        losses.append(float(state.window["loss"]))
    return np.asarray(losses)


def their_losses(
    model: Any, run: program.Program, task: Task, start: finetuning.Origin
) -> np.ndarray:
    plain = ("bias", "LayerNorm.weight", "layer_norm.weight")
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith(plain)], "weight_decay": 0.01},
        {"params": [p for n, p in named if n.endswith(plain)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=1e-6)
    losses = []
    for number, batch in enumerate(batches(run, task, start), start=1):
        for group in optimizer.param_groups:
            up, down = number / WARMUP, (STEPS - number) / (STEPS - WARMUP)
            group["lr"] = RATE * (up if number < WARMUP else down)
        names = ("input_ids", "token_type_ids", "attention_mask", "labels")
        names += ("start_positions", "end_positions")
        given = {key: torch.as_tensor(batch[key]).long() for key in names if key in batch}
        loss = model(**given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.asarray(losses)

"""Packing through the commands: what is printed, whole runs, resume, and that evaluation is not
packed.
"""

import dataclasses
import json
import pathlib
import random
import re
import shutil

import pytest
import small_store

from albert_jax import config
from albert_jax.data import store as store_lib
from albert_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PACKED = "--config.data.packing=true"
CONFIG = (
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    "--config.train.steps=6",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.model.hidden_dropout_prob=0.1",
    "--config.model.max_position_embeddings=128",
    "--config.data.max_seq_length=128",
    "--config.data.max_predictions_per_seq=20",
    "--config.optimizer.warmup_steps=3",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=4",
    "--config.eval.steps=2",
)
PADDING = r"padding: (.+)% of the places \((.+) pairs a row\), (.+)% without data\.packing"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Short documents: one to three sentences of some ten pieces."""
    folder = tmp_path_factory.mktemp("store")
    rng = random.Random(0)
    documents = [small_store.sentences(n, rng.randint(1, 3)) for n in range(900)]
    text = "\n\n".join("\n".join(lines) for lines in documents)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    small_store.run_here(
        "prepare",
        f"--input={folder / 'text.txt'}",
        f"--output={folder / 'store'}",
        "--train_tokenizer",
        "--vocab_size=60",
        "--validation_fraction=0.2",
        "--workers=1",
    )
    return folder / "store"


def lines(workdir: pathlib.Path) -> list[dict]:
    kept = ("step", "split", "loss", "masked_lm_loss", "sentence_order_loss", "grad_norm")
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in kept if name in row} for row in rows]


def test_a_packed_run_resumes_to_the_bit_and_is_evaluated_unpacked(store, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = (*CONFIG, PACKED, f"--config.data.path={store}")
    done = small_store.run_here("train", *arguments, f"--workdir={whole}")
    found = re.search(PADDING, done.stdout)
    assert found, done.stdout
    packed, pairs, alone = map(float, found.groups())
    print(found.group())
    assert packed < 15 < 50 < alone
    assert pairs > 1.5
    assert (1 - packed / 100) / (1 - alone / 100) == pytest.approx(pairs, rel=0.05)

    # As if killed after step 4: the state of that step, and lines beyond it that are made again.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    again = small_store.run_here("train", *arguments, f"--workdir={resumed}")
    assert "goes on after step 4" in again.stderr
    assert lines(resumed) == lines(whole)
    assert [row["step"] for row in lines(whole) if "split" not in row] == list(range(1, 7))

    # Every held-out pair in a row of its own: these documents make one each.
    figures = tmp_path / "figures.json"
    small_store.run_here("evaluate", f"--workdir={whole}", f"--json={figures}")
    held_out = store_lib.open_store(store).split("validation")
    documents = sum(len(shard.documents) - 1 for shard in held_out)
    assert json.loads(figures.read_text())["examples"] == documents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": config.ModelConfig(sentence_objective="none")},
            "model.sentence_objective=none: its rows are full of sentences anyway; set it to False",
        ),
        (
            {"task": config.TaskConfig(name="mrpc")},
            "task.name=mrpc: a fine-tuning's rows are batched by length; set it to False",
        ),
    ],
)
def test_packing_is_refused_where_it_has_no_meaning(changes: dict, message: str):
    with pytest.raises(UserError, match=re.escape(f"data.packing=True does not go with {message}")):
        dataclasses.replace(config.Config(data=config.DataConfig(packing=True)), **changes)
    with pytest.raises(UserError, match=r"data\.max_pairs_per_seq=0 is too small"):
        config.DataConfig(packing=True, max_pairs_per_seq=0)

"""Runs over a curriculum and over a mixture of stores: the batches they should see, however often
they are broken off.
"""

import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
import small_store

from albert_jax import config
from albert_jax.data import corpus, mixture
from albert_jax.errors import UserError
from albert_jax.training import hosts, loop, pretraining, program, sharding

pytestmark = pytest.mark.usefixtures("compiles_fast")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TINY = str(ROOT / "configs" / "tiny.py")
SMALL = [
    "train.steps=10",
    "train.global_batch_size=24",
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "data.max_seq_length=32",
    "data.max_predictions_per_seq=5",
    "optimizer.warmup_steps=3",
    "log.every_steps=1",
    "eval.every_steps=4",
    "eval.steps=0",
    "checkpoint.every_steps=4",
    "checkpoint.keep=9",
]
# Of lengths 16, 32 and 16 again, the last at another masking rate.
SCHEDULE = "0:16:32:0.2,6:32:16,8:16:32"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def second(store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Another store of the same tokenizer, of words in no order."""
    folder = tmp_path_factory.mktemp("second")
    rng = random.Random(1)
    words = ["the", "cat", "dog", "bird", "sees", "likes", "river", "house"]
    text = "\n\n".join(
        "\n".join(f"{' '.join(rng.choices(words, k=7))}." for _ in range(20)) for _ in range(25)
    )
    (folder / "text.txt").write_text(text, encoding="utf-8")
    prepare(folder, f"--tokenizer={store / 'tokenizer.model'}")
    return folder / "store"


def prepare(folder: pathlib.Path, *arguments: str) -> None:
    small_store.run_here(
        "prepare", f"--input={folder / 'text.txt'}", f"--output={folder / 'store'}",
        "--validation_fraction=0.2", "--workers=1", *arguments,
    )  # fmt: skip


def prepared(*overrides: str) -> tuple[program.Program, corpus.Corpus]:
    cfg = config.load(TINY, [*SMALL, *overrides])
    data = corpus.open_corpus(cfg.data)
    cfg = pretraining.resolve(cfg, data)
    return program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:2])), data


def trained(run: program.Program, data: corpus.Corpus, workdir: pathlib.Path) -> list[dict]:
    assert loop.train(run, pretraining.Course(run, data), workdir, hosts.Hosts())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = {"step", "split", "loss", "grad_norm", "masked_lm_loss", "max_seq_length"}
    kept |= {"global_batch_size", "masked_words", "examples"}
    return [{name: value for name, value in row.items() if name in kept} for row in rows]


def of_training(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows if "split" not in row]


def test_a_curriculum_is_what_it_says_and_goes_on_over_its_boundaries(store, tmp_path, capfd):
    run, data = prepared(f"data.path={store}", f"data.schedule={SCHEDULE}")
    rows = trained(run, data, tmp_path / "run")
    printed = capfd.readouterr().err
    # One program a shape, though there are three stages.
    assert printed.count("compiled for ") == 2
    assert "compiled for 32 sequences of 16" in printed
    assert "compiled for 16 sequences of 32" in printed
    assert of_training(rows, "max_seq_length") == [16] * 6 + [32] * 2 + [16] * 2
    assert of_training(rows, "global_batch_size") == [32] * 6 + [16] * 2 + [32] * 2

    # By hand, out of three runs that know of no schedule. Slots: 5 of 32 at 15 % are 3.3 of 16 at
    # 20 %.
    stages = {
        (16, 32, 0.2, 4): range(6),
        (32, 16, 0.15, 5): range(6, 8),
        (16, 32, 0.15, 4): range(8, 10),
    }
    state, begin, losses = None, 0, []
    for (length, size, masked, slots), steps in stages.items():
        of_stage, _ = prepared(
            f"data.path={store}",
            f"data.max_seq_length={length}",
            f"train.global_batch_size={size}",
            f"data.masked_lm_prob={masked}",
            f"data.max_predictions_per_seq={slots}",
        )
        state = state or of_stage.init()
        builder = pretraining.example_builder(of_stage.config, data, "train")
        for _ in steps:
            batch = builder.rows(np.arange(begin, begin + size))
            on_device = sharding.to_global(batch, of_stage.batch_sharding, size)
            state = of_stage.train_step(state, on_device, *of_stage.frozen())
            losses.append(float(state.window["loss"]))
            begin += size
    assert of_training(rows, "loss") == pytest.approx(losses, rel=1e-6)

    # Validation is the same whatever the stage: all of the split, at full length and 15 %.
    validation = [row for row in rows if "split" in row]
    fixed, _ = prepared(f"data.path={store}")
    whole = pretraining.example_builder(fixed.config, data, "validation")
    masked = whole.rows(np.arange(whole.examples_per_epoch))["masked_lm_weights"].sum()
    assert [row["step"] for row in validation] == [4, 8, 10]
    assert {row["masked_words"] for row in validation} == {masked}
    assert {row["examples"] for row in validation} == {whole.examples_per_epoch}

    # As if killed in the first stage: over both boundaries again.
    for number in (8, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number))
    assert trained(run, data, tmp_path / "run") == rows


def test_a_batch_of_the_schedule_must_split_over_the_devices(store):
    with pytest.raises(UserError, match=r"data\.schedule from step 6 on: the batch=7 does not"):
        prepared(f"data.path={store}", "data.schedule=0:16:32,6:32:7")


def test_a_mixture_is_trained_on_and_each_store_is_evaluated(store, second, tmp_path):
    both = (f"data.path={store},{second}", "data.weights=0.75,0.25")
    run, data = prepared(*both)
    assert isinstance(data, mixture.Stores)
    rows = trained(run, data, tmp_path / "run")
    builders = [pretraining.example_builder(run.config, each, "train") for each in data.stores]
    whole = pretraining.example_builder(run.config, data, "train")
    batch = whole.rows(np.arange(1000))
    places, numbers = mixture.Mixture(builders, data.weights, 0).places(np.arange(1000))
    assert np.bincount(places).tolist() == [750, 250]
    for number, builder in enumerate(builders):
        mine = places == number
        assert sorted(numbers[mine]) == list(range(mine.sum()))
        for name, values in builder.rows(numbers[mine]).items():
            np.testing.assert_array_equal(batch[name][mine], values)

    last = {row["split"]: row for row in rows if row.get("split") and row["step"] == 10}
    first, other = (last[f"validation/{name}"] for name in data.names)
    assert last["validation"]["examples"] == first["examples"] + other["examples"]
    mixed = 0.75 * first["masked_lm_loss"] + 0.25 * other["masked_lm_loss"]
    assert last["validation"]["masked_lm_loss"] == pytest.approx(mixed, rel=1e-9)
    only = pretraining.example_builder(run.config, data.stores[0], "validation")
    assert first["examples"] == only.examples_per_epoch

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert trained(run, data, tmp_path / "run") == rows


def test_a_mixture_is_known_by_its_stores_and_weights(store, second, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(second, moved)
    prints = {
        corpus.open_corpus(config.DataConfig(path=path, weights=weights)).fingerprint
        for path, weights in [
            (f"{store}, {second}", "0.7,0.3"),
            (f"{store},{moved}", "70,30"),
        ]
    }
    assert len(prints) == 1
    for path, weights in [
        (f"{store},{second}", "0.6,0.4"),
        (f"{second},{store}", "0.7,0.3"),
        (f"{store},{second}", ""),
        (str(store), ""),
    ]:
        data = corpus.open_corpus(config.DataConfig(path=path, weights=weights))
        assert data.fingerprint not in prints


def test_stores_that_do_not_go_together_are_refused_by_name(store, second, tmp_path):
    manifest = json.loads((second / "manifest.json").read_text())
    for name, part, value in (
        ("other", "tokenizer", {**manifest["tokenizer"], "sha256": "0123456789abcdef"}),
        ("cased", "normalization", {**manifest["normalization"], "lower_case": "no"}),
    ):
        shutil.copytree(second, tmp_path / name)
        (tmp_path / name / "manifest.json").write_text(json.dumps({**manifest, part: value}))
    other, cased = tmp_path / "other", tmp_path / "cased"
    with pytest.raises(UserError) as caught:
        corpus.open_corpus(config.DataConfig(path=f"{store},{other}"))
    assert f"{store} and {other} were prepared with different tokenizers" in str(caught.value)
    with pytest.raises(UserError, match=r"different normalisation \(lower_case\)"):
        corpus.open_corpus(config.DataConfig(path=f"{store},{cased}"))
    with pytest.raises(UserError, match="twice, or a copy of it"):
        corpus.open_corpus(config.DataConfig(path=f"{store},{store}"))
    with pytest.raises(UserError, match=r"data\.weights=1,2 is for several stores"):
        corpus.open_corpus(config.DataConfig(path=str(store), weights="1,2"))


def test_the_commands_take_a_mixture_a_schedule_and_shards(store, second, tmp_path):
    overrides = [
        *SMALL, "train.steps=4", f"data.path={store},{second}", "data.schedule=0:16:16,2:32:8",
        "data.shuffle=shard", "data.shuffle_shards=1",
    ]  # fmt: skip
    workdir, out = tmp_path / "run", tmp_path / "figures.json"
    done = small_store.run_here(
        "train", f"--config={TINY}", f"--workdir={workdir}",
        *(f"--config.{override}" for override in overrides),
    )  # fmt: skip
    assert "from step 2 on: 8 sequences of 32" in done.stdout
    done = small_store.run_here("evaluate", f"--workdir={workdir}", f"--json={out}")
    figures = json.loads(out.read_text())
    names = corpus.open_corpus(config.DataConfig(path=f"{store},{second}")).names
    assert set(figures["stores"]) == set(names)
    for name in names:
        assert f"  {name}: masked words" in done.stdout
    assert figures["examples"] == sum(part["examples"] for part in figures["stores"].values())

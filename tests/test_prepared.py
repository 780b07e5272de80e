"""`prepare --show` and `prepare --export`, as they are typed."""

import json
import pathlib
import re

import numpy as np
import pytest
import small_store
from matplotlib import image

from albert_jax import config, prepare
from albert_jax.data import corpus, examples, google_examples, store, viewing
from albert_jax.errors import UserError
from albert_jax.training import pretraining

pytestmark = pytest.mark.usefixtures("compiles_fast")
SHAPE = ["--config.data.max_seq_length=64", "--config.data.max_predictions_per_seq=10"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("prepared"), documents=20)


def test_a_look_at_a_store(
    made: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    prepare.main([f"--show={made}", "--examples=4", "--first=7", *SHAPE])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    headings = re.findall(r"^example (\d+), label ([01]): .*\((\d+) tokens, (\d+)", printed, re.M)
    batch, _ = rows_of(made, range(7, 11))
    assert [tuple(map(int, heading)) for heading in headings] == [
        (number, label, length, masked)
        for number, label, length, masked in zip(
            range(7, 11),
            batch["sentence_order_labels"],
            batch["attention_mask"].sum(1),
            batch["masked_lm_weights"].sum(1),
            strict=True,
        )
    ]
    assert "statistics of" in printed
    folder = tmp_path / "store_examples"
    pictures = sorted(path.name for path in folder.iterdir())
    assert pictures == sorted(
        f"{name}.png"
        for name in ("lengths", "masked_share", "ngram_lengths", "piece_frequencies", "overview")
    )
    for picture in folder.iterdir():
        pixels = image.imread(picture)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.05  # something is drawn


def rows_of(made: pathlib.Path, numbers: range) -> tuple[dict[str, np.ndarray], store.Store]:
    data = store.open_store(made)
    cfg = config.load_default([flag.removeprefix("--config.") for flag in SHAPE])
    return pretraining.example_builder(cfg, data, "train").rows(np.array(numbers)), data


def test_a_person_can_put_the_truth_in_place_of_the_masks(made: pathlib.Path):
    batch, data = rows_of(made, range(40))
    spoken = data.tokenizer()
    for row in range(40):
        plain = viewing.example(batch, row, spoken, "", colours=False, width=10_000)
        coloured = viewing.example(batch, row, spoken, "", colours=True, width=10_000)
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
        assert "\x1b[36m" in coloured  # segment A
        _, *segments, answers = plain.split("\n")
        text = " ".join(segment[4:] for segment in segments)
        for pair in filter(None, answers.removeprefix(" =  ").split("; ")):
            seen, truth = pair.rstrip(";").split(" = ")
            text = text.replace(seen, truth.replace("▁", ""), 1)
        there = text_before_masking(batch, row, spoken)
        assert re.sub(r"\s", "", text) == re.sub(r"\s", "", there)
        narrow = viewing.example(batch, row, spoken, "", colours=False, width=60).split("\n")
        assert max(map(len, narrow[1:])) <= 60
        assert "".join(narrow[1:]).split() != []


def text_before_masking(batch: dict[str, np.ndarray], row: int, spoken) -> str:
    ids = batch["input_ids"][row].copy()
    real = batch["masked_lm_weights"][row] > 0
    ids[batch["masked_lm_positions"][row][real]] = batch["masked_lm_ids"][row][real]
    return spoken.decode(ids[batch["attention_mask"][row] == 1].tolist())


def test_a_store_is_exported_and_looked_at(
    made: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    export = ["--export=google_tfrecord", f"--input={made}", f"--output={out}", *SHAPE]
    prepare.main([*export, "--epochs=3"])
    printed = capsys.readouterr().out
    # What it says to type next is right.
    flags = re.search(r"albert_jax.train (.*)", printed)[1].replace("'", "").split()
    overrides = [flag.removeprefix("--config.") for flag in flags if "--config." in flag]
    cfg = config.load_default(overrides)
    data = google_examples.open_examples(cfg.data)
    builder = pretraining.example_builder(cfg, data, "train")
    assert isinstance(builder, google_examples.RecordBuilder)
    of_store = store.open_store(made)
    wanted = pretraining.example_builder(cfg, of_store, "train")
    assert isinstance(wanted, examples.ExampleBuilder)
    N = builder.examples_per_epoch
    assert 3 * wanted.examples_per_epoch == N
    found = builder.rows(np.arange(N))
    for name, array in wanted.rows(builder.record_numbers(np.arange(N))).items():
        np.testing.assert_array_equal(found[name], array)
    assert abs(data.unigram_loss - of_store.unigram_loss) < 0.1
    with pytest.raises(UserError, match="is there already"):
        prepare.main(export)

    prepare.main([f"--show={out}/train-*", "--examples=1", f"--output={tmp_path / 'look'}"])
    assert f"{N:,}" not in capsys.readouterr().out  # some are held out
    assert (tmp_path / "look" / "overview.png").exists()
    store_format = [override for override in overrides if "format" not in override]
    with pytest.raises(UserError, match=r"set data\.format=google_tfrecord"):
        corpus.open_corpus(config.load_default(store_format).data)


def test_a_run_learns_from_exported_examples_and_from_no_others(
    made: pathlib.Path, tmp_path: pathlib.Path
):
    out, workdir = tmp_path / "out", tmp_path / "run"
    prepare.main(["--export=google_tfrecord", f"--input={made}", f"--output={out}", *SHAPE])
    train = [
        f"--config={pathlib.Path(__file__).parent.parent / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        *SHAPE,
        "--config.model.hidden_size=32",
        "--config.model.intermediate_size=48",
        "--config.train.steps=6",
        "--config.optimizer.warmup_steps=2",
        "--config.log.every_steps=1",
        "--config.eval.every_steps=0",
        "--config.data.format=google_tfrecord",
    ]
    small_store.run_here("train", *train, f"--config.data.path={out}/train-*")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "split" not in line] == list(range(1, 7))
    # The run knows its records by what is in them, and refuses others.
    other = f"--config.data.path={out}/validation-*", f"--config.data.validation_path={out}/train-*"
    refused = small_store.run_here("train", *train, *other, expect=1)
    assert "data.store_fingerprint" in refused.stderr

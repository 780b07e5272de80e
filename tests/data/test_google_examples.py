"""What Google's script wrote is read as it is, in a run's order, with its masks or new ones; and a
store written out for it reads as the store does.
"""

import dataclasses
import json
import os
import pathlib
import random
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from albert_jax.config import DataConfig
from albert_jax.data import (
    corpus,
    examples,
    google_examples,
    google_export,
    pipeline,
    statistics,
    store,
    tokenizer,
)
from albert_jax.errors import UserError
from benchmarks import examples_vs_google
from tests.data import slow_examples as slow

L, P = 128, 20
LENGTHS = {"input_ids": L, "input_mask": L, "segment_ids": L, "token_boundary": L}
SLOTS = {"masked_lm_positions": P, "masked_lm_ids": P}
OURS = {
    "input_ids": "input_ids",
    "token_type_ids": "segment_ids",
    "attention_mask": "input_mask",
    "masked_lm_positions": "masked_lm_positions",
    "masked_lm_ids": "masked_lm_ids",
    "masked_lm_weights": "masked_lm_weights",
    "sentence_order_labels": "next_sentence_labels",
}


def parsed(paths: Sequence[pathlib.Path], length: int = L, slots: int = P) -> dict[str, np.ndarray]:
    """All records as google-research/albert's `run_pretraining.py` parses them (`input_fn`)."""
    shapes = {name: length for name in LENGTHS} | {name: slots for name in SLOTS}
    features = {name: tf.io.FixedLenFeature([n], tf.int64) for name, n in shapes.items()}
    features["masked_lm_weights"] = tf.io.FixedLenFeature([slots], tf.float32)
    features["next_sentence_labels"] = tf.io.FixedLenFeature([1], tf.int64)
    records = [
        tf.io.parse_single_example(record, features)
        for path in paths
        for record in tf.data.TFRecordDataset(str(path))
    ]
    return {name: np.stack([record[name].numpy() for record in records]) for name in features}


def options(**changed: object) -> examples.ExampleOptions:
    usual = examples.ExampleOptions(L, P, 0.15, 3, 0.1, 5, "sop", "split")
    return dataclasses.replace(usual, **changed)


@pytest.fixture(scope="module")
def reference(shared_data: pathlib.Path) -> pathlib.Path:
    return shared_data / "reference" / "google_examples"


@pytest.fixture(scope="module")
def released(reference: pathlib.Path, shared_data: pathlib.Path) -> DataConfig:
    return DataConfig(
        path=str(reference / "sop_128.tfrecord"),
        format="google_tfrecord",
        max_seq_length=L,
        max_predictions_per_seq=P,
        tokenizer=str(shared_data / "tokenizer" / "spiece.model"),
    )


@pytest.fixture(scope="module")
def rows(reference: pathlib.Path) -> dict[str, np.ndarray]:
    return parsed([reference / "sop_128.tfrecord"])


def order(numbers_N: np.ndarray, seed: int, examples: range) -> list[tuple[int, int]]:
    """Epoch and record of each example, by the slow permutation."""
    N = len(numbers_N)
    places = [divmod(example, N) for example in examples]
    return [
        (epoch, int(numbers_N[slow.permuted(slot, N, slow.key(seed, slow.ORDER, epoch, 0))]))
        for epoch, slot in places
    ]


def test_stored_masks_are_read_as_they_are(released: DataConfig, rows: dict[str, np.ndarray]):
    data = google_examples.open_examples(released)
    numbers = data.numbers["train"]
    N = len(numbers)
    builder = data.builder("train", options(), "stored")
    assert builder.examples_per_epoch == N
    wanted = [record for _, record in order(numbers, 5, range(N - 9, N + 40))]
    batch = builder.rows(np.arange(N - 9, N + 40))
    assert list(batch) == list(OURS)
    for ours, theirs in OURS.items():
        assert batch[ours].dtype == (np.float32 if ours == "masked_lm_weights" else np.int32)
        np.testing.assert_array_equal(batch[ours], rows[theirs][wanted].reshape(batch[ours].shape))
    assert sorted(builder.record_numbers(np.arange(N, 2 * N))) == numbers.tolist()


@pytest.mark.parametrize("whole_words", [True, False])
def test_new_masks_are_those_of_the_rules_with_the_files_words(
    released: DataConfig, rows: dict[str, np.ndarray], whole_words: bool
):
    chosen = options(max_predictions_per_seq=11, ngram=4, whole_word_masking=whole_words)
    data = google_examples.open_examples(released)
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    builder = data.builder("train", chosen, "new")
    numbers = data.numbers["train"]
    few = range(len(numbers) - 60, len(numbers) + 60)
    batch = builder.rows(np.array(few))
    for row, (epoch, record) in enumerate(order(numbers, 5, few)):
        ids = rows["input_ids"][record][: rows["input_mask"][record].sum()].tolist()
        for place, token, weight in zip(
            *(rows[name][record] for name in (*SLOTS, "masked_lm_weights")), strict=True
        ):
            if weight:
                ids[place] = token
        stream = slow.SplitMix64(slow.key(5, slow.EXAMPLE, epoch, record))
        positions, targets = slow.mask(ids, vocabulary, chosen, stream)
        assert batch["input_ids"][row].tolist() == slow.padded(ids, L)
        assert batch["masked_lm_positions"][row].tolist() == slow.padded(positions, 11)
        assert batch["masked_lm_ids"][row].tolist() == slow.padded(targets, 11)
        assert batch["masked_lm_weights"][row].sum() == len(positions)


def test_words_begin_where_token_boundary_says(released: DataConfig, tmp_path: pathlib.Path):
    """Against a vocabulary in which every place has a piece of its own that says the same."""
    rng = np.random.default_rng(2)
    cls, sep, V = 2, 3, 30_000
    boundaries, batch = [], examples.empty_batch(40, L, P)
    for array in batch.values():
        array[:] = 0
    for row, length in enumerate(rng.integers(20, L + 1, 40)):
        ids = rng.permutation(np.arange(5, V))[:length]
        ids[[0, length // 2, -1]] = cls, sep, sep
        batch["input_ids"][row, :length] = ids
        batch["attention_mask"][row, :length] = 1
        batch["token_type_ids"][row, length // 2 + 1 : length] = 1
        boundaries.append(rng.random(V) < 0.4)
    written = [
        record
        for row, starts in enumerate(boundaries)
        for record in google_export.records(
            {name: array[row : row + 1] for name, array in batch.items()}, starts
        )
    ]
    path = write(tmp_path / "some.tfrecord", written)
    config = dataclasses.replace(released, path=str(path), validation_path=str(path))
    data = google_examples.open_examples(config)
    builder = data.builder("train", options(), "new")
    made = builder.rows(np.arange(40))
    usual = examples.Vocabulary.of(data.tokenizer())
    for row, (epoch, record) in enumerate(order(np.arange(40), 5, range(40))):
        ids = batch["input_ids"][record][: batch["attention_mask"][record].sum()].tolist()
        words = dataclasses.replace(usual, starts_word=boundaries[record])
        stream = slow.SplitMix64(slow.key(5, slow.EXAMPLE, epoch, record))
        positions, _ = slow.mask(ids, words, options(), stream)
        assert made["input_ids"][row].tolist() == slow.padded(ids, L)
        assert made["masked_lm_positions"][row].tolist() == slow.padded(positions, P)


@pytest.mark.parametrize("masks", ["stored", "new"])
def test_hosts_and_restarts_see_the_same_batches(released: DataConfig, masks: str):
    builder = google_examples.open_examples(released).builder("train", options(), masks)
    whole = [builder.rows(np.arange(12 * step, 12 * step + 12)) for step in range(6)]
    parts = [
        list(
            pipeline.training_batches(
                [pipeline.Stage(builder, 12, [(host * 4, host * 4 + 4)])], 2, 6
            )
        )
        for host in range(3)
    ]
    for step, hosts in enumerate(zip(*parts, strict=True), start=2):
        for name in whole[step]:
            joined = np.concatenate([batch[name] for batch in hosts])
            np.testing.assert_array_equal(joined, whole[step][name])
    padded = builder.rows(np.array([-1, 3, -1]))
    for name, array in padded.items():
        assert not array[[0, 2]].any()
        np.testing.assert_array_equal(array[1], whole[0][name][3])


def test_held_out_records_do_not_depend_on_the_files(
    released: DataConfig, reference: pathlib.Path, tmp_path: pathlib.Path
):
    records = [r.numpy() for r in tf.data.TFRecordDataset(str(reference / "sop_128.tfrecord"))]
    for part in range(3):
        write(tmp_path / f"part-{part}.tfrecord", records[part::3])
    whole = google_examples.open_examples(released)
    parts = google_examples.open_examples(dataclasses.replace(released, path=str(tmp_path)))

    def held(data: google_examples.GoogleExamples, split: str) -> set[bytes]:
        return {data.records[split].read(int(number)) for number in data.numbers[split]}

    assert held(parts, "validation") == held(whole, "validation")
    assert not held(whole, "validation") & held(whole, "train")
    assert held(whole, "validation") | held(whole, "train") == set(records)
    assert 5 <= len(whole.numbers["validation"]) <= 35
    # The same records in another order are another run's; elsewhere and called otherwise, not.
    assert parts.fingerprint != whole.fingerprint
    (tmp_path / "moved").mkdir()
    for part in range(3):
        (tmp_path / f"part-{part}.tfrecord").rename(tmp_path / "moved" / f"{part}.tfrecord-00000")
    pattern = str(tmp_path / "moved" / "*")
    moved = google_examples.open_examples(dataclasses.replace(released, path=pattern))
    assert moved.fingerprint == parts.fingerprint
    write(tmp_path / "moved" / "1.tfrecord-00000", [records[0], *records[1::3][1:]])
    changed = google_examples.open_examples(dataclasses.replace(released, path=pattern))
    assert changed.fingerprint != parts.fingerprint


def write(path: pathlib.Path, records: Sequence[bytes]) -> pathlib.Path:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def test_what_does_not_fit_is_refused(
    released: DataConfig, reference: pathlib.Path, tmp_path: pathlib.Path
):
    def refused(message: str, **changed: object) -> None:
        config = dataclasses.replace(released, **changed)
        masks = config.masks
        with pytest.raises(UserError, match=message):
            corpus.open_corpus(config).builder("train", options(), masks).rows(np.arange(3))

    refused("max_seq_length=512, but .* 128 pieces long. Set it to 128", max_seq_length=512)
    refused("=77, .* have 20 masked slots.*data.masks=new", max_predictions_per_seq=77)
    refused("no such file", path="nowhere*.tfrecord")
    refused("folder without any", path=str(tmp_path))
    refused("data.tokenizer is empty, .* there is none", tokenizer="")
    refused("set data.format=google_tfrecord", format="store")
    first = next(iter(tf.data.TFRecordDataset(str(reference / "sop_128.tfrecord")))).numpy()
    sound = tf.train.Example.FromString(first).features.feature

    def changed(name: str, values: list[int] | None) -> str:
        example = tf.train.Example.FromString(first)
        del example.features.feature[name]
        if values is not None:
            example.features.feature[name].int64_list.value.extend(values)
        return str(write(tmp_path / "odd.tfrecord", [first, example.SerializeToString()]))

    ids = list(sound["input_ids"].int64_list.value)
    held = {"validation_path": str(reference / "sop_128.tfrecord")}
    for name, values, message in (
        ("token_boundary", None, "has no feature token_boundary.*data.masks=stored"),
        ("segment_ids", [0] * 64, "has 64 values of segment_ids, where the first record has 128"),
        ("input_ids", [*ids[:5], 30_000, *ids[6:]], "an id that is none of the tokenizer's 30000"),
        ("input_ids", [101, *ids[1:]], r"does not begin with \[CLS\]"),
        ("input_mask", [1, 0] * 64, "input_mask that is not ones, then zeros"),
        ("masked_lm_positions", [500] * P, "masked position outside the text"),
        ("next_sentence_labels", [7], "label that is neither 0 nor 1"),
        ("masked_lm_weights", [1] * P, "masked_lm_weights as int64_list, not float_list"),
    ):
        path = changed(name, values)
        refused(f"record at byte 917.* {message}", path=path, masks="new", **held)
    refused("is no tf.train.Example", path=str(write(tmp_path / "x.tfrecord", [b"\xff\xff"])))


def test_figures_of_the_files_are_those_stated_for_them(
    reference: pathlib.Path, released: DataConfig
):
    wanted = json_figures(reference)
    for name, objective in (("sop_128", "sop"), ("nsp_128", "nsp")):
        path = str(reference / f"{name}.tfrecord")
        config = dataclasses.replace(released, path=path, validation_path=path)
        data = google_examples.open_examples(config)
        builder = data.builder("train", options(sentence_objective=objective), "stored")
        batch = builder.rows(np.arange(builder.examples_per_epoch))
        found = statistics.of([batch], examples.Vocabulary.of(data.tokenizer()), 0.15)
        figures = {"examples": found.examples, **found.figures()}
        for figure, value in wanted[name].items():
            assert abs(figures[figure] - value) <= 5e-5 + 1e-9, (name, figure)


def json_figures(reference: pathlib.Path) -> dict[str, dict[str, float]]:
    theirs = json.loads((reference / "statistics.json").read_text())
    return {name: examples_vs_google.named(figures, 1) for name, figures in theirs.items()}


def test_our_examples_are_like_the_released_scripts(
    reference: pathlib.Path, released: DataConfig, capsys: pytest.CaptureFixture[str]
):
    spoken = tokenizer.Tokenizer.load(released.tokenizer, tokenizer.Normalization())
    rows = examples_vs_google.compare(reference, spoken)
    with capsys.disabled():
        if os.environ.get("ALBERT_JAX_PRINT"):
            examples_vs_google.print_table(rows)
    assert len(rows) >= 60
    far = [row for row in rows if row.deviation > 4 and row.figure not in examples_vs_google.NAMED]
    assert not far


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> store.Store:
    """Two splits of made-up words, in two shards each."""
    folder = tmp_path_factory.mktemp("small") / "store"
    rng = random.Random(1)
    words = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aeiou" for c in "lmnr" for d in "aeo"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 14))) + "." for _ in range(500)]
    folder.mkdir()
    tokenizer.train(texts, folder / "tokenizer.model", 90, tokenizer.Normalization())
    spoken = tokenizer.Tokenizer.load(folder / "tokenizer.model", tokenizer.Normalization())
    splits = {}
    for split in store.SPLITS:
        shards = []
        for number in range(2):
            with store.ShardWriter(folder / split, f"{number:05d}-of-00002", np.uint16) as writer:
                for _ in range(6):
                    ids_T, offsets = spoken.encode_batch(rng.sample(texts, rng.randint(1, 25)))
                    writer.append(ids_T, np.diff(offsets), np.array([len(offsets) - 1]))
            shards.append(writer.record)
        splits[split] = {"shards": shards, "tokens": sum(shard["tokens"] for shard in shards)}
    manifest = {
        "format_version": store.FORMAT_VERSION,
        "tokenizer": store.tokenizer_record(spoken),
        "token_dtype": "uint16",
        "normalization": spoken.normalization.record(),
        "unigram_loss": 3.25,
        "splits": splits,
    }
    store.write_manifest(folder, manifest)
    return store.open_store(folder)


@pytest.mark.parametrize("objective", ["sop", "nsp", "none"])
def test_a_store_written_out_reads_as_the_store(
    objective: str, small_store: store.Store, tmp_path: pathlib.Path, monkeypatch
):
    monkeypatch.setattr(google_export, "_A_FILE", 30)
    spoken = small_store.tokenizer()
    chosen = options(max_seq_length=40, max_predictions_per_seq=7, sentence_objective=objective)
    builders = {
        split: examples.ExampleBuilder(
            small_store.split(split), examples.Vocabulary.of(spoken), chosen
        )
        for split in store.SPLITS
    }
    splits = [
        google_export.Split("train", builders["train"], 2),
        google_export.Split("validation", builders["validation"], 1),
    ]
    out = tmp_path / "out"
    google_export.export(splits, spoken, out)
    train, held_out = (sorted(out.glob(f"{split}-*")) for split in store.SPLITS)
    assert len(train) > 2
    config = DataConfig(
        path=str(out / "train-*"),
        validation_path=str(out / "validation-*"),
        format="google_tfrecord",
        max_seq_length=40,
        max_predictions_per_seq=7,
    )
    data = google_examples.open_examples(config)
    assert data.tokenizer().sha256 == spoken.sha256
    for split, epochs in (("train", 2), ("validation", 1)):
        reader, builder = data.builder(split, chosen, "stored"), builders[split]
        assert reader.examples_per_epoch == epochs * builder.examples_per_epoch
        numbers = np.arange(reader.examples_per_epoch)
        found, wanted = reader.rows(numbers), builder.rows(reader.record_numbers(numbers))
        assert list(found) == list(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    # And as the original reads them, in the files' order.
    for paths, builder in ((train, builders["train"]), (held_out, builders["validation"])):
        theirs = parsed(paths, 40, 7)
        wanted = builder.rows(np.arange(len(theirs["input_ids"])))
        for ours, name in OURS.items():
            if ours in wanted:
                np.testing.assert_array_equal(
                    theirs[name].reshape(wanted[ours].shape), wanted[ours]
                )
    # New masks of the records are as good as those of the store.
    fresh = data.builder("train", chosen, "new").rows(np.arange(50))
    assert (fresh["masked_lm_weights"].sum(1) > 0).all()
    with pytest.raises(UserError, match="is there already"):
        google_export.export(splits, spoken, out)

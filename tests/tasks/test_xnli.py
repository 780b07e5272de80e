"""XNLI in its layouts: every language a split, labels in MNLI's order, the mean over all."""

import numpy as np
import pytest

from albert_jax import config
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import xnli

LANGUAGES = ("en", "ar", "de", "es", "fr", "sw", "zh")


@pytest.fixture(scope="module")
def spoken(shared_data):
    return Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())


def _load(spoken, folder, **fields):
    values = {"task": {"name": "xnli", **fields}, "data": {"max_seq_length": 128}}
    return xnli.load(config.resolve(values), spoken, folder)


def _outputs(labels):
    return {"logits": list(np.eye(3, dtype=np.float32)[np.asarray(labels)])}


@pytest.fixture(scope="module")
def task(spoken, shared_data):
    return _load(spoken, shared_data / "xnli", train="../glue/MNLI/train.tsv")


def test_every_language_is_a_split_with_all_its_rows(task, spoken, shared_data):
    assert len(task.train) == 2820
    assert [split.name for split in task.splits] == [
        *(f"validation_{language}" for language in LANGUAGES),
        "test_en",
    ]
    assert [len(split.features) for split in task.splits] == [2490] * 7 + [5010]
    assert not [note for note in task.notes if " x " in note]
    for split in task.splits[:-1]:
        counts = np.bincount(split.features.targets["labels"])
        assert counts.tolist() == [830, 830, 830]
    assert task.splits[-1].score is None
    line = (shared_data / "xnli" / "dev-de.tsv").read_text(encoding="utf-8").split("\n")[0]
    first, second, label = line.rstrip("\r").split("\t")
    german = task.splits[2].features
    assert task.labels[german.targets["labels"][0]] == label == "neutral"
    expected = [
        *[spoken.cls_id, *spoken.encode(first), spoken.sep_id],
        *[*spoken.encode(second), spoken.sep_id],
    ]
    assert german.sequence(0).tolist() == expected


def test_the_last_language_has_the_mean_over_all(task):
    for _ in range(2):  # an evaluation leaves nothing behind for the next
        expected = []
        for place, split in enumerate(task.splits[:-1]):
            labels = np.array(split.features.targets["labels"])
            labels[: 100 * place] = (labels[: 100 * place] + 1) % 3
            figures = split.score(_outputs(labels))
            expected.append(1 - 100 * place / 2490)
            assert figures["accuracy"] == pytest.approx(expected[-1], abs=1e-9)
            assert ("accuracy_mean" in figures) == (place == 6)
        assert figures["accuracy_mean"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_the_official_layout_gives_the_same_rows(task, spoken, shared_data, tmp_path):
    names = ["language", "gold_label", *(f"x{n}" for n in range(4)), "sentence1", "sentence2"]
    names += [f"y{n}" for n in range(11)]
    lines = ["\t".join(names)]
    for language in ("de", "en"):
        text = (shared_data / "xnli" / f"dev-{language}.tsv").read_text(encoding="utf-8")
        for row in text.split("\n"):
            if row:
                first, second, label = row.rstrip("\r").split("\t")
                cells = [language, label, *"abcd", first, second, *"abcdefghijk"]
                lines.append("\t".join(cells))
    (tmp_path / "xnli.dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "multinli.train.de.tsv").write_text(
        "premise\thypo\tlabel\nEin Satz.\tNoch einer.\tcontradictory\nA\tB\tentailment\n"
    )
    found = _load(spoken, tmp_path, train="multinli.train.de.tsv")
    assert found.train.targets["labels"].tolist() == [2, 0]
    assert [split.name for split in found.splits] == ["validation_en", "validation_de"]
    for ours, theirs in zip(found.splits, (task.splits[0], task.splits[2]), strict=True):
        np.testing.assert_array_equal(ours.features.ids, theirs.features.ids)
        for name, labels in theirs.features.targets.items():
            np.testing.assert_array_equal(ours.features.targets[name], labels)


def test_predictions_read_back(task, tmp_path):
    labels = task.splits[0].features.targets["labels"]
    (path,) = task.splits[0].write(_outputs(labels), tmp_path)
    assert path.name == "predictions_validation_en.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert rows[0] == ["row", "prediction", "label", *task.labels]
    assert [row[1] for row in rows[1:]] == [row[2] for row in rows[1:]]
    assert rows[-1][0] == "2490"


def test_what_cannot_be_is_refused(spoken, tmp_path):
    with pytest.raises(UserError, match=r"holds no multinli\.train\.en\.tsv or"):
        _load(spoken, tmp_path)
    (tmp_path / "train.tsv").write_text("a\tb\tmaybe\nc\td\tneutral\n")
    (note,) = _load(spoken, tmp_path).notes[1:]
    assert note == (
        f"1 x label 'maybe' that is none of the classes, left out ({tmp_path / 'train.tsv'}:1)"
    )
    (tmp_path / "train.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match="needs a third column"):
        _load(spoken, tmp_path)
    (tmp_path / "train.tsv").write_text("a\tb\tc\td\n")
    with pytest.raises(UserError, match="line 1: neither XNLI's columns"):
        _load(spoken, tmp_path)

"""Tables of one's own: quoted line breaks, unknown labels, missing values, forty classes."""

import json
import pathlib

import numpy as np
import pytest

from albert_jax import config
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import table


@pytest.fixture(scope="module")
def spoken(shared_data):
    return Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())


def _load(spoken, folder, **fields):
    values = {"task": {"name": "table", **fields}, "data": {"max_seq_length": 128}}
    return table.load(config.resolve(values), spoken, pathlib.Path(folder))


def _outputs(labels, count):
    if np.ndim(labels) == 2:
        return {"logits": list(np.where(np.asarray(labels) > 0, 4.0, -4.0))}
    if count == 1:
        return {"logits": [np.array([label]) for label in labels]}
    return {"logits": list(4 * np.eye(count)[np.asarray(labels, int)])}


def _csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8", newline="")


def test_a_quoted_line_break_is_part_of_its_text(spoken, tmp_path):
    _csv(tmp_path / "train.csv", ['"one\ntwo, ""three""",pos', "four,neg"])
    _csv(tmp_path / "validation.csv", ["five,neg", "six,pos"])
    task = _load(spoken, tmp_path)
    assert task.labels == ("neg", "pos")
    assert task.train.targets["labels"].tolist() == [1, 0]
    assert task.train.sequence(0).tolist()[1:-1] == spoken.encode('one\ntwo, "three"')
    (split,) = task.splits
    figures = split.score(_outputs([0, 1], 2))
    assert figures == {"accuracy": 1.0, "f1_macro": 1.0}
    assert split.score(_outputs([0, 0], 2)) == pytest.approx({"accuracy": 0.5, "f1_macro": 1 / 3})
    task.draw(_outputs([0, 1], 2), tmp_path / "report")
    assert (tmp_path / "report" / "confusion.png").stat().st_size > 1000


def test_unknown_labels_and_missing_values_are_named_and_left_out(spoken, tmp_path):
    _csv(tmp_path / "train.csv", ["a,pos", ",neg", "b,", " ,pos", "c,neg", "d,neg,more"])
    _csv(tmp_path / "dev.csv", ["a,pos", "b,neutral", "c,Neg"])
    task = _load(spoken, tmp_path)
    assert len(task.train) == 2
    assert len(task.splits[0].features) == 1
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    assert [note for note in task.notes if " x " in note] == [
        f"2 x row without a text, left out ({train}:3, {train}:5)",
        f"1 x row without a label, left out ({train}:4)",
        f"1 x row with more or fewer columns than the header, left out ({train}:7)",
        f"1 x label 'neutral' that is none of the classes, left out ({dev}:3)",
        f"1 x label 'Neg' that is none of the classes, left out ({dev}:4)",
    ]
    assert task.notes[0] == "classes (2): neg, pos"
    named = _load(spoken, tmp_path, labels='["pos", "neg", "neutral"]')
    assert named.labels == ("pos", "neg", "neutral")
    assert len(named.splits[0].features) == 2


def test_forty_classes_are_fine(spoken, tmp_path):
    names = [f"class {n:02d}" for n in range(40)]
    _csv(tmp_path / "train.csv", [f"text {n},{names[n % 40]}" for n in range(2000)])
    task = _load(spoken, tmp_path)
    assert task.labels == tuple(names)
    (split,) = task.splits
    labels = split.features.targets["labels"]
    assert set(split.score(_outputs(labels, 40)).values()) == {1.0}
    (path,) = split.write(_outputs(labels, 40), tmp_path)
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert header == ["row", "prediction", "label", *names]
    assert [line[1] for line in lines] == [names[label] for label in labels]
    # A row is named by its line.
    assert all(names[(int(line[0]) - 2) % 40] == line[2] for line in lines)
    task.draw(_outputs(labels, 40), tmp_path)
    assert (tmp_path / "confusion.png").stat().st_size > 10_000


def test_a_tenth_is_split_off_by_its_text_alone(spoken, tmp_path):
    rows = [f"text {n % 900},{'ab'[n % 2]}" for n in range(1800)]
    _csv(tmp_path / "train.csv", rows)
    task = _load(spoken, tmp_path / "train.csv")  # the file itself will do
    (split,) = task.splits
    assert split.name == "validation"
    assert len(task.train) + len(split.features) == 1800
    assert 0.07 < len(split.features) / 1800 < 0.13
    assert any("split off" in note for note in task.notes)

    def texts(features):
        return {tuple(features.sequence(row).tolist()) for row in range(len(features))}

    assert not texts(task.train) & texts(split.features)  # no text is on both sides
    _csv(tmp_path / "train.csv", rows[::-1])
    assert texts(_load(spoken, tmp_path).splits[0].features) == texts(split.features)
    _csv(tmp_path / "train.csv", ["a,x", "b,y"])
    with pytest.raises(UserError, match="2 training rows are too few"):
        _load(spoken, tmp_path)


def test_several_labels_at_once(spoken, tmp_path):
    rows = [
        {"body": "a", "tags": ["x", "y"]},
        {"body": "b", "tags": "y | z"},
        {"body": "c", "tags": []},
        {"body": "d", "tags": '["z"]'},
        {"body": "e"},
        {"body": None, "tags": "x"},
        {"body": "f", "tags": {"x": 1}},
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = _load(spoken, tmp_path, kind="multi_label", text="body", label="tags")
    assert task.labels == ("x", "y", "z")
    expected = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]], np.float32)
    np.testing.assert_array_equal(task.train.targets["labels"], expected)
    assert task.train.targets["labels"].dtype == np.float32
    (split,) = task.splits
    assert split.score(_outputs(expected, 3)) == {"exact": 1.0, "f1_micro": 1.0, "f1_macro": 1.0}
    less = expected.copy()
    less[0, 0] = 0
    assert split.score(_outputs(less, 3)) == pytest.approx(
        {"exact": 0.75, "f1_micro": 8 / 9, "f1_macro": 2 / 3}
    )
    (path,) = split.write(_outputs(less, 3), tmp_path)
    assert path.read_text().splitlines()[1].split("\t")[:3] == ["1", "y", "x|y"]
    notes = " ".join(task.notes)
    for said in ("row without a label", "row without a text", "label that is no list of labels"):
        assert f"2 x {said}, left out" in notes


def test_numbers(spoken, tmp_path):
    lines = ["a\tb\t1.5", "c\td\tmany", "e\tf\tnan", "g\th\t-2", "i\tj\t1e3"]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["q\tp\tstars", *lines]))
    (tmp_path / "test.tsv").write_text("q\tp\nk\tl\n")
    fields = {"kind": "regression", "text": "q", "text_pair": "p", "label": "stars"}
    task = _load(spoken, tmp_path, **fields)
    assert (task.labels, task.best_by) == (("stars",), "r2")
    np.testing.assert_array_equal(task.train.targets["labels"], np.float32([1.5, -2, 1e3]))
    assert f"4 x label that is no number, left out ({tmp_path}/train.tsv:3" in " ".join(task.notes)
    split, test = task.splits
    assert split.score(_outputs([1.5, -2, 1000], 1)) == {"r2": 1.0, "mae": 0.0}
    assert split.score(_outputs([2.5, -2, 998], 1))["mae"] == pytest.approx(1.0)
    task.draw(_outputs([1, 2, 3], 1), tmp_path)
    assert (tmp_path / "scatter.png").exists()
    assert test.score is None
    (path,) = test.write(_outputs([2.25], 1), tmp_path)
    assert path.read_text() == "row\tprediction\n2\t2.25\n"
    first, second = spoken.encode("a"), spoken.encode("b")
    assert task.train.sequence(0).tolist() == [
        spoken.cls_id,
        *first,
        spoken.sep_id,
        *second,
        spoken.sep_id,
    ]


def test_what_cannot_be_learnt_is_refused(spoken, tmp_path):
    with pytest.raises(UserError, match=r"holds no train\.tsv or train\.csv or train\.jsonl"):
        _load(spoken, tmp_path)
    _csv(tmp_path / "train.csv", ["a,x", "b,x"])
    with pytest.raises(UserError, match=r"'label' \(task\.label\) has x in every row"):
        _load(spoken, tmp_path)
    with pytest.raises(UserError, match=r"no column 'body' \(task\.text\); there are: text, label"):
        _load(spoken, tmp_path, text="body")
    with pytest.raises(UserError, match=r"no column 'class' \(task\.label\)"):
        _load(spoken, tmp_path, label="class")
    _csv(tmp_path / "train.csv", [",x", ",y"])
    with pytest.raises(UserError, match="no row that can be used: 2 x row without a text"):
        _load(spoken, tmp_path)

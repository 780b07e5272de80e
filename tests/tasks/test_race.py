"""RACE and SWAG: four sequences a question, what is cut where, accuracy by level."""

import json

import numpy as np
import pytest

from albert_jax import config
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import race
from albert_jax.tasks.task import NOT_COUNTED


@pytest.fixture(scope="module")
def spoken(shared_data):
    return Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())


def _load(spoken, folder, name="race", longest=512, query=128, **fields):
    task = {"name": name, "max_query_length": query, **fields}
    data = {"max_seq_length": longest, "max_predictions_per_seq": 8}
    return race.load(config.resolve({"task": task, "data": data}), spoken, folder)


def _outputs(labels):
    return {"logits": list(np.eye(4, dtype=np.float32)[np.asarray(labels)])}


@pytest.fixture(scope="module")
def real(spoken, shared_data):
    return _load(
        spoken,
        shared_data / "race",
        train="RACE/dev",
        validation="RACE/test",
        test="RACE/test/high",
    )


def test_every_question_is_read_and_scored_by_level(real, tmp_path):
    assert real.head == "multiple_choice"
    assert real.labels == ("A", "B", "C", "D")
    assert len(real.train) == 1436 + 200
    assert [(split.name, len(split.features)) for split in real.splits] == [
        ("validation", 1436 + 300),
        ("test", 300),
    ]
    assert not [note for note in real.notes if " x " in note]
    assert real.train.choices == 4
    assert len(real.train.offsets) == 4 * 1636 + 1
    split = real.splits[0]
    labels = np.array(split.features.targets["labels"])
    assert set(split.score(_outputs(labels)).values()) == {1.0}
    # Files come in order: high before middle.
    labels[:150] = (labels[:150] + 1) % 4
    assert split.score(_outputs(labels)) == pytest.approx(
        {"accuracy": 1586 / 1736, "accuracy_middle": 1.0, "accuracy_high": 0.5}
    )
    assert set(real.splits[1].score(_outputs(real.splits[1].features.targets["labels"]))) == {
        "accuracy",
        "accuracy_high",
    }
    (path,) = split.write(_outputs(labels), tmp_path)
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert rows[0] == ["row", "prediction", "label", "A", "B", "C", "D"]
    assert sum(row[1] == row[2] for row in rows[1:]) == 1586
    assert rows[-1][0] == "middle/999-4"


def _passage(path, **changes):
    passage = {
        "article": " ".join(f"word{n}" for n in range(300)),
        "questions": ["It is _ that it rains.", "What is it?", "Long " + "so " * 100 + "end"],
        "options": [["good", "bad", "true", "false"]] * 3,
        "answers": ["C", "A", "D"],
        "id": path.name,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(passage | changes), encoding="utf-8")
    return passage


def test_an_option_stands_in_the_gap_and_the_right_ends_are_cut(spoken, tmp_path):
    passage = _passage(tmp_path / "train" / "high" / "1.txt")
    task = _load(spoken, tmp_path, longest=200, query=20)
    article = spoken.encode(passage["article"])
    assert len(article) > 200
    texts = [
        [f"It is {option} that it rains." for option in passage["options"][0]],
        [f"What is it? {option}" for option in passage["options"][0]],
        [f"{passage['questions'][2]} {option}" for option in passage["options"][0]],
    ]
    for row, choices in enumerate(texts):
        for choice, text in enumerate(choices):
            asked = spoken.encode(text)[-20:]
            first = [spoken.cls_id, *article[: 200 - 3 - len(asked)], spoken.sep_id]
            place = 4 * row + choice
            assert task.train.sequence(place).tolist() == [*first, *asked, spoken.sep_id]
            types = task.train.types[task.train.offsets[place] : task.train.offsets[place + 1]]
            assert types.tolist() == [0] * len(first) + [1] * (len(asked) + 1)
    assert len(spoken.encode(texts[2][3])) > 20
    assert spoken.encode(texts[2][3])[-20:][-1] == spoken.encode("false")[-1]
    assert task.train.targets["labels"].tolist() == [2, 0, 3]
    assert np.diff(task.train.offsets).max() == 200
    assert task.notes[0].startswith("train: 3 rows, 3 (100.0%) longer than")
    with pytest.raises(UserError, match=r"max_seq_length=64 leaves no room for an article beside"):
        _load(spoken, tmp_path, longest=64, query=61)


def test_broken_passages_and_questions_are_counted(spoken, tmp_path):
    for name, changes in {
        "1": {},
        "2": {"answers": ["A"]},
        "3": {"options": [["a", "b", "c"]] * 3},
        "4": {"answers": ["A", "E", "B"]},
    }.items():
        _passage(tmp_path / "train" / "middle" / f"{name}.txt", **changes)
    (tmp_path / "train" / "middle" / "5.txt").write_text("no JSON")
    _passage(tmp_path / "test" / "high" / "1.txt", answers=[])
    task = _load(spoken, tmp_path)
    assert len(task.train) == 3 + 2
    folder = tmp_path / "train" / "middle"
    assert set(task.notes[2:]) == {
        f"2 x passage that is no JSON object of RACE's kind, left out ({folder}/2.txt:1, "
        f"{folder}/5.txt:1)",
        f"3 x question without 4 options, left out ({folder}/3.txt:question 1, "
        f"{folder}/3.txt:question 2, {folder}/3.txt:question 3)",
        f"1 x answer 'E' that is none of A to D, left out ({folder}/4.txt:question 2)",
    }
    assert task.splits[0].score is None
    assert set(task.splits[0].features.targets["labels"]) == {NOT_COUNTED}
    with pytest.raises(UserError, match="holds no RACE/train"):
        _load(spoken, tmp_path / "test")


def test_swag_rows_have_quotes_and_no_labels_in_test(spoken, tmp_path):
    header = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source"
    ends = ",".join(f"ending{n}" for n in range(4))
    row = (
        '0,v,1,"A man, ""tall"". He","A man, ""tall"".",He,gold,sits.,"runs, then\nstops.",is.,so.'
    )
    (tmp_path / "train.csv").write_text(f"{header},{ends},label\n{row},1\n{row},7\n")
    (tmp_path / "test.csv").write_text(f"{header},{ends}\n{row}\n")
    task = _load(spoken, tmp_path, name="swag", longest=64)
    assert len(task.train) == 1
    assert task.train.targets["labels"].tolist() == [1]
    first = [spoken.cls_id, *spoken.encode('A man, "tall".'), spoken.sep_id]
    second = [*spoken.encode("He runs, then stops."), spoken.sep_id]
    assert task.train.sequence(1).tolist() == first + second
    assert "1 x label '7'" in task.notes[-1]
    assert f"{tmp_path / 'train.csv'}:4" in task.notes[-1]
    (split,) = task.splits
    assert (split.name, split.score) == ("test", None)
    (path,) = split.write(_outputs([3]), tmp_path)
    assert path.read_text().splitlines()[1].startswith("2\tD\t")
    cut = _load(spoken, tmp_path, name="swag", longest=12)
    assert np.diff(cut.train.offsets).max() == 12

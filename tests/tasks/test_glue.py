"""GLUE as given out: every row, its traps, its figures and the leaderboard's files."""

import csv
import importlib.resources.abc
import pathlib
import sys

import numpy as np
import pytest

from albert_jax import config
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import glue
from albert_jax.tasks.task import NOT_COUNTED

# Rows of train and of what is evaluated, as shared/data/README.md has them.
ROWS = {
    "cola": (8551, {"validation": 1043, "test": 1063}),
    "sst-2": (3000, {"validation": 872}),
    "mrpc": (3668, {"validation": 408, "test": 1725}),
    "sts-b": (5749, {"validation": 1500, "test": 1379}),
    "qqp": (3000, {"validation": 1000}),
    "mnli": (2820, {"validation_matched": 1500, "validation_mismatched": 1500}),
    "qnli": (320, {"validation": 5463}),
    "rte": (2490, {"validation": 277}),
    "wnli": (635, {"validation": 71}),
}


@pytest.fixture(scope="module")
def spoken(shared_data):
    return Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())


def _load(spoken, folder, name, longest=128, **fields):
    values = {"task": {"name": name, **fields}, "data": {"max_seq_length": longest}}
    return glue.load(config.resolve(values), spoken, folder)


def _outputs(labels, count):
    """Scores that say exactly what the labels say."""
    if count == 1:
        return {"logits": [np.array([label], np.float32) for label in labels]}
    return {"logits": [5 * np.eye(count, dtype=np.float32)[label] for label in labels]}


def test_every_task_has_a_config():
    configs = pathlib.Path(__file__).resolve().parents[2] / "configs"
    for file, arguments in {
        "glue": set(glue.TASKS) - {"ax"},  # a part of a run of MNLI
        "squad": ("v1", "v2"),
        "race": ("v1", "v2", "swag"),
        "xnli": ("",),
        "ner": ("",),
        "table": config.TABLE_KINDS,
    }.items():
        for argument in arguments:
            found = config.load(f"{configs / file}.py:{argument}")
            assert found.task.name == (argument if argument in (*glue.TASKS, "swag") else file)
            assert (found.optimizer.name, found.model.classifier_dropout_prob) == ("adamw", 0.1)
            assert found.optimizer.warmup_steps < found.train.steps
    # Table 14 of the paper.
    qqp = config.load(f"{configs}/glue.py:qqp")
    assert (qqp.optimizer.learning_rate, qqp.train.global_batch_size) == (5e-5, 128)
    assert (qqp.train.steps, qqp.optimizer.warmup_steps) == (14000, 1000)
    assert qqp.model.hidden_dropout_prob == qqp.model.attention_probs_dropout_prob == 0.1
    with pytest.raises(UserError, match="there are cola, sst-2"):
        config.load(f"{configs}/glue.py")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_read_and_perfect_outputs_have_full_marks(spoken, shared_data, name, tmp_path):
    task = _load(spoken, shared_data / "glue", name)
    train, splits = ROWS[name]
    assert len(task.train) == train
    assert {split.name: len(split.features) for split in task.splits} == splits
    assert not [note for note in task.notes if " x " in note]
    for split in task.splits:
        labels = split.features.targets["labels"]
        if split.name.startswith("test"):
            assert split.score is None
            assert np.isnan(labels).all() if name == "sts-b" else (labels == NOT_COUNTED).all()
            continue
        figures = split.score(_outputs(labels, len(task.labels)))
        assert task.best_by in figures
        assert list(figures.values()) == pytest.approx([1.0] * len(figures))
        wrong = labels[::-1] if name == "sts-b" else (labels + 1) % len(task.labels)
        assert split.score(_outputs(wrong, len(task.labels)))[task.best_by] < 0.1
    # The task's own folder will do as well.
    again = _load(spoken, shared_data / "glue" / glue.TASKS[name].folder, name)
    np.testing.assert_array_equal(again.train.ids, task.train.ids)
    task.draw(_outputs(task.splits[0].features.targets["labels"], len(task.labels)), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_mrpc_has_all_rows_in_spite_of_its_mark_and_quotes(spoken, shared_data):
    path = shared_data / "glue" / "MRPC" / "train.tsv"
    assert path.read_bytes().startswith(b"\xef\xbb\xbfQuality")
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoted = sum(1 for _ in csv.reader(file, delimiter="\t")) - 1
    assert quoted < 3668  # what quote handling would make of it
    task = _load(spoken, shared_data / "glue", "mrpc")
    lines = path.read_text(encoding="utf-8-sig").split("\n")[1:]
    expected = [int(line.split("\t")[0]) for line in lines if line]
    np.testing.assert_array_equal(task.train.targets["labels"], expected)
    cells = lines[0].split("\t")
    ids = [spoken.cls_id, *spoken.encode(cells[3]), spoken.sep_id]
    more = [*spoken.encode(cells[4]), spoken.sep_id]
    assert task.train.sequence(0).tolist() == ids + more
    assert task.train.types[: len(ids + more)].tolist() == [0] * len(ids) + [1] * len(more)


def test_cola_without_header_loses_no_first_row(spoken, shared_data):
    task = _load(spoken, shared_data / "glue", "cola")
    first = "Our friends won't buy this analysis, let alone the next one we propose."
    expected = [spoken.cls_id, *spoken.encode(first), spoken.sep_id]
    assert task.train.sequence(0).tolist() == expected
    assert task.splits[1].features.sequence(0).tolist()[1:-1] == spoken.encode(
        "Bill whistled past the house."
    )


def test_long_pairs_are_cut_longest_first_and_counted(spoken, shared_data):
    whole = _load(spoken, shared_data / "glue", "rte", longest=512)
    cut = _load(spoken, shared_data / "glue", "rte", longest=80)
    lengths = np.diff(whole.train.offsets)
    longer = int(np.sum(lengths > 80))
    np.testing.assert_array_equal(np.diff(cut.train.offsets), np.minimum(lengths, 80))
    assert cut.notes[0] == (
        f"train: 2,490 rows, {longer:,} ({longer / 2490:.1%}) longer than data.max_seq_length=80 "
        "and cut"
    )
    row = int(np.argmax(lengths))
    before, after = (
        part.types[part.offsets[row] : part.offsets[row + 1]].sum()
        for part in (whole.train, cut.train)
    )
    assert after == before < 40  # the short hypothesis stays whole


@pytest.mark.parametrize(
    ("name", "file", "values"),
    [("cola", "CoLA.tsv", "01"), ("mrpc", "MRPC.tsv", "01")],
)
def test_the_leaderboards_file_reads_back(spoken, shared_data, tmp_path, name, file, values):
    task = _load(spoken, shared_data / "glue", name)
    (test,) = [split for split in task.splits if split.score is None]
    chosen = np.random.default_rng(0).integers(0, 2, len(test.features))
    paths = test.write(_outputs(chosen, 2), tmp_path / "new")
    assert [path.name for path in paths] == ["predictions_test.tsv", file]
    header, *lines = paths[1].read_text().splitlines()
    assert header == "index\tprediction"
    assert lines == [f"{row}\t{values[label]}" for row, label in enumerate(chosen)]
    header, first, *_ = paths[0].read_text().splitlines()
    assert header.split("\t") == ["row", "prediction", *task.labels]
    assert first.split("\t")[:2] == ["0", task.labels[chosen[0]]]
    assert sum(map(float, first.split("\t")[2:])) == pytest.approx(1.0, abs=1e-5)


def test_sts_b_submits_numbers_between_0_and_5(spoken, shared_data, tmp_path):
    task = _load(spoken, shared_data / "glue", "sts-b")
    numbers = np.linspace(-1, 6, 1379)
    paths = task.splits[1].write(_outputs(numbers, 1), tmp_path)
    lines = [line.split("\t") for line in paths[1].read_text().splitlines()[1:]]
    assert [int(index) for index, _ in lines] == list(range(1379))
    found = [float(value) for _, value in lines]
    np.testing.assert_allclose(found, np.clip(numbers, 0, 5), atol=6e-4)


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_mnli_submits_names_for_both_tests_in_any_order_of_labels(spoken, tmp_path):
    header = "index\tsentence1\tsentence2"
    train = [f"{header}\tgold_label", "0\ta\tb\tcontradiction", "1\ta\tb\tneutral", "2\ta\tb\t-"]
    _write(tmp_path / "MNLI" / "train.tsv", train)
    for kind in ("matched", "mismatched"):
        _write(tmp_path / "MNLI" / f"dev_{kind}.tsv", [f"{header}\tgold_label", "7\ta\tb\tneutral"])
        _write(tmp_path / "MNLI" / f"test_{kind}.tsv", [header, "9847\ta\tb", "9848\tc\td"])
    google = "contradiction,entailment,neutral"
    for order, labels in (("", [2, 1]), (google, [0, 2])):
        task = _load(spoken, tmp_path, "mnli", labels=order)
        assert task.train.targets["labels"].tolist() == labels
        assert any("1 x label '-'" in note and "train.tsv:4" in note for note in task.notes)
        names = [split.name for split in task.splits]
        kinds = ("validation", "test")
        assert names == [f"{a}_{b}" for a in kinds for b in ("matched", "mismatched")]
        for split, file in zip(task.splits[2:], ("MNLI-m.tsv", "MNLI-mm.tsv"), strict=True):
            path = split.write(_outputs([0, 2], 3), tmp_path)[1]
            assert path.name == file
            expected = f"index\tprediction\n9847\t{task.labels[0]}\n9848\t{task.labels[2]}\n"
            assert path.read_text() == expected
    with pytest.raises(UserError, match=r"task\.labels=yes,no: MNLI has the classes entailment"):
        _load(spoken, tmp_path, "mnli", labels="yes,no")


def test_f1_is_of_the_positive_class_in_any_order(spoken, shared_data):
    usual = _load(spoken, shared_data / "glue", "mrpc").splits[0]
    turned = _load(spoken, shared_data / "glue", "mrpc", labels="1,0").splits[0]
    said = np.random.default_rng(0).integers(0, 2, 408)
    figures = usual.score(_outputs(said, 2))
    assert turned.score(_outputs(1 - said, 2)) == figures
    gold = usual.features.targets["labels"]
    both = np.sum(gold & said)
    assert figures["f1"] == pytest.approx(2 * both / (gold.sum() + said.sum()), abs=1e-9)


def test_ax_is_evaluated_without_train(spoken, tmp_path):
    _write(tmp_path / "diagnostic" / "diagnostic.tsv", ["index\tsentence1\tsentence2", "0\ta\tb"])
    task = _load(spoken, tmp_path, "ax")
    assert (len(task.train), [split.name for split in task.splits]) == (0, ["test"])
    path = task.splits[0].write(_outputs([2], 3), tmp_path)[1]
    assert path.name == "AX.tsv"
    assert path.read_text().endswith("0\tcontradiction\n")
    with pytest.raises(UserError, match=r"holds no AX\.tsv or diagnostic\.tsv"):
        _load(spoken, tmp_path / "diagnostic" / "none", "ax")


def test_a_run_of_mnli_says_what_ax_holds(spoken, tmp_path):
    rows = ["gold_label\tsentence1\tsentence2", "neutral\ta\tb"]
    for name in ("train", "dev_matched", "dev_mismatched"):
        _write(tmp_path / "MNLI" / f"{name}.tsv", rows)
    _write(tmp_path / "own.tsv", ["index\tsentence1\tsentence2", "7\ta\tb"])
    names = [split.name for split in _load(spoken, tmp_path, "mnli", test="own.tsv").splits]
    assert names == ["validation_matched", "validation_mismatched", "test_matched"]
    _write(tmp_path / "AX" / "AX.tsv", ["index\tsentence1\tsentence2", "0\ta\tb", "1\tb\ta"])
    task = _load(spoken, tmp_path, "mnli", test="own.tsv")
    assert [split.name for split in task.splits] == [*names, "ax_test"]
    written = task.splits[-1].write(_outputs([2, 0], 3), tmp_path)
    path = next(path for path in written if path.name == "AX.tsv")
    assert path.read_text() == "index\tprediction\n0\tcontradiction\n1\tentailment\n"
    _write(tmp_path / "AX" / "AX.tsv", ["index\tsentence1", "0\ta"])
    with pytest.raises(UserError, match=r"AX\.tsv.*no column 'sentence2'"):
        _load(spoken, tmp_path, "mnli")


def test_broken_rows_are_counted_and_others_refused(spoken, tmp_path):
    rows = ["sentence\tlabel", "good\t1", "no label", "bad\t2", " \t0"]
    _write(tmp_path / "train.tsv", rows)
    task = _load(spoken, tmp_path, "sst-2")
    assert task.train.targets["labels"].tolist() == [1, 0]
    path = tmp_path / "train.tsv"
    assert set(task.notes[1:]) == {
        f"1 x row with more or fewer columns than the header, left out ({path}:3)",
        f"1 x label '2' that is none of the classes, left out ({path}:4)",
        f"1 x empty text, kept ({path}:5)",
    }
    with pytest.raises(UserError, match=r"no column 'sentence1' \(of RTE\)"):
        _load(spoken, tmp_path, "rte")
    with pytest.raises(UserError, match=r"data\.path=.*none holds no RTE/train\.tsv"):
        _load(spoken, tmp_path / "none", "rte")


def test_tfds_gives_the_same_rows(spoken, shared_data, tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tfds build glue/rte"):
        _load(spoken, pathlib.Path("tfds:glue/rte"), "rte")
    builder = tfds.builder("glue/rte", data_dir=str(tmp_path))
    files = {"train": "train.tsv", "validation": "dev.tsv"}

    def generators(_):
        return {
            split: builder._generate_examples(
                str(shared_data / "glue" / "RTE" / file), split.replace("validation", "dev")
            )
            for split, file in files.items()
        }

    monkeypatch.setattr(builder, "_split_generators", generators)
    # TFDS asks for the package although Python brings the same.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    monkeypatch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
    builder.download_and_prepare()
    expected = _load(spoken, shared_data / "glue", "rte")
    for path in ("tfds:", "tfds:glue/rte"):
        task = _load(spoken, pathlib.Path(path), "rte")
        np.testing.assert_array_equal(task.train.ids, expected.train.ids)
        for ours, theirs in zip(task.splits, expected.splits, strict=True):
            assert ours.name == theirs.name
            np.testing.assert_array_equal(ours.features.ids, theirs.features.ids)
            for name, labels in theirs.features.targets.items():
                np.testing.assert_array_equal(ours.features.targets[name], labels)
    with pytest.raises(UserError, match=r"glue/rte has no column 'premise'"):
        _load(spoken, pathlib.Path("tfds:glue/rte"), "mnli")
    with pytest.raises(UserError, match=r"TFDS has no glue/none"):
        _load(spoken, pathlib.Path("tfds:glue/none"), "mnli")

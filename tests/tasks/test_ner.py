"""CoNLL files in every dress, labels at first pieces, nothing lost where a sentence is cut."""

import itertools

import numpy as np
import pytest
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from albert_jax import config
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError
from albert_jax.tasks import ner
from albert_jax.tasks.task import NOT_COUNTED, Problems

# Sentences as shared/data/README.md has them.
SENTENCES = {
    "wikiann/en": (5000, 1500, 1500),
    "wikiann/de": (2500, 1000, 1000),
    "wikiann/fr": (2500, 1000, 1000),
    "wnut17": (3394, 1009, 1287),
    "conll2003_subset": (1200, 300, 300),
}


@pytest.fixture(scope="module")
def spoken(shared_data):
    options = tokenizer_lib.Normalization()
    return tokenizer_lib.Tokenizer.load(shared_data / "tokenizer" / "spiece.model", options)


def _load(spoken, folder, longest=128, **fields):
    data = {"max_seq_length": longest, "max_predictions_per_seq": 2}
    return ner.load(
        config.resolve({"task": {"name": "ner", **fields}, "data": data}), spoken, folder
    )


def _outputs(features, count):
    """Scores that say the labels, and O where there are none."""
    labels = np.maximum(features.token_targets["labels"], 0)
    scores = np.eye(count, dtype=np.float32)[labels]
    return {"logits": [scores[a:b] for a, b in itertools.pairwise(features.offsets)]}


@pytest.mark.parametrize("name", SENTENCES)
def test_every_sentence_is_read_and_perfect_outputs_have_full_marks(
    spoken, shared_data, name, tmp_path
):
    task = _load(spoken, shared_data / "ner" / name)
    for note, part, count in zip(
        task.notes, ("train", "validation", "test"), SENTENCES[name], strict=False
    ):
        assert note.startswith(f"{part}: {count:,} sentences")
    assert task.labels[0] == "O"
    for split in task.splits:
        figures = split.score(_outputs(split.features, len(task.labels)))
        # WNUT's dev has a tag that stands where it cannot.
        assert figures == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    first = task.splits[0]
    task.draw(_outputs(first.features, len(task.labels)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_marks_and_blank_lines_with_tabs_are_no_words(spoken, shared_data):
    for path in sorted((shared_data / "ner" / "wnut17").glob("*")):
        problems = Problems()
        sentences = ner.read(path, problems, [])
        lines = path.read_text(encoding="utf-8").split("\n")
        kept = [line.split("\t") for line in lines if line.strip("\t \ufeff")]
        assert [[w, t] for s in sentences for w, t in zip(s.words, s.tags, strict=True)] == kept
        for sentence in sentences[::50]:
            assert [lines[at - 1].split("\t")[0] for at in sentence.lines] == sentence.words
        if path.name == "dev.conll":
            assert "\ufeff" in lines
            (note,) = problems.notes()
            at = int(note.rstrip(")").rpartition(":")[2])
            before, here = lines[at - 2].split("\t")[-1], lines[at - 1].split("\t")[-1]
            assert here[:2] == "I-"
            assert before[2:] != here[2:]
        else:
            assert problems.notes() == ()


def test_docstart_and_the_languages_prefix_are_passed_over(shared_data):
    folder = shared_data / "ner"
    with_prefix = ner.read(folder / "wikiann" / "raw_prefix_sample.txt", Problems(), [])
    assert len(with_prefix) == 100
    assert with_prefix[0].words[:4] == ["Sioux", "Falls", "Arena", "("]
    for path in (folder / "conll2003_subset").glob("sample_docstart_*"):
        sentences = ner.read(path, Problems(), [])
        assert "-DOCSTART-" in path.read_text()
        assert not [s for s in sentences if "-DOCSTART-" in s.words]
        assert sum(len(s.words) for s in sentences) == sum(
            bool(line.strip()) and not line.startswith("-DOCSTART-")
            for line in path.read_text().splitlines()
        )


def test_a_tag_stands_at_the_first_piece_of_its_word(spoken, shared_data):
    task = _load(spoken, shared_data / "ner" / "conll2003_subset")
    sentences = ner.read(shared_data / "ner" / "conll2003_subset" / "valid.txt", Problems(), [])
    features = task.splits[0].features
    several = 0
    for row, sentence in enumerate(sentences[:100]):
        ids, labels = [spoken.cls_id], [NOT_COUNTED]
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            pieces = spoken.encode(word)
            several += len(pieces) > 1
            ids += pieces
            labels += [task.labels.index(tag), *[NOT_COUNTED] * (len(pieces) - 1)]
        assert features.sequence(row).tolist() == [*ids, spoken.sep_id]
        begin, end = features.offsets[row : row + 2]
        assert features.token_targets["labels"][begin:end].tolist() == [*labels, NOT_COUNTED]
    assert several > 100


def test_a_sentence_that_is_too_long_loses_nothing(spoken, shared_data, tmp_path):
    folder = shared_data / "ner" / "conll2003_subset"
    whole, cut = _load(spoken, folder, longest=512), _load(spoken, folder, longest=32)
    assert len(cut.train) > len(whole.train) == 1200
    assert np.diff(cut.train.offsets).max() <= 32
    special = [spoken.cls_id, spoken.sep_id]
    for ours, theirs in (
        (cut.train, whole.train),
        (cut.splits[1].features, whole.splits[1].features),
    ):
        kept, expected = (~np.isin(part.ids, special) for part in (ours, theirs))
        np.testing.assert_array_equal(ours.ids[kept], theirs.ids[expected])
        np.testing.assert_array_equal(
            ours.token_targets["labels"][kept], theirs.token_targets["labels"][expected]
        )
        starts = ours.token_targets["labels"][ours.offsets[:-1] + 1]
        assert (starts != NOT_COUNTED).all()  # no row begins in mid-word
    for task in (whole, cut):
        split = task.splits[0]
        assert split.score(_outputs(split.features, len(task.labels)))["f1"] == 1.0
    split = cut.splits[0]
    (path,) = split.write(_outputs(split.features, len(cut.labels)), tmp_path)
    written = ner.read(path, Problems(), [])
    original = ner.read(folder / "valid.txt", Problems(), [])
    assert [(s.words, s.tags) for s in written] == [(s.words, s.tags) for s in original]
    assert {len(line.split("\t")) for line in path.read_text().splitlines() if line} == {3}


def test_scores_equal_seqeval_for_random_outputs(spoken, shared_data):
    task = _load(spoken, shared_data / "ner" / "conll2003_subset", longest=24)
    split = task.splits[0]
    rng = np.random.default_rng(0)
    outputs = _outputs(split.features, len(task.labels))
    outputs = {"logits": [row + rng.normal(0, 0.4, row.shape) for row in outputs["logits"]]}
    said, labels = [], split.features.token_targets["labels"]
    best = np.concatenate([row.argmax(axis=1) for row in outputs["logits"]])
    words = iter([task.labels[tag] for tag in best[labels != NOT_COUNTED]])
    true = [
        s.tags
        for s in ner.read(shared_data / "ner" / "conll2003_subset" / "valid.txt", Problems(), [])
    ]
    said = [[next(words) for _ in tags] for tags in true]
    expected = f1_score(true, said, mode="strict", scheme=IOB2)
    assert 0.1 < expected < 0.9
    assert split.score(outputs)["f1"] == pytest.approx(expected, abs=1e-9)


def _write(tmp_path, **files):
    for name, lines in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_iob1_is_read_as_iob2_and_iobes_stays(spoken, tmp_path):
    iob1 = ["a I-PER", "b I-PER", "c B-PER", "d I-LOC", "e O", "f I-LOC"]
    _write(tmp_path, train=iob1)
    task = _load(spoken, tmp_path)
    assert task.labels == ("O", "B-LOC", "B-PER", "I-PER")
    (sentence,) = ner.read(tmp_path / "train.txt", Problems(), [])
    assert sentence.tags == ["B-PER", "I-PER", "B-PER", "B-LOC", "O", "B-LOC"]
    assert any("IOB1" in note for note in task.notes)

    iobes = ["a B-PER", "b E-PER", "c S-LOC", "d O"]
    _write(tmp_path, train=iobes, dev=[*iobes, "e B-PER", "f O", "g E-LOC"])
    task = _load(spoken, tmp_path)
    assert task.labels == ("O", "B-PER", "E-PER", "S-LOC")
    path = tmp_path / "dev.txt"
    assert next(note for note in task.notes if "cannot follow" in note).endswith(
        f"({path}:6, {path}:7)"
    )
    split = task.splits[0]
    outputs = _outputs(split.features, 4)
    assert split.score(outputs) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    outputs["logits"][0][2, :] = [9, 0, 0, 0]  # an entity without an end is none
    assert split.score(outputs) == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})


def test_what_is_wrong_in_a_file_is_counted_or_refused(spoken, tmp_path):
    train = ["a O", "", "b B-PER", "alone", "c I-PER", " \t", "\u200b O", "d I-LOC", "e B-LOC"]
    _write(tmp_path, train=train, dev=["a B-NEW", "b B-PER"], test=["only", "words"])
    task = _load(spoken, tmp_path)
    notes = [note for note in task.notes if " x " in note]
    path = tmp_path / "train.txt"
    assert notes == [
        f"1 x word without a tag, left out ({path}:4)",
        f"1 x tag that cannot follow the one before it, kept (it makes no entity) ({path}:8)",
        f"1 x word without any piece, predicted as O ({path}:7)",
        f"1 x tag 'B-NEW' that is not among the labels, never right ({tmp_path / 'dev.txt'}:1)",
    ]
    validation, test = task.splits
    figures = validation.score(_outputs(validation.features, len(task.labels)))
    assert figures == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})
    assert test.score is None
    (written,) = test.write(_outputs(test.features, len(task.labels)), tmp_path)
    assert written.read_text() == "only\tO\nwords\tO\n"
    _write(tmp_path, train=["a O", "b PERSON"])
    with pytest.raises(
        UserError, match=r"train\.txt, line 2: the last column, 'PERSON', is no tag"
    ):
        _load(spoken, tmp_path)
    _write(tmp_path, train=["a", "b"])
    with pytest.raises(UserError, match=r"words without tags; task\.train needs both"):
        _load(spoken, tmp_path)
    with pytest.raises(UserError, match=r"holds no train\.txt or"):
        _load(spoken, tmp_path / "none")


def test_a_word_longer_than_a_row_is_cut_and_counted(spoken, tmp_path):
    _write(tmp_path, train=["short O", "abcdefgh" * 20 + " B-PER", "end O"])
    task = _load(spoken, tmp_path, longest=10)
    assert [len(spoken.encode(word)) for word in ("short", "end")] == [1, 1]
    assert np.diff(task.train.offsets).tolist() == [3, 10, 3]
    assert any(note.startswith("1 x word longer than a row, cut") for note in task.notes)


def test_words_of_a_bpe_sentence_are_those_of_its_text(spoken, tmp_path):
    text = "The river runs to the sea , and the river ends ."
    options = tokenizer_lib.Normalization()
    path = tmp_path / "tokenizer.json"
    tokenizer_lib.train([text] * 9, path, 280, options, kind="bpe")
    for one in (tokenizer_lib.Tokenizer.load(path, options), spoken):
        ids, first = ner.encode_words(one, text.split())
        assert ids == one.encode(text)
        assert first[0] == 0
        assert len(first) == len(text.split())
        assert first == sorted(set(first))
    assert ner.encode_words(spoken, ["a", "\u200b", "b"])[1] == [0, ner.NO_PIECE, 1]
    assert ner.encode_words(spoken, []) == ([], [])

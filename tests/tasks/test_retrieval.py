"""Retrieval: both layouts, what is wrong in them, figures beside scikit-learn and counting."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from sklearn import metrics as sklearn

from albert_jax import config
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import retrieval

FIGURES = {"ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10"}


@pytest.fixture(scope="module")
def spoken(shared_data):
    return Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())


def _load(spoken, folder, length=64, **fields):
    data = {"max_seq_length": length, "max_predictions_per_seq": 1}
    values = {"task": {"name": "retrieval", **fields}, "data": data}
    return retrieval.load(config.resolve(values), spoken, pathlib.Path(folder))


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _qrels(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [("query-id", "corpus-id", "score"), *rows]
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in lines), encoding="utf-8")


def _texts(spoken, features):
    """Sequences as text, by row."""
    all_texts = [
        spoken.decode(features.sequence(number).tolist())
        for number in range(len(features.offsets) - 1)
    ]
    each = features.choices
    return [all_texts[start : start + each] for start in range(0, len(all_texts), each)]


def _judged(folder):
    """By query its relevant documents, read without the module's help."""
    found = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        assert score == "1"
        found.setdefault(query, set()).add(document)
    return found


def _run_file(path):
    found = {}
    for line in path.read_text().splitlines():
        query, q0, document, rank, score, _ = line.split("\t")
        assert q0 == "Q0"
        assert int(rank) == len(found.setdefault(query, [])) + 1
        found[query].append((document, float(score)))
    return found


@pytest.mark.parametrize(
    ("name", "documents", "queries", "judgements"),
    [("cranfield", 1400, 225, 1612), ("cisi", 1460, 76, 3114)],
)
def test_a_collection_with_judgements_alone_is_split_by_query(
    spoken, shared_data, tmp_path, name, documents, queries, judgements
):
    folder = shared_data / "retrieval" / name
    judged = _judged(folder)
    assert (len(judged), sum(map(len, judged.values()))) == (queries, judgements)
    task = _load(spoken, folder)
    assert (task.head, task.labels, task.best_by) == ("embedding", (), "ndcg_at_10")
    (split,) = task.splits
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(split.features), 1, 16)).astype(np.float32)
    outputs = {"logits": list(vectors)}
    (path,) = split.write(outputs, tmp_path)
    assert path.name == "run.tsv"
    run = _run_file(path)
    assert len(split.features) == documents + len(run)
    assert split.features.choices == 1
    assert len(run) / queries == pytest.approx(0.4, abs=0.13)
    # What is not evaluated is trained on, but for one document of Cranfield that has no text.
    rest = {query: judged[query] for query in judged if query not in run}
    without_text = {"471", "995"} if name == "cranfield" else set()
    assert len(task.train) == sum(len(found - without_text) for found in rest.values())
    assert task.train.choices == 2
    assert {query for query, _ in _texts(spoken, task.train)} == {
        spoken.decode(spoken.encode(json.loads(line)["text"])[:62])
        for line in (folder / "queries.jsonl").read_text().splitlines()
        if json.loads(line)["_id"] in rest
    }
    notes = "\n".join(task.notes)
    assert f"({len(rest)})" in notes
    assert ("2 x empty document, kept" in notes) == (name == "cranfield")

    # The same figures by counting, out of the file that was written.
    assert all(len(ranked) == 100 for ranked in run.values())
    assert all(a[1] >= b[1] for ranked in run.values() for a, b in itertools.pairwise(ranked))
    sums = dict.fromkeys(FIGURES, 0.0)
    for query, ranked in run.items():
        hits = [document in judged[query] for document, _ in ranked]
        sums["recall_at_10"] += sum(hits[:10]) / len(judged[query])
        sums["recall_at_100"] += sum(hits) / len(judged[query])
        sums["mrr_at_10"] += max([1 / (i + 1) for i in range(10) if hits[i]], default=0.0)
        ideal = sum(1 / math.log2(i + 2) for i in range(min(10, len(judged[query]))))
        sums["ndcg_at_10"] += sum(1 / math.log2(i + 2) for i in range(10) if hits[i]) / ideal
    expected = {name: total / len(run) for name, total in sums.items()}
    assert split.score(outputs) == pytest.approx(expected)


def test_perfect_vectors_have_perfect_figures(spoken, shared_data, tmp_path):
    folder = shared_data / "retrieval" / "cranfield"
    (split,) = _load(spoken, folder).splits
    zeros = {"logits": [np.zeros((1, 4))] * len(split.features)}
    order = list(_run_file(split.write(zeros, tmp_path)[0]))  # of the queries
    judged = _judged(folder)
    # An axis for each query: documents lie along those of the queries they answer.
    documents = np.zeros((1400, len(order)), np.float32)
    for axis, query in enumerate(order):
        for document in judged[query]:
            documents[int(document) - 1, axis] = 1.0
    # A document of several queries is otherwise farther from each than others, but never wrong.
    vectors = np.concatenate([documents, np.eye(len(order), dtype=np.float32)])
    found = split.score({"logits": list(vectors[:, None])})
    recall = np.mean([min(10, len(judged[query])) / len(judged[query]) for query in order])
    assert found == pytest.approx(dict.fromkeys(FIGURES, 1.0) | {"recall_at_10": recall})


def test_graded_gains_are_scikit_learns():
    rng = np.random.default_rng(1)
    for _ in range(50):
        count = int(rng.integers(11, 200))
        gains, scores = rng.integers(0, 4, count), rng.normal(size=count)
        gains[0] = 1
        order = np.argsort(-scores).tolist()
        relevant = {place: float(gain) for place, gain in enumerate(gains) if gain}
        found = retrieval.figures([order], [relevant])
        expected = sklearn.ndcg_score(gains[None], scores[None], k=10)
        assert found["ndcg_at_10"] == pytest.approx(expected)
    # By hand: gains 2 and 1 at ranks 2 and 4.
    found = retrieval.figures([["a", "b", "c", "d"]], [{"b": 2.0, "d": 1.0}])
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert found["ndcg_at_10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert found["mrr_at_10"] == 0.5


def test_the_ranking_is_that_of_all_cosines():
    rng = np.random.default_rng(2)
    queries, documents = rng.integers(-1, 2, (70, 3)), rng.integers(-1, 2, (300, 3))
    documents[:5] = 0
    norms = np.maximum(np.linalg.norm(documents, axis=1), 1e-9)
    for depth in (1, 7, 100, 300, 1000):
        found = retrieval.ranking(queries, documents * 5, depth, {3: 17})
        for number, (order, scores) in enumerate(found):
            own = np.maximum(np.linalg.norm(queries[number]), 1e-9)
            cosines = documents @ queries[number] / norms / own
            every = [one for one in range(300) if (number, one) != (3, 17)]
            # Equal ones tie only as far as both round alike.
            assert np.allclose(scores, np.sort(cosines[every])[::-1][:depth], atol=1e-6)
            assert np.allclose(scores, cosines[order], atol=1e-6)
            assert len(set(order.tolist())) == len(order) == min(depth, len(every))
    ((ties, _),) = retrieval.ranking(np.ones((1, 2)), np.ones((50, 2)), 10)
    assert ties.tolist() == list(range(10))
    ((order, scores),) = retrieval.ranking(np.ones((1, 2)), np.full((3, 2), np.nan), 10)
    assert (order.tolist(), scores.tolist()) == ([0, 1, 2], [0.0, 0.0, 0.0])


def test_a_whole_collection_keeps_its_splits_and_names_what_is_wrong(spoken, tmp_path):
    _jsonl(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Wings", "text": "lift in a stream"},
            {"_id": "d2", "title": "Flow", "text": "Flow past a plate"},
            {"_id": "d3", "title": "", "text": ""},
            {"_id": 4, "title": "What?", "text": "an answer"},
            {"_id": "d1", "text": "again"},
            {"_id": "d 5", "text": "white space"},
            {"_id": "q1", "title": "", "text": "what  is lift"},
            {"_id": "q3", "title": "", "text": "not the query"},
        ],
    )
    _jsonl(
        tmp_path / "queries.jsonl",
        [
            {"_id": "q1", "text": "what is lift"},
            {"_id": "q2", "text": " "},
            {"_id": "q3", "text": "what is flow"},
            {"_id": "q4", "text": "nobody judged this"},
            {"_id": "q5", "text": "nothing is relevant"},
        ],
    )
    train, dev = tmp_path / "qrels" / "train.tsv", tmp_path / "qrels" / "dev.tsv"
    _qrels(train, [("q1", "d1", 1), ("q1", "d3", 2), ("q3", "d2", 1), ("q3", "4", 0)])
    _qrels(
        dev,
        [
            ("q1", "d2", 1), ("q1", "d1", 2), ("q1", "dx", 1), ("q2", "d1", 1), ("q9", "d1", 1),
            ("q3", "4", "2.0"), ("q3", "d1", "high"), ("q5", "d1", 0), ("q5", "d2", -1),
        ],
    )  # fmt: skip
    task = _load(spoken, tmp_path)
    assert _texts(spoken, task.train) == [
        ["what is lift", "wings. lift in a stream"],
        ["what is flow", "flow past a plate"],
    ]
    (split,) = task.splits
    assert split.name == "validation"
    assert _texts(spoken, split.features) == [
        ["wings. lift in a stream"],
        ["flow past a plate"],
        [""],
        ["what? an answer"],
        ["what is lift"],
        ["not the query"],
        ["what is lift"],
        ["what is flow"],
    ]
    corpus = tmp_path / "corpus.jsonl"
    assert sorted(note for note in task.notes if " x " in note) == [
        f"1 x empty document, kept ({corpus}:3)",
        f"1 x empty passage that is relevant, not trained on ({tmp_path}:d3)",
        f"1 x empty query, left out ({tmp_path / 'queries.jsonl'}:2)",
        f"1 x judgement of an unknown document, left out ({dev}:4)",
        f"1 x judgement of an unknown query, left out ({dev}:6)",
        f"1 x judgement whose score is no number, left out ({dev}:8)",
        f"1 x query without a relevant document, left out ({dev}:query q5)",
        f"1 x row whose _id was there before, left out ({corpus}:5)",
        f"1 x row without an _id of one word, left out ({corpus}:6)",
    ]
    # q1 is in the corpus itself, word for word; q3 only by its name.
    same = {"logits": [np.ones((1, 2))] * len(split.features)}
    run = _run_file(split.write(same, tmp_path / "out")[0])
    assert [one for one, _ in run["q1"]] == ["d1", "d2", "d3", "4", "q3"]
    assert [one for one, _ in run["q3"]] == ["d1", "d2", "d3", "4", "q1", "q3"]
    # q1: gains 2 and 1 at ranks 1 and 2; q3: the only one at rank 4.
    assert split.score(same) == pytest.approx(
        {
            "ndcg_at_10": (1 + 1 / math.log2(5)) / 2,
            "recall_at_10": 1.0,
            "recall_at_100": 1.0,
            "mrr_at_10": (1 + 1 / 4) / 2,
        }
    )


def test_pairs_have_as_many_negatives_as_all_rows(spoken, tmp_path):
    rows = [
        {"query": "one", "positive": "a", "negatives": ["b", "c", "d"]},
        {"query": "two", "positive": "b", "negatives": ["a", "", "c"]},
        {"query": "one", "positive": "d", "negatives": ["a", "b"]},
        {"query": " ", "positive": "d", "negatives": ["a", "b"]},
        {"query": "three", "positive": "", "negatives": ["a", "b"]},
        {"query": "three", "negatives": ["a", "b"]},
        {"query": "four", "positive": "b", "negatives": "a"},
    ]
    _jsonl(tmp_path / "train.jsonl", rows)
    _jsonl(tmp_path / "dev.jsonl", rows[:3])
    task = _load(spoken, tmp_path)
    assert task.train.choices == 4
    assert _texts(spoken, task.train) == [
        ["one", "a", "b", "c"],
        ["one", "d", "a", "b"],
        ["two", "b", "a", "c"],
    ]
    notes = "\n".join(task.notes)
    assert "3 rows of a query, its passage and 2 negatives" in notes
    assert "1 negatives are not used" in notes
    for said in ("1 x empty query", "2 x row without a positive", "1 x row whose negatives are no"):
        assert said in notes
    # Every passage of the file is a document; both passages of "one" are right.
    (split,) = task.splits
    assert _texts(spoken, split.features) == [[t] for t in ("a", "b", "c", "d", "one", "two")]
    axes = np.eye(4)
    vectors = [*axes, axes[0] + axes[3], axes[1]]
    found = split.score({"logits": [vector[None] for vector in vectors]})
    assert found == pytest.approx(dict.fromkeys(FIGURES, 1.0))

    _jsonl(tmp_path / "train.jsonl", [dict(rows[0], negatives=list("bcdefgh"))] * 2)
    assert _load(spoken, tmp_path).train.choices == 2 + retrieval.MOST_NEGATIVES
    _jsonl(tmp_path / "train.jsonl", [*rows[:2], {"query": "x", "positive": "y"}])
    task = _load(spoken, tmp_path)
    assert task.train.choices == 2
    assert "5 negatives are not used" in "\n".join(task.notes)


def test_a_tenth_of_the_queries_validates_where_nothing_else_does(spoken, tmp_path):
    rows = [{"query": f"query {n % 200}", "positive": f"passage {n}"} for n in range(400)]
    _jsonl(tmp_path / "train.jsonl", rows)
    task = _load(spoken, tmp_path)
    (split,) = task.splits
    held = len(split.features) - 400
    assert 8 <= held <= 35
    assert len(task.train) == 400 - 2 * held
    # Test judgements are then a split of their own, not learnt from.
    _jsonl(tmp_path / "test.jsonl", rows[:7])
    task = _load(spoken, tmp_path)
    assert [split.name for split in task.splits] == ["validation", "test"]
    assert len(task.train) == 400 - 2 * held
    (path,) = task.splits[1].write({"logits": [np.ones((1, 2))] * 14}, tmp_path / "out")
    assert path.name == "run_test.tsv"
    # A row may be named in another file.
    _jsonl(tmp_path / "mine.jsonl", rows[:50])
    assert len(_load(spoken, tmp_path, train="mine.jsonl", validation="test.jsonl").train) == 50


def test_mistakes_are_named(spoken, tmp_path):
    with pytest.raises(UserError, match=r"holds no train.jsonl or qrels/train.tsv"):
        _load(spoken, tmp_path)
    _qrels(tmp_path / "qrels" / "test.tsv", [("q1", "d1", 1)])
    with pytest.raises(UserError, match=r"queries.jsonl cannot be read"):
        _load(spoken, tmp_path)
    _jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "one"}])
    with pytest.raises(UserError, match=r"corpus.jsonl cannot be read"):
        _load(spoken, tmp_path)
    _jsonl(tmp_path / "corpus.jsonl", [{"_id": "d1", "body": "a"}])
    with pytest.raises(UserError, match=r"there is no column 'text'"):
        _load(spoken, tmp_path)
    _jsonl(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "a"}])
    with pytest.raises(UserError, match=r"1 queries are too few to split"):
        _load(spoken, tmp_path)
    _qrels(tmp_path / "qrels" / "test.tsv", [("q1", "d7", 1)])
    with pytest.raises(UserError, match=r"unknown document, left out .*test.tsv:2"):
        _load(spoken, tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("1 0 d1 1\n")
    with pytest.raises(UserError, match=r"line 1: there is no column 'query-id'"):
        _load(spoken, tmp_path)
    _jsonl(tmp_path / "train.jsonl", [{"query": "a", "text": "b"}])
    with pytest.raises(UserError, match=r"there is no column 'positive'"):
        _load(spoken, tmp_path)
    with pytest.raises(UserError, match=r"not both"):
        _load(spoken, tmp_path, train="train.jsonl,qrels/test.tsv")

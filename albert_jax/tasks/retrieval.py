"""Retrieval: which passages answer a query, by the cosine of their vectors.

In:  JSON Lines of `{"query", "positive", "negatives": [...]}`, or BEIR's layout: `corpus.jsonl`
     (`_id`, `title`, `text`), `queries.jsonl`, and judgements in `qrels/{train,dev,test}.tsv`
     (query-id, corpus-id, score, under a header). `train.jsonl` goes before `qrels/train.tsv`.
Out: a `Task` whose training rows are a query, a passage that answers it and, where every row has
     some, passages that do not; and splits of whole corpora with their queries, each a row.

What is not there to be evaluated is split off by a hash of the query's id (of its text in JSON
Lines), always the same: 1 query in 10 of a training set without a validation set; where there are
only judgements for evaluation, 60 % of their queries to train on and the rest to validate.

Figures, means over queries, are those of BEIR and trec_eval, of the whole corpus in order of the
cosine (equal ones in the corpus' order): `ndcg_at_10` with scores as gains, recall at 10 and 100,
`mrr_at_10`. Queries for which the corpus holds nothing relevant are left out. A query that stands
in the corpus itself, same id and same text, is no candidate for itself, as in BEIR; that the ids
alone are the same says nothing, as in Cranfield.

Sources: Thakur et al. 2021, arXiv:2104.08663 (BEIR); trec_eval, `m_ndcg_cut.c`.
Letters: N documents, Q queries, D width of a vector, K depth of a ranking.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import rows, task
from albert_jax.tasks.task import Features, Outputs, Problems, Split, Task

HEAD = "embedding"
BEST_BY = "ndcg_at_10"
MOST_NEGATIVES = 4
DEPTH = 100  # of a ranking that is scored and written
TRAIN_SHARE = 0.6  # of the queries of judgements that were made for evaluation
_KEPT_SHARE = 0.9  # of the queries of a training set without a validation set
_FILES = {
    "train": ("train.jsonl", "qrels/train.tsv"),
    "validation": (
        "validation.jsonl",
        "dev.jsonl",
        "qrels/dev.tsv",
        "qrels/validation.tsv",
    ),
    "test": ("test.jsonl", "qrels/test.tsv"),
}
_QUERIES_AT_ONCE = 64
_RUN_NAME = "albert_jax"


class Query(NamedTuple):
    """A query and what is known of documents.

    Attributes:
        id: what it is called in a run file.
        key: by what it is assigned to a side where a set is split in two.
        text: what is asked.
        gains: more than 0, of each relevant document's id.
        negatives: of relevant documents, the texts that were given beside them as not relevant.
    """

    id: str
    key: str
    text: str
    gains: dict[str, float]
    negatives: dict[str, list[str]]


class Collection(NamedTuple):
    """Texts by id in their order, and queries over them."""

    documents: Mapping[str, str]
    queries: Sequence[Query]


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """A collection, or pairs.

    Args:
        config: the run's; `task.train`, `validation` and `test` name JSON Lines or judgements
            (`.tsv`) under `folder`.
        tokenizer: makes the pieces.
        folder: where the files are.

    Raises:
        UserError: no such files or columns, or nothing that can be used to learn or evaluate.
    """
    problems, notes = Problems(), []
    found = _read(config, folder, problems)
    if "train" not in found:
        name = next(iter(found))
        found["train"], rest = _halves(found.pop(name), TRAIN_SHARE, folder)
        found = {"validation": rest, **found}
        notes.append(
            f"no training set: {TRAIN_SHARE:.0%} of the judged queries of {name} are trained on "
            f"({len(found['train'].queries):,}), the rest validated ({len(rest.queries):,}), by a "
            "hash of the query's id"
        )
    elif "validation" not in found:
        found["train"], rest = _halves(found["train"], _KEPT_SHARE, folder)
        found = {"validation": rest, **found}
        notes.append(
            f"no validation set: {len(rest.queries):,} training queries split off, by a hash"
        )
    longest = config.data.max_seq_length
    train, train_notes = _train(found.pop("train"), tokenizer, longest, folder, problems)
    splits = []
    for name, collection in found.items():
        features, cut = _featurise(
            [[text] for text in collection.documents.values()]
            + [[query.text] for query in collection.queries],
            tokenizer,
            longest,
        )
        notes.append(
            f"{name}: {len(collection.queries):,} queries over {len(collection.documents):,} "
            f"documents{_cut(cut, len(features), longest)}"
        )
        splits.append(_split(name, collection, features))
    return Task(
        head=HEAD,
        labels=(),
        train=train,
        splits=tuple(splits),
        best_by=BEST_BY,
        notes=(*train_notes, *notes, *problems.notes()),
    )


def ranking(
    queries_QD: np.ndarray,
    documents_ND: np.ndarray,
    depth: int = DEPTH,
    without: Mapping[int, int] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each query the nearest documents by cosine, best first, equal ones in their own order.

    Args:
        queries_QD, documents_ND: vectors of any length; one of zeros has the cosine 0.
        depth: how many documents.
        without: of a query the place of a document that is no candidate.

    Returns:
        Of each query (places int [K], cosines float32 [K]).
    """
    queries_QD, documents_ND = _unit(queries_QD), _unit(documents_ND)
    found = []
    for start in range(0, len(queries_QD), _QUERIES_AT_ONCE):
        scores_BN = queries_QD[start : start + _QUERIES_AT_ONCE] @ documents_ND.T
        for number, scores_N in enumerate(scores_BN, start=start):
            if without and number in without:
                scores_N[without[number]] = -np.inf
            few = min(depth, len(scores_N))
            # All that are as near as the last one of them, so that equal ones keep their order.
            least = np.partition(scores_N, -few)[-few]
            near = np.flatnonzero((scores_N >= least) & np.isfinite(scores_N))
            order = near[np.argsort(-scores_N[near], kind="stable")][:few]
            found.append((order, scores_N[order]))
    return found


def figures(
    rankings: Sequence[Sequence[Any]], gains: Sequence[Mapping[Any, float]]
) -> dict[str, float]:
    """Means over queries; 1.0 is the best of each.

    Args:
        rankings: of each query documents, best first; for recall at 100, that many.
        gains: of each query its relevant documents (one or more), each with a gain above 0.
    """
    sums: dict[str, float] = collections.defaultdict(float)
    for ranked, relevant in zip(rankings, gains, strict=True):
        ideal = dcg(sorted(relevant.values(), reverse=True)[:10])
        sums["ndcg_at_10"] += dcg([relevant.get(one, 0.0) for one in ranked[:10]]) / ideal
        for depth in (10, 100):
            hits = sum(one in relevant for one in ranked[:depth])
            sums[f"recall_at_{depth}"] += hits / len(relevant)
        first = next((rank for rank, one in enumerate(ranked[:10], 1) if one in relevant), math.inf)
        sums["mrr_at_10"] += 1 / first
    return {name: total / len(rankings) for name, total in sums.items()}


def dcg(gains: Sequence[float]) -> float:
    """Discounted cumulative gain: each gain over log2 of its rank + 1 (Järvelin and Kekäläinen
    2002, in the form of trec_eval).
    """
    return float(sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1)))


def _split(name: str, collection: Collection, features: Features) -> Split:
    """A collection's documents, then its queries, each a row."""
    ids = list(collection.documents)
    places = {one: place for place, one in enumerate(ids)}
    gains = [
        {places[one]: gain for one, gain in query.gains.items()} for query in collection.queries
    ]
    without = {
        number: places[query.id]
        for number, query in enumerate(collection.queries)
        if query.id in places and _same(query.text, collection.documents[query.id])
    }

    def ranked(outputs: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
        vectors = np.stack([np.asarray(row, np.float32).reshape(-1) for row in outputs["logits"]])
        return ranking(vectors[len(ids) :], vectors[: len(ids)], DEPTH, without)

    def score(outputs: Outputs) -> dict[str, float]:
        return figures([order.tolist() for order, _ in ranked(outputs)], gains)

    def write(outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        path = folder / ("run.tsv" if name == "validation" else f"run_{name}.tsv")
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for query, (order, scores) in zip(collection.queries, ranked(outputs), strict=True):
                for rank, (place, cosine) in enumerate(zip(order, scores, strict=True), start=1):
                    # Nine digits tell any two float32 apart: trec_eval sorts by the score.
                    cells = (query.id, "Q0", ids[place], rank, f"{cosine:.9g}", _RUN_NAME)
                    file.write("\t".join(map(str, cells)) + "\n")
        return [path]

    return Split(name, features, score, write)


def _train(
    collection: Collection,
    tokenizer: Tokenizer,
    longest: int,
    folder: pathlib.Path,
    problems: Problems,
) -> tuple[Features, list[str]]:
    """A row for each query and passage that answers it, and notes."""
    found: list[list[str]] = []
    counts: list[int] = []
    asked: list[int] = []
    asked_before: dict[str, int] = {}
    for query in collection.queries:
        for one in query.gains:
            if not collection.documents[one].strip():
                problems.add("empty passage that is relevant, not trained on", folder, one)
                continue
            negatives = query.negatives.get(one, [])
            found.append([query.text, collection.documents[one], *negatives])
            counts.append(len(negatives))
            asked.append(asked_before.setdefault(query.text, len(asked_before)))
    if not found:
        raise rows.empty(folder, problems)
    used = min([*counts, MOST_NEGATIVES])
    features, cut = _featurise([row[: 2 + used] for row in found], tokenizer, longest)
    features = dataclasses.replace(features, targets={"query": np.asarray(asked, np.int32)})
    count = len(features) * features.choices
    notes = [
        f"train: {len(features):,} rows of a query, its passage and {used} negatives"
        + _cut(cut, count, longest, "texts")
    ]
    if sum(counts) > used * len(counts):
        notes.append(
            f"train: {sum(counts) - used * len(counts):,} negatives are not used: each row has as "
            f"many as the row with the fewest, at most {MOST_NEGATIVES}"
        )
    return features, notes


def _featurise(
    texts: Sequence[Sequence[str]], tokenizer: Tokenizer, longest: int
) -> tuple[Features, int]:
    """A sequence for each text of each row, and how many were cut; each text is encoded once."""
    places: dict[str, int] = {}
    order = [places.setdefault(text, len(places)) for row in texts for text in row]
    ids, at = tokenizer.encode_batch(list(places))
    room = longest - task.special_pieces(tokenizer, pair=False)
    joined = [
        task.join(tokenizer, ids[begin : min(end, begin + room)].tolist())
        for begin, end in itertools.pairwise(at.tolist())
    ]
    cut = int(np.sum(np.diff(at)[order] > room))
    return task.features((joined[place] for place in order), choices=len(texts[0])), cut


def _cut(cut: int, count: int, longest: int, what: str = "rows") -> str:
    if not cut:
        return ""
    return f", {cut:,} {what} ({cut / count:.1%}) longer than data.max_seq_length={longest} and cut"


def _read(config: Config, folder: pathlib.Path, problems: Problems) -> dict[str, Collection]:
    """What there is of train, validation and test."""
    found: dict[str, Collection] = {}
    beir = _Beir(folder, problems)
    for name, default in _FILES.items():
        paths = rows.files(folder, getattr(config.task, name), f"task.{name}", default)
        if not paths:
            continue
        judged = {path.suffix == ".tsv" for path in paths}
        if len(judged) > 1:
            raise UserError(
                f"task.{name}={getattr(config.task, name)}: give judgements (.tsv) or JSON Lines, "
                "not both."
            )
        found[name] = beir.judged(paths) if judged.pop() else _pairs(paths, problems)
        if not found[name].queries:
            raise rows.empty(", ".join(map(str, paths)), problems)
    if not found:
        raise rows.missing_train(folder, [*_FILES["train"], *_FILES["test"]])
    return found


class _Beir:
    """The corpus and the queries of a folder, read when they are first wanted."""

    def __init__(self, folder: pathlib.Path, problems: Problems) -> None:
        self._folder, self._problems = folder, problems
        self._read: tuple[dict[str, str], dict[str, str], set[str]] | None = None

    def judged(self, paths: Sequence[pathlib.Path]) -> Collection:
        """The queries that files of judgements name."""
        if self._read is None:
            queries, empty = _queries(self._folder / "queries.jsonl", self._problems)
            self._read = _corpus(self._folder / "corpus.jsonl", self._problems), queries, empty
        documents, queries, empty = self._read
        gains: dict[str, dict[str, float]] = {}
        for path in paths:
            for line, query, document, gain in _judgements(path, self._problems):
                if query not in queries:
                    if query not in empty:
                        self._problems.add("judgement of an unknown query, left out", path, line)
                elif document not in documents:
                    self._problems.add("judgement of an unknown document, left out", path, line)
                else:
                    relevant = gains.setdefault(query, {})
                    if gain > 0:
                        relevant[document] = gain
        for query, relevant in gains.items():
            if not relevant:
                self._problems.add(
                    "query without a relevant document, left out", paths[0], f"query {query}"
                )
        return Collection(
            documents,
            [
                Query(one, one, text, gains[one], {})
                for one, text in queries.items()
                if gains.get(one)
            ],
        )


def _corpus(path: pathlib.Path, problems: Problems) -> dict[str, str]:
    found: dict[str, str] = {}
    for line, one, row in _named(path, problems):
        title, text = _text(row.get("title")), _text(row.get("text"))
        if title and not text.startswith(title):
            stop = "" if title[-1] in ".!?" else "."
            text = f"{title}{stop} {text}".strip()
        if not text:
            problems.add("empty document, kept", path, line)
        found[one] = text
    return found


def _queries(path: pathlib.Path, problems: Problems) -> tuple[dict[str, str], set[str]]:
    """Texts by id, and the ids of those that were left out."""
    found: dict[str, str] = {}
    empty: set[str] = set()
    for line, one, row in _named(path, problems):
        text = _text(row.get("text"))
        if text:
            found[one] = text
        else:
            problems.add("empty query, left out", path, line)
            empty.add(one)
    return found, empty


def _named(path: pathlib.Path, problems: Problems) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(line, id, row) of rows with an id of their own."""
    seen: set[str] = set()
    needed = {"_id": "of BEIR's layout", "text": "of BEIR's layout"}
    for line, row in rows.read_jsonl(path, problems, needed):
        one = row.get("_id")
        # A run file is read by white space.
        one = str(one).strip() if isinstance(one, str | int) else ""
        if not one or len(one.split()) > 1:
            problems.add("row without an _id of one word, left out", path, line)
        elif one in seen:
            problems.add("row whose _id was there before, left out", path, line)
        else:
            seen.add(one)
            yield line, one, row


def _judgements(path: pathlib.Path, problems: Problems) -> Iterator[tuple[int, str, str, float]]:
    """(line, query, document, score)."""
    columns = ("query-id", "corpus-id", "score")
    for line, row in rows.read_tsv(path, problems, dict.fromkeys(columns, "of BEIR's qrels")):
        try:
            gain = float(row["score"])
        except ValueError:
            gain = math.nan
        if not math.isfinite(gain):
            problems.add("judgement whose score is no number, left out", path, line)
            continue
        yield line, row["query-id"].strip(), row["corpus-id"].strip(), gain


def _pairs(paths: Sequence[pathlib.Path], problems: Problems) -> Collection:
    """Rows of JSON Lines; all their passages are the documents, numbered from 1 in their order."""
    ids: dict[str, str] = {}
    queries: dict[str, Query] = {}

    def known(text: str) -> str:
        return ids.setdefault(text, str(len(ids) + 1))

    for path in paths:
        needed = {"query": "of retrieval", "positive": "of retrieval"}
        for line, row in rows.read_jsonl(path, problems, needed):
            asked, positive = _text(row.get("query")), _text(row.get("positive"))
            given = row.get("negatives") or []
            if not asked:
                problems.add("empty query, left out", path, line)
                continue
            if not positive:
                problems.add("row without a positive passage, left out", path, line)
                continue
            if not isinstance(given, list):
                problems.add("row whose negatives are no list, left out", path, line)
                continue
            negatives = [text for text in map(_text, given) if text and text != positive]
            if len(negatives) < len(given):
                problems.add("negative that is empty or the positive, left out", path, line)
            query = queries.setdefault(asked, Query(str(len(queries) + 1), asked, asked, {}, {}))
            document = known(positive)
            query.gains[document] = 1.0
            query.negatives.setdefault(document, []).extend(negatives)
            for text in negatives:
                known(text)
    return Collection({one: text for text, one in ids.items()}, list(queries.values()))


def _halves(
    collection: Collection, share: float, folder: pathlib.Path
) -> tuple[Collection, Collection]:
    """Two sides of the queries, the first with about `share` of them, by a hash of the key."""
    sides: tuple[list[Query], list[Query]] = ([], [])
    for query in collection.queries:
        digest = hashlib.sha256(query.key.encode("utf-8", "surrogatepass")).digest()
        sides[int.from_bytes(digest[:8], "big") / 2**64 >= share].append(query)
    if not all(sides):
        raise UserError(
            f"{folder}: {len(collection.queries)} queries are too few to split a validation set "
            "off; name one with task.validation."
        )
    return collection._replace(queries=sides[0]), collection._replace(queries=sides[1])


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _same(first: str, second: str) -> bool:
    return first.split() == second.split()


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of length one; zeros stay zeros, and so become vectors that are not finite."""
    vectors = np.nan_to_num(vectors.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)

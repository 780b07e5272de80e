"""Entities: a tag for each word of a sentence.

In:  CoNLL columns, one word a line, blank lines between sentences; the word first, its tag last,
     tabs or spaces between. `-DOCSTART-` lines, byte-order marks and the language that WikiANN
     writes before each word (`en:`) are passed over. Tags are IOB2, IOB1 (made IOB2) or IOBES.
Out: a `Task` that is scored by whole entities, as seqeval does it in strict mode.

A word's tag stands at its first piece; its other pieces play no part. A sentence that is too long
makes several rows, cut between words, and is scored as the one sentence it is.

Sources: Devlin et al. 2019, arXiv:1810.04805, section 5.3; Ramshaw and Marcus 1995 (IOB1).
Letters: R rows, L pieces of a row, K labels.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import metrics, rows, task
from albert_jax.tasks.task import NOT_COUNTED, Features, Outputs, Problems, Split, Task

HEAD = "token_classification"
OUTSIDE = "O"
NO_PIECE = -1
_NAMES = {
    "train": ("train.txt", "train.conll", "train.tsv"),
    "validation": ("dev.txt", "valid.txt", "dev.conll", "valid.conll", "dev.tsv", "valid.tsv"),
    "test": ("test.txt", "test.conll", "test.tsv"),
}
_TAG = re.compile(r"O|[BIES]-.+")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*:")
_DOCUMENT = "-DOCSTART-"
_BYTE_ORDER_MARK = "\ufeff"


class Sentence(NamedTuple):
    """Words, their tags (none where a file has only words), and the line of each in the file."""

    words: list[str]
    tags: list[str]
    lines: list[int]
    path: pathlib.Path


class Place(NamedTuple):
    """Where the tag of a word is predicted: in which row, at which of its pieces."""

    row: int
    piece: int


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """Files of tagged words.

    Args:
        config: the run's; `task.train`, `validation` and `test` name files under `folder`, and
            `task.labels` the tags where not those of the training file are meant.
        tokenizer: makes the pieces; entities want one that keeps capitals.
        folder: where the files are.

    Raises:
        UserError: no such files; tags that are none.
    """
    problems = Problems()
    notes: list[str] = []
    found: dict[str, list[Sentence]] = {}
    for name, default in _NAMES.items():
        paths = rows.files(folder, getattr(config.task, name), f"task.{name}", default)
        sentences = [one for path in paths for one in read(path, problems, notes)]
        if paths and not sentences:
            raise rows.empty(", ".join(map(str, paths)), problems)
        if name != "test" and any(not sentence.tags for sentence in sentences):
            raise UserError(f"{paths[0]}: words without tags; task.{name} needs both.")
        if sentences:
            found[name] = sentences
    if "train" not in found:
        raise rows.missing_train(folder, _NAMES["train"])
    in_train = sorted({tag for sentence in found["train"] for tag in sentence.tags} - {OUTSIDE})
    # O first: a head that knows nothing yet says it of most words.
    labels = config.task.label_names or (OUTSIDE, *in_train)
    ends = any(tag[:2] in ("E-", "S-") for every in found.values() for s in every for tag in s.tags)
    scheme = "IOBES" if ends else "IOB2"
    for label in labels:
        if not _TAG.fullmatch(label):
            raise UserError(
                f"task.labels: {label!r} is no tag; they are O, B-TYPE, I-TYPE and so on."
            )
    features: dict[str, Features] = {}
    splits, draw = [], None
    for name, sentences in found.items():
        features[name], places, cut = featurise(
            sentences, labels, tokenizer, config.data.max_seq_length, problems
        )
        notes.append(
            f"{name}: {len(sentences):,} sentences, {sum(len(s.words) for s in sentences):,} words"
            + (f"; {cut:,} sentences are longer than a row and make several" if cut else "")
        )
        if name != "train":
            splits.append(_split(name, sentences, places, features[name], labels, scheme))
            if len(splits) == 1 and splits[0].score is not None:
                draw = _drawing(sentences, places, labels)
    return Task(
        head=HEAD,
        labels=tuple(labels),
        train=features["train"],
        splits=tuple(splits),
        best_by="f1",
        notes=(*notes, *problems.notes()),
        draw=draw,
    )


def encode_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """A sentence's pieces, word by word.

    Returns:
        ids of all words, without special pieces; and for each word the place of its first one,
        NO_PIECE where it has none.
    """
    (encoded,) = _encode_sentences(tokenizer, [words])
    ids: list[int] = []
    first = []
    for word in encoded:
        first.append(len(ids) if word else NO_PIECE)
        ids += word
    return ids, first


def read(path: pathlib.Path, problems: Problems, notes: list[str]) -> list[Sentence]:
    """The sentences of a file, IOB1 made IOB2.

    Args:
        path: the file.
        problems: takes note of lines that are left out, and of tags that do not follow each other.
        notes: takes a line on a file that was converted.

    Raises:
        UserError: a tag that is none, with its line.
    """
    table = list(_columns(path))
    tagged = any(len(cells) > 1 for _, cells in table)
    prefixed = bool(table) and all(
        _LANGUAGE.match(cells[0]) for _, cells in table if cells and cells[0] != _DOCUMENT
    )
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    at: list[int] = []
    for line, cells in [*table, (0, [])]:
        if not cells or cells[0] == _DOCUMENT:
            if words:
                sentences.append(Sentence(words, tags, at, path))
            words, tags, at = [], [], []
            continue
        if tagged and len(cells) == 1:
            problems.add("word without a tag, left out", path, line)
            continue
        word = _LANGUAGE.sub("", cells[0], count=1) if prefixed else cells[0]
        if not word.strip():
            problems.add("tag without a word, left out", path, line)
            continue
        words.append(word)
        at.append(line)
        if tagged:
            tag = cells[-1].strip()
            if not _TAG.fullmatch(tag):
                raise UserError(
                    f"{path}, line {line}: the last column, {tag!r}, is no tag; tags are O, "
                    "B-TYPE, I-TYPE, E-TYPE and S-TYPE."
                )
            tags.append(tag)
    if tagged and _is_iob1(sentences):
        notes.append(f"{path}: tags are IOB1, read as IOB2")
        sentences = [one._replace(tags=_iob2(one.tags)) for one in sentences]
    ends = any(tag[0] in "ES" for sentence in sentences for tag in sentence.tags)
    for sentence in sentences:
        for place in _illegal(sentence.tags, ends):
            kind = "tag that cannot follow the one before it, kept (it makes no entity)"
            problems.add(kind, path, sentence.lines[place])
    return sentences


def featurise(
    sentences: Sequence[Sentence],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    longest: int,
    problems: Problems,
) -> tuple[Features, list[list[Place | None]], int]:
    """Rows of pieces, and where each word is predicted.

    Args:
        sentences: what `read` found.
        labels: tags in the order of the scores; what is none of them plays no part in the loss.
        tokenizer: makes the pieces.
        longest: pieces of a row, special ones included.
        problems: takes note of words without pieces or longer than a row, and of unknown tags.

    Returns:
        features with `labels`; for each word of each sentence its place, None where it has no
        piece; and how many sentences make several rows.
    """
    room = longest - task.special_pieces(tokenizer, pair=False)
    number = {label: place for place, label in enumerate(labels)}
    sequences, targets = [], []
    places: list[list[Place | None]] = []
    several = 0
    encoded = _encode_sentences(tokenizer, [sentence.words for sentence in sentences])
    for sentence, words in zip(sentences, encoded, strict=True):
        of_rows: list[tuple[list[int], list[int]]] = [([], [])]
        where: list[Place | None] = []
        for index, pieces in enumerate(words):
            place = sentence.path, sentence.lines[index]
            if not pieces:
                problems.add("word without any piece, predicted as O", *place)
                where.append(None)
                continue
            if len(pieces) > room:
                problems.add("word longer than a row, cut", *place)
                pieces = pieces[:room]
            ids, wanted = of_rows[-1]
            if len(ids) + len(pieces) > room:
                ids, wanted = [], []
                of_rows.append((ids, wanted))
            # The begin piece stands before all.
            where.append(Place(len(sequences) + len(of_rows) - 1, len(ids) + 1))
            label = NOT_COUNTED
            if sentence.tags:
                label = number.get(sentence.tags[index], NOT_COUNTED)
                if label == NOT_COUNTED:
                    kind = f"tag {sentence.tags[index]!r} that is not among the labels, never right"
                    problems.add(kind, *place)
            ids += pieces
            wanted += [label] + [NOT_COUNTED] * (len(pieces) - 1)
        several += len(of_rows) > 1
        places.append(where)
        for ids, wanted in of_rows:
            sequences.append(task.join(tokenizer, ids))
            targets.append([NOT_COUNTED, *wanted, NOT_COUNTED])
    return task.features(sequences, token_targets={"labels": targets}), places, several


def predict(
    outputs: Outputs, places: Sequence[Sequence[Place | None]], labels: Sequence[str]
) -> list[list[str]]:
    """The most probable tag of each word of each sentence; O of words without a piece.

    Args:
        outputs: `logits` of R rows, each [L, K].
        places: what `featurise` found.
        labels: K tags.
    """
    best = [np.asarray(row).argmax(axis=-1) for row in outputs["logits"]]
    return [
        [OUTSIDE if one is None else labels[int(best[one.row][one.piece])] for one in sentence]
        for sentence in places
    ]


def _split(
    name: str,
    sentences: Sequence[Sentence],
    places: Sequence[Sequence[Place | None]],
    features: Features,
    labels: Sequence[str],
    scheme: str,
) -> Split:
    tagged = all(sentence.tags for sentence in sentences)

    def score(outputs: Outputs) -> dict[str, float]:
        true = [sentence.tags for sentence in sentences]
        return metrics.entities(true, predict(outputs, places, labels), scheme)

    def write(outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        path = folder / f"predictions_{name}.conll"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = []
        for sentence, predicted in zip(sentences, predict(outputs, places, labels), strict=True):
            columns = (sentence.words, *([sentence.tags] if tagged else []), predicted)
            blocks.append("".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)))
        path.write_text("\n".join(blocks), encoding="utf-8", newline="\n")
        return [path]

    return Split(name, features, score if tagged else None, write)


def _drawing(
    sentences: Sequence[Sentence], places: Sequence[Sequence[Place | None]], labels: Sequence[str]
) -> Callable[[Outputs, pathlib.Path], None]:
    """What draws which tag was taken for which, word by word."""
    number = {label: place for place, label in enumerate(labels)}

    def draw(outputs: Outputs, folder: pathlib.Path) -> None:
        predicted = predict(outputs, places, labels)
        pairs = [
            (number[true], number[said])
            for sentence, said_of in zip(sentences, predicted, strict=True)
            for true, said in zip(sentence.tags, said_of, strict=True)
            if true in number and said in number
        ]
        true_W, said_W = np.array(pairs, np.int32).reshape(-1, 2).T
        metrics.draw_confusion(folder / "confusion.png", true_W, said_W, labels)

    return draw


def _columns(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(line, columns) of a file; none for a blank line, or one of nothing but white space and
    byte-order marks.
    """
    for number, line in rows.lines(path):
        if not line.replace(_BYTE_ORDER_MARK, "").strip():
            yield number, []
        elif "\t" in line:
            yield number, [cell for cell in line.split("\t") if cell.strip()]
        else:
            yield number, line.split()


def _is_iob1(sentences: Iterable[Sentence]) -> bool:
    """Whether entities begin with I, and B only parts two of a type that touch each other."""
    begun_inside = False
    for sentence in sentences:
        for before, tag in itertools.pairwise([OUTSIDE, *sentence.tags]):
            same_type = before[2:] == tag[2:]
            if tag[0] in "ES" or (tag[0] == "B" and not same_type):
                return False
            begun_inside |= tag[0] == "I" and not same_type
    return begun_inside


def _iob2(tags: Sequence[str]) -> list[str]:
    """IOB1 tags as IOB2: each entity begins with B."""
    return [
        f"B-{tag[2:]}" if tag[0] == "I" and before[2:] != tag[2:] else tag
        for before, tag in itertools.pairwise([OUTSIDE, *tags])
    ]


def _illegal(tags: Sequence[str], ends: bool) -> list[int]:
    """Places of tags that cannot stand behind the one before; `ends`: entities end with E or are
    S, and one that was begun has to be ended.
    """
    found = []
    for place, (before, tag) in enumerate(itertools.pairwise([OUTSIDE, *tags, OUTSIDE])):
        is_open = before[0] in "BI"
        goes_on = tag[0] in "IE"
        continues = is_open and before[2:] == tag[2:]
        if (goes_on and not continues) or (ends and is_open and not goes_on):
            found.append(min(place, len(tags) - 1))
    return found


def _encode_sentences(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Pieces of each word of each sentence. Where spaces belong to pieces, all words but the first
    have one before them, as in running text.
    """
    space = tokenizer.between_sentences
    texts = [
        (space if place else "") + word for words in sentences for place, word in enumerate(words)
    ]
    ids, at = tokenizer.encode_batch(texts)
    pieces = iter([ids[begin:end].tolist() for begin, end in itertools.pairwise(at)])
    return [list(itertools.islice(pieces, len(words))) for words in sentences]
